"""A run that is told to stop ends in order, and goes on where it was."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import FAULTY_RANK, Mpi, World, complete_run
from test_fault import END_S, SLOWLY, START_S, journaled, state, verify

INTERRUPTED = 4
DRAIN_S = 60  # at most: sequences that have begun, on a busy machine


@pytest.mark.parametrize("told", ["launcher", "rank"])
def test_told_run_finishes_what_has_begun(
    mpi: Mpi, told: str, long_job: Path, unbroken: bytes, tmp_path: Path, sample: Callable[[bool], None]
) -> None:
    sample((mpi.name, told) in [("openmpi", "launcher"), ("mpich", "rank")])
    output, total = tmp_path / "out", len(unbroken.splitlines())
    options = ["--set", "parallel.stages=2", "--set", f"stop.drain_limit_s={DRAIN_S}", *SLOWLY]
    with World(mpi, 2, ["mpinfer", "run", long_job, "--output", output, *options]) as world:
        world.wait_until(lambda: journaled(output), START_S)
        known = journaled(output)
        if told == "launcher":
            world.launcher.send_signal(signal.SIGUSR1)
        else:
            os.kill(world.ranks()[1], signal.SIGTERM)
        run = world.wait(DRAIN_S + END_S)
    kept = journaled(output)
    assert known < kept < total
    assert run.returncode == INTERRUPTED, run.stderr
    assert run.stderr.count("mpinfer: told to stop") == 1
    assert f"stopped, {kept} of {total} records done; --resume goes on" in run.stderr
    assert verify(mpi, output) == (False, kept)
    assert state(output) == "interrupted"
    assert json.loads((output / "trace.json").read_text())["traceEvents"]
    complete_run(mpi, 2, long_job, output, "parallel.stages=2", resume=True)
    assert (output / "results.jsonl").read_bytes() == unbroken


@pytest.mark.parametrize(
    "why", [pytest.param("told twice", marks=pytest.mark.slow), "work in hand was not finished within 1 s"]
)
def test_told_run_does_not_wait_for_ever(one_mpi: Mpi, why: str, long_job: Path, tmp_path: Path) -> None:
    """Rank 1 hangs in a forward soon after the first results; who cannot wait so long ends without it."""
    output, twice = tmp_path / "out", why == "told twice"
    options = ["--set", "parallel.stages=2", "--set", f"stop.drain_limit_s={DRAIN_S if twice else 1}", *SLOWLY]
    command = ["python", FAULTY_RANK, 1, 130, 1000, "run", long_job, "--output", output, *options]
    with World(one_mpi, 2, command) as world:
        world.wait_until(lambda: journaled(output), START_S)
        kept = journaled(output)
        os.kill(world.ranks()[0], signal.SIGTERM)
        os.kill(world.ranks()[0], signal.SIGTERM)  # at once: the same, delivered twice
        if twice:
            time.sleep(1.5)
            assert not world.ended
            os.kill(world.ranks()[0], signal.SIGTERM)
        run = world.wait(END_S)
    assert run.returncode == INTERRUPTED, run.stderr
    assert "mpinfer: interrupted on rank 0" in run.stderr
    assert why in run.stderr
    assert verify(one_mpi, output) == (False, journaled(output))
    assert journaled(output) >= kept


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_run_that_loads_ends_at_once(one_mpi: Mpi, number: signal.Signals, long_job: Path, tmp_path: Path) -> None:
    """All ranks are told; one speaks."""
    output = tmp_path / "out"
    with World(one_mpi, 2, ["mpinfer", "run", long_job, "--output", output]) as world:
        world.wait_until((output / "journal.jsonl").exists, START_S)
        for pid in world.ranks().values():
            os.kill(pid, number)
        run = world.wait(END_S)
    assert run.returncode == INTERRUPTED, run.stderr
    assert run.stderr.count("nothing was in hand; --resume continues the run") == 1
    assert verify(one_mpi, output) == (False, 0)
    assert state(output) in ("starting", "interrupted")  # if there was time to say so
