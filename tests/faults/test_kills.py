"""Ranks killed at random moments, as often as `--kills N` says: runs end at once, and lose nothing."""

import os
import signal
import time
from pathlib import Path
from random import Random

import pytest
from harness import Mpi, World, complete_run, eventually
from test_fault import END_S, SLOWLY, START_S, journaled, verify

LAYOUTS = [(4, 1, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2)]  # replicas x stages x shards
IN_A_ROW = 10  # kills of one job before it is left to complete
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
                ends_s.append(break_run(mpi, long_job, output, random))
        complete_run(mpi, 2, long_job, output, "parallel.stages=2", resume=True)
        assert (output / "results.jsonl").read_bytes() == unbroken
        assert journaled(output) == total, "each result is kept once"
        assert verify(mpi, output) == (True, total)
    print(f"\n{mpi.name}: {len(ends_s)} kills, the slowest end after {max(ends_s):.2f} s")


def break_run(mpi: Mpi, job: Path, output: Path, random: Random) -> float:
    """Go on with a job in some layout until a rank of it is killed; seconds from there to the end of all ranks. Half of
    the kills come while ranks start, the others after a new result."""
    replicas, stages, shards = random.choice(LAYOUTS)
    victim, late = random.randrange(4), random.random() < 0.5
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
        world.wait(END_S)
        end_s = time.monotonic() - killed
    now = journal_lines(output)
    where = (
        f"rank {victim} of {replicas}x{stages}x{shards}, {moment_s:.1f} s after {'a result' if late else 'the start'}"
    )
    assert now[: len(lines)] == lines, f"{where}: lost results"
    assert len(now) > max(1, len(lines)) or not late, f"{where}: no progress"
    return end_s


def journal_lines(output: Path) -> list[bytes]:
    """Whole lines, the header first: a torn one may be cut off."""
    journal = output / "journal.jsonl"
    return journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
