"""A world in which nothing moves explains itself and ends; the run goes on where it was."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import FAULTY_RANK, Mpi, World, complete_run, eventually, mpirun, read_timing
from lab import Lab, missing
from test_fault import END_S, SLOWLY, START_S, journaled, verify

TIMEOUT_S = 4
WATCHED = ("--set", f"watchdog.timeout_s={TIMEOUT_S}")
FAULT = 3
needs_lab = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("victim", [0, 1])
def test_stopped_rank(
    mpi: Mpi, victim: int, long_job: Path, unbroken: bytes, tmp_path: Path, sample: Callable[[bool], None]
) -> None:
    """Each waits for the other, and only one can tell."""
    sample((mpi.name, victim) == ("openmpi", 1))
    output = tmp_path / "out"
    options = ["--output", output, "--set", "parallel.stages=2", *SLOWLY, *WATCHED]
    with World(mpi, 2, ["mpinfer", "run", long_job, *options]) as world:
        world.wait_until(lambda: journaled(output), START_S)
        os.kill(world.ranks()[victim], signal.SIGSTOP)
        stopped = time.monotonic()
        run = world.wait(TIMEOUT_S + END_S)
    assert time.monotonic() - stopped > TIMEOUT_S
    assert run.returncode == FAULT, run.stderr
    other = 1 - victim
    assert re.search(rf"nothing has moved for [4-9]\.\d s .* rank {other} node \S+ replica 0 stage {other}", run.stderr)
    assert re.search(rf"waiting for channel from rank {victim} to rank {other}, tag \d", run.stderr)
    assert re.search(rf"rank {victim} is silent for \d+\.\d s", run.stderr)
    assert "in wait_until\n" in run.stderr, "the stack of the one that waits"
    kept = journaled(output)
    assert verify(mpi, output) == (False, kept)
    complete_run(mpi, 2, long_job, output, "parallel.stages=2", resume=True)
    assert (output / "results.jsonl").read_bytes() == unbroken


def test_slow_rank_is_not_a_hung_one(one_mpi: Mpi, long_job: Path, tmp_path: Path) -> None:
    """Each step takes most of the time that nothing may move for, and not on the processor."""
    few_steps = {"generate.max_new_tokens": 6, "generate.step_tokens": 4096, "parallel.micro_batch": 100}
    keys = {"watchdog.timeout_s": 2, "parallel.stages": 2, "parallel.in_flight": 2, **few_steps}
    options = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    command = ["python", FAULTY_RANK, 1, 0, 0.9, "run", long_job, "--output", tmp_path / "out", *options]
    run = mpirun(one_mpi, 2, command, timeout_s=START_S)
    assert run.returncode == 0, run.stderr
    assert read_timing(tmp_path / "out")["wall_s"] > 4


@pytest.mark.slow
def test_hung_rank_is_named(one_mpi: Mpi, long_job: Path, tmp_path: Path) -> None:
    options = ["run", long_job, "--output", tmp_path / "out", "--set", "parallel.stages=2", *SLOWLY, *WATCHED]
    run = mpirun(one_mpi, 2, ["python", FAULTY_RANK, 1, 20, 1000, *options], timeout_s=START_S)
    assert run.returncode == FAULT, run.stderr
    assert "rank 1 does not get on: computing" in run.stderr
    assert "in faulty\n" in run.stderr, "the stack of the one that hangs"


def test_killed_shard(mpi: Mpi, long_job: Path, tmp_path: Path) -> None:
    """The other waits for it in a sum."""
    output = tmp_path / "out"
    options = ["--output", output, "--set", "parallel.shards=2", *SLOWLY]
    with World(mpi, 2, ["mpinfer", "run", long_job, *options]) as world:
        world.wait_until(lambda: journaled(output), START_S)
        os.kill(world.ranks()[1], signal.SIGKILL)
        assert world.wait(END_S).returncode != 0
    assert verify(mpi, output) == (False, journaled(output))


@needs_lab
def test_cut_link(mpi: Mpi, long_job: Path, unbroken: bytes, tmp_path: Path, sample: Callable[[bool], None]) -> None:
    """No abort reaches the other host: the ranks of each end by themselves."""
    sample(mpi.name == "openmpi")
    output = tmp_path / "out"
    options = ["--output", output, "--set", "parallel.stages=2", *SLOWLY, *WATCHED]
    launch = [mpi.bin_dir / "mpinfer", "launch", "-n", 2, "--hosts", "h1,h2", long_job, *options]
    with Lab(["h1", "h2"]) as lab, World(mpi, None, lab.command("h1", launch), env=lab.environ) as world:
        world.wait_until(lambda: journaled(output), START_S)
        ranks = world.ranks().values()
        lab.cut("h2")
        cut = time.monotonic()
        assert eventually(lambda: not set(ranks) & world.processes().keys(), TIMEOUT_S + END_S)
        ended_s = time.monotonic() - cut
        told = world.stderr
    print(f"\n{mpi.name}: a link cut, all ranks ended after {ended_s:.1f} s, mpiexec {world.launcher.returncode}")
    assert re.search(r"rank 1 is silent for \d+\.\d s", told), told
    kept = journaled(output)
    assert verify(mpi, output) == (False, kept)
    complete_run(mpi, 2, long_job, output, "parallel.stages=2", resume=True)
    assert (output / "results.jsonl").read_bytes() == unbroken


@pytest.mark.slow
def test_rank_stopped_while_loading(one_mpi: Mpi, long_job: Path, tmp_path: Path) -> None:
    """Before the loop all may take ten times as long."""
    output = tmp_path / "out"
    options = ["--output", output, "--set", "watchdog.timeout_s=1"]
    with World(one_mpi, 2, ["mpinfer", "run", long_job, *options]) as world:
        world.wait_until((output / "journal.jsonl").exists, START_S)
        os.kill(world.ranks()[1], signal.SIGSTOP)
        run = world.wait(10 + 2 * END_S)
    assert run.returncode == FAULT, run.stderr
    assert "rank 0 node" in run.stderr
    assert "waiting for all other ranks" in run.stderr
    assert re.search(r"rank 1 is silent for 1\d\.\d s", run.stderr)


@pytest.mark.slow
def test_stopped_replica_does_not_end_a_run_that_gets_on(one_mpi: Mpi, long_job: Path, tmp_path: Path) -> None:
    """Its records are done by the other, within more than the time that nothing may move for."""
    output = tmp_path / "out"
    keys = ("--set", "parallel.replicas=2", "--set", "watchdog.timeout_s=2", *SLOWLY)
    with World(one_mpi, 2, ["mpinfer", "run", long_job, "--output", output, *keys]) as world:
        world.wait_until(lambda: journaled(output), START_S)
        os.kill(world.ranks()[1], signal.SIGSTOP)
        stopped = time.monotonic()
        run = world.wait(START_S)
    assert time.monotonic() - stopped > 4
    assert "no word of rank 1" in run.stderr
    assert verify(one_mpi, output)[0] is True
