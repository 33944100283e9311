"""What one sees of a run of four ranks: trace.json, timeline.json, report.html, status.json; and clocks that agree."""

import json
import shutil
import stat
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Mpi, mpirun, read_timing

from mpinfer.observe.timeline import bubble

RunLayout = Callable[..., Path]
SHOWN = ("trace.json", "timeline.json", "report.html", "status.json")

# Every rank reads a clock of its own, that is far from rank 0's, and prints what it found out.
CLOCKS = """
import json, sys, time
from types import SimpleNamespace
from mpinfer.transport import clocks
from mpinfer.transport.endpoint import Endpoint

endpoint, kernels = Endpoint(), sys.argv[1].split(",")
endpoint.broadcast(None)
shift = 1000.0 * int(kernels[endpoint.rank])
clocks.time = SimpleNamespace(perf_counter=lambda: time.perf_counter() + shift)
found = clocks.compare_clocks(endpoint, kernels[endpoint.rank])
own = clocks.compare_clocks(endpoint)
everyone = endpoint.all_gather([found.offset_s + shift, found.uncertainty_s, own.offset_s, own.uncertainty_s])
assert not endpoint.data.Iprobe()  # nothing of it is left for channels to find
if endpoint.rank == 0:
    print(json.dumps(everyone))
"""


@pytest.fixture
def output(mpi: Mpi, run_layout: RunLayout) -> Path:
    return run_layout(mpi, 2, 2)


def test_the_trace_of_a_run(output: Path) -> None:
    trace, ranks = json.loads((output / "trace.json").read_text()), read_timing(output)["ranks"]
    by_kind = defaultdict(list)
    for event in trace["traceEvents"]:
        by_kind[event["ph"]].append(event)
    names = {event["args"]["name"] for event in by_kind["M"] if event["name"] == "process_name"}
    places = ("0/0/0", "0/1/0", "1/0/0", "1/1/0")
    assert names == {"records", *(f"rank {n} node {ranks[n]['host']} {place}" for n, place in enumerate(places))}
    computed: dict[int, float] = defaultdict(float)
    for event in by_kind["X"]:
        computed[event["pid"]] += event["dur"] / 1e6 * (event["name"] == "compute")
    assert computed == pytest.approx({rank["rank"]: rank["compute_s"] for rank in ranks}, abs=1e-3)
    assert min(event["ts"] for kind in "XCsf" for event in by_kind[kind]) == 0
    assert_messages_go_forward(by_kind, trace["otherData"]["clocks"])
    assert max(event["args"]["records"] for event in by_kind["C"]) == 24


@pytest.mark.skipif(not shutil.which("trace_processor_shell"), reason="needs Perfetto's trace_processor_shell in PATH")
def test_perfetto_takes_the_whole_trace(output: Path) -> None:
    trace = json.loads((output / "trace.json").read_text())["traceEvents"]
    queries = (
        "select count(*) from slice",
        "select count(*) from flow",
        "select count(*) from counter",
        "select count(*) from stats where severity in ('error', 'data_loss') and value > 0",
    )
    found = [perfetto(output / "trace.json", query) for query in queries]
    assert found == [*(sum(event["ph"] == kind for event in trace) for kind in "XsC"), 0]


def perfetto(trace: Path, query: str) -> int:
    """The one number that a query has as its answer."""
    command = ["trace_processor_shell", "query", trace, query]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout.split()[-1])


def assert_messages_go_forward(by_kind: dict[str, list[Any]], clocks: dict[str, Any]) -> None:
    """From both stages of each replica to the other, each inside a span of its rank, and none taken before it left."""
    sent, received = ({event["id"]: event for event in by_kind[kind]} for kind in ("s", "f"))
    assert sent.keys() == received.keys()
    pairs = {(sent[number]["pid"], received[number]["pid"]) for number in sent}
    assert pairs == {(0, 1), (1, 0), (2, 3), (3, 2)}
    spans = defaultdict(list)
    for event in by_kind["X"]:
        spans[event["pid"]].append((event["ts"], event["ts"] + event["dur"]))
    for number, start in sent.items():
        end = received[number]
        uncertain_us = sum(clocks[str(event["pid"])]["uncertainty_s"] for event in (start, end)) * 1e6
        assert start["ts"] <= end["ts"] + uncertain_us
        for event in (start, end):
            assert any(first <= event["ts"] <= last for first, last in spans[event["pid"]])


def test_the_timeline_has_the_bubble_of_the_account(output: Path) -> None:
    times, timing = json.loads((output / "timeline.json").read_text()), read_timing(output)
    assert bubble(times, timing["wall_s"]) == pytest.approx(timing["bubble"], abs=0.01)
    for rank, row in zip(timing["ranks"], times["ranks"], strict=True):
        for phase, microseconds in zip(times["phases"], row["microseconds"], strict=True):
            assert sum(microseconds) / 1e6 == pytest.approx(rank[f"{phase}_s"], abs=0.005)
    assert sum(times["records"]) == 24
    latency = timing["latency_s"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"] <= timing["wall_s"]


def test_the_page_and_the_status_of_a_run(output: Path) -> None:
    page = (output / "report.html").read_text()
    for words in ("The plan", "What ranks did over time", "Progress of records", "From hand-out to result"):
        assert words in page
    status = json.loads((output / "status.json").read_text())
    assert status["state"] == "complete"
    assert status["records"] == {"total": 24, "done": 24, "failed": 0}
    assert [rank["rank"] for rank in status["ranks"]] == list(range(4))
    assert sum(rank["records_done"] for rank in status["ranks"]) >= 2 * 24  # two ranks a replica
    for name in SHOWN:
        assert stat.S_IMODE((output / name).stat().st_mode) == 0o600
    manifest = (output / "manifest.json").stat().st_mtime_ns
    assert all((output / name).stat().st_mtime_ns <= manifest for name in SHOWN if name != "status.json")


@pytest.mark.parametrize("kernels", ["0,0,0", "0,1,0", "0,1,2,3,4", "0,1,1,2,2"])
def test_clocks_are_compared(mpi: Mpi, kernels: str) -> None:
    run = mpirun(mpi, kernels.count(",") + 1, ["python", "-c", CLOCKS, kernels])
    assert run.returncode == 0, run.stderr
    for kernel, (off_s, uncertainty_s, *own) in zip(kernels.split(","), json.loads(run.stdout), strict=True):
        assert abs(off_s) <= uncertainty_s + 1e-9
        assert uncertainty_s < 1
        assert (uncertainty_s > 0) == (kernel != "0")
        assert own == [0, 0]  # they are on one machine
