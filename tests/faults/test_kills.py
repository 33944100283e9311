"""Ranks killed, as often as `--kills N` and `--restarts N` say: runs end at once, and lose nothing."""

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import yaml
from harness import Mpi, World, complete_run, eventually, write_jsonl
from test_fault import END_S, SLOWLY, START_S, journaled, verify

LAYOUTS = [(4, 1, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2)]  # replicas x stages x shards
IN_A_ROW = 10  # kills of one job before it is left to complete
COMPLETE_S = 600  # though other work has the same cores
SOON_S, LATER_S = 10, 2  # after the ranks are there; after a new result


def test_kills_at_any_moment(
    mpi: Mpi, long_job: Path, unbroken: bytes, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kills = request.config.getoption("--kills")
    if not kills:
        pytest.skip("slow: give --kills N")
    random, ends_s, total = Random(kills), [], len(unbroken.splitlines())
    for first in range(0, kills, IN_A_ROW):
        output = tmp_path / f"out-{first}"
        for _ in range(first, min(first + IN_A_ROW, kills)):
            if journaled(output) < total:
                ends_s.append(break_run(mpi, long_job, output, random, late=random.random() < 0.5))
        complete_run(mpi, 2, long_job, output, "parallel.stages=2", resume=True, timeout_s=COMPLETE_S)
        assert (output / "results.jsonl").read_bytes() == unbroken
        assert journaled(output) == total, "each result is kept once"
        assert verify(mpi, output) == (True, total)
    print(f"\n{mpi.name}: {len(ends_s)} kills, the slowest end after {max(ends_s):.2f} s")


def test_restarts_in_a_row_make_progress(
    mpi: Mpi, long_job: Path, unbroken: bytes, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each run is killed soon after its first new result."""
    restarts = request.config.getoption("--restarts")
    if not restarts:
        pytest.skip("slow: give --restarts N")
    random, output, job = Random(restarts), tmp_path / "out", tmp_path / "job.yaml"
    sections = yaml.safe_load(long_job.read_text())
    records = [json.loads(line) for line in Path(sections["input"]["path"]).read_text().splitlines()]
    times = 1 + restarts // 4  # more than are done before the last kill
    sections["input"]["path"] = str(write_jsonl(tmp_path / "records.jsonl", records * times))
    job.write_text(yaml.safe_dump(sections))
    kept = [0]
    for _ in range(restarts):
        break_run(mpi, job, output, random, late=True)
        kept.append(journaled(output))
    assert all(before < after for before, after in pairwise(kept))
    complete_run(mpi, 2, job, output, resume=True, timeout_s=COMPLETE_S)
    outputs = [json.loads(line)["output"] for line in (output / "results.jsonl").read_bytes().splitlines()]
    assert outputs == [json.loads(line)["output"] for line in unbroken.splitlines()] * times
    print(f"\n{mpi.name}: {restarts} restarts, {kept[-1]} of {len(outputs)} records, at least 1 a run")


def break_run(mpi: Mpi, job: Path, output: Path, random: Random, late: bool) -> float:
    """Go on with a job in some layout until a rank of it is killed; seconds from there to the end of all ranks. Kills
    come while ranks start or, if `late`, after a new result."""
    replicas, stages, shards = random.choice(LAYOUTS)
    victim = random.randrange(4)
    moment_s = random.uniform(0, LATER_S if late else SOON_S)
    layout = [f"parallel.replicas={replicas}", f"parallel.stages={stages}", f"parallel.shards={shards}"]
    options = [part for key in layout for part in ("--set", key)]
    lines = journal_lines(output)
    with World(mpi, 4, ["mpinfer", "run", job, "--output", output, "--resume", *options, *SLOWLY]) as world:
        world.wait_until(lambda: len(world.ranks()) == 4, START_S)
        if late:
            eventually(lambda: len(journal_lines(output)) > max(1, len(lines)) or world.ended, START_S)
        time.sleep(moment_s)
        if victim in world.ranks():  # else it was quick
            os.kill(world.ranks()[victim], signal.SIGKILL)
        killed = time.monotonic()
        run = world.wait(END_S)
        end_s = time.monotonic() - killed
    now = journal_lines(output)
    where = (
        f"rank {victim} of {replicas}x{stages}x{shards}, {moment_s:.1f} s after {'a result' if late else 'the start'}"
    )
    assert now[: len(lines)] == lines, f"{where}: lost results\n{run.stderr}"
    assert len(now) > max(1, len(lines)) or not late, f"{where}: no progress\n{run.stderr}"
    return end_s


def journal_lines(output: Path) -> list[bytes]:
    """Whole lines, the header first: a torn one may be cut off."""
    journal = output / "journal.jsonl"
    return journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
