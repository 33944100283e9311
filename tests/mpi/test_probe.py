"""Links are measured alike for all ranks, in time, however few the cores; never how fast they are."""

import json
from pathlib import Path
from typing import Any

import pytest
from harness import Mpi, mpirun

# Prints the figures of each rank, its seconds, and where it has them from.
PROGRAM = """
import json, sys, time
from mpinfer.transport.endpoint import Endpoint, library_version
from mpinfer.transport.probe import measure_links
from mpinfer.cluster.allocation import machine_links

endpoint = Endpoint()
nodes = json.loads(sys.argv[1])
late, mode = int(sys.argv[2]), sys.argv[3]
endpoint.broadcast(None)
if endpoint.rank == late:
    time.sleep(0.5)
started = time.perf_counter()
if mode == "remembered":
    names = [f"node{node}" for node in nodes]
    links = machine_links(endpoint, names, library_version(), lambda: measure_links(endpoint, nodes))
    inside, between, origin = links.inside, links.between, links.origin
else:
    (inside, between), origin = measure_links(endpoint, nodes), ""
seconds = time.perf_counter() - started
figures = [link and [link.latency_s, link.bytes_per_s] for link in (inside, between)]
everyone = endpoint.all_gather({"figures": figures, "seconds": seconds, "origin": origin})
assert not endpoint.data.Iprobe()  # nothing of it is left for channels to find
if endpoint.rank == 0:
    print(json.dumps(everyone))
"""


def probe(mpi: Mpi, nodes: list[int], late: int = -1, mode: str = "", env: Any = None) -> list[dict[str, Any]]:
    run = mpirun(mpi, len(nodes), ["python", "-c", PROGRAM, json.dumps(nodes), late, mode], env=env)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("nodes", "measured"),
    [
        ([0], (False, False)),
        ([0, 0], (True, False)),
        ([0, 1], (False, True)),
        ([0, 1, 0, 1], (True, True)),
        ([0, 1, 2, 2], (True, True)),
    ],
    ids=str,
)
def test_all_ranks_get_the_same_figures(mpi: Mpi, nodes: list[int], measured: tuple[bool, bool]) -> None:
    ranks = probe(mpi, nodes)
    inside, between = ranks[0]["figures"]
    assert all(rank["figures"] == [inside, between] for rank in ranks)
    assert (inside != [1e-6, 5e9]) == measured[0]  # else it is the typical link
    assert (between is not None) == measured[1]
    assert all(0 < figure < float("inf") for figure in [*inside, *(between or [])])
    assert max(rank["seconds"] for rank in ranks) < 5


def test_more_ranks_than_cores_keep_the_time(one_mpi: Mpi) -> None:
    ranks = probe(one_mpi, [rank // 4 for rank in range(16)])
    assert max(rank["seconds"] for rank in ranks) < 10


@pytest.mark.parametrize("late", [0, 1])
def test_a_late_rank_is_waited_for_outside_of_the_figures(one_mpi: Mpi, late: int) -> None:
    ranks = probe(one_mpi, [0, 0], late)
    assert ranks[1 - late]["seconds"] > 0.4
    assert ranks[0]["figures"][0][0] < 0.2


def test_the_next_run_of_an_allocation_remembers(one_mpi: Mpi, tmp_path: Path) -> None:
    runs = [probe(one_mpi, [0, 1], mode="remembered", env={"XDG_CACHE_HOME": str(tmp_path)}) for _ in range(2)]
    assert runs[0][0]["origin"].startswith("measured in ")
    assert runs[1][0]["origin"] == "cached"
    assert all(rank["figures"] == runs[0][0]["figures"] for run in runs for rank in run)
