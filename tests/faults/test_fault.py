"""A rank that dies or raises takes the world with it, at once; the run goes on where it was."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import FAULTY_RANK, Mpi, World, complete_run, mpirun, read_jsonl, read_timing

END_S = 5  # a broken world has to be gone after this
START_S = 120  # until the first results: imports, mostly
SLOWLY = ("--set", "parallel.micro_batch=1", "--set", "parallel.in_flight=2", "--set", "generate.step_tokens=1")


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_killed_rank(
    mpi: Mpi, victim: int, long_job: Path, unbroken: bytes, tmp_path: Path, sample: Callable[[bool], None]
) -> None:
    sample((mpi.name, victim) in [("openmpi", 0), ("mpich", 3)])
    output, total = tmp_path / "out", len(unbroken.splitlines())
    with World(
        mpi, 4, ["mpinfer", "run", long_job, "--output", output, "--set", "parallel.stages=2", *SLOWLY]
    ) as world:
        world.wait_until(lambda: journaled(output), START_S)
        os.kill(world.ranks()[victim], signal.SIGKILL)
        assert world.wait(END_S).returncode != 0
    kept = journaled(output)
    assert 0 < kept < total
    assert verify(mpi, output) == (False, kept)

    complete_run(mpi, 2, long_job, output, "parallel.stages=2", resume=True)
    assert read_timing(output)["records"] == total - kept, "what was done is not done again"
    assert (output / "results.jsonl").read_bytes() == unbroken
    assert [result["index"] for result in read_jsonl(output / "results.jsonl")] == list(range(total))
    assert journaled(output) == total, "each result is kept once"
    assert verify(mpi, output) == (True, total)

    begun = time.monotonic()
    again = mpirun(mpi, None, ["mpinfer", "run", long_job, "--output", output, "--resume"])
    assert again.returncode == 0, again.stderr
    assert "already complete" in again.stderr
    assert time.monotonic() - begun < 5
    assert (output / "results.jsonl").read_bytes() == unbroken


@pytest.mark.parametrize("culprit", [0, 1])
def test_raising_rank(mpi: Mpi, culprit: int, long_job: Path, tmp_path: Path, sample: Callable[[bool], None]) -> None:
    sample((mpi.name, culprit) in [("openmpi", 0), ("mpich", 1)])
    options = ["run", long_job, "--output", tmp_path / "out", "--set", "parallel.stages=2", *SLOWLY]
    run = mpirun(mpi, 2, ["python", FAULTY_RANK, culprit, 50, "raise", *options], timeout_s=START_S)
    ended = time.time()
    assert run.returncode != 0
    place = f"rank {culprit} node {socket.gethostname()} replica 0 stage {culprit}"
    assert len(re.findall(f"mpinfer: fatal on {place}", run.stderr)) == 1
    assert run.stderr.count("mpinfer: fatal") == 1
    assert "Traceback (most recent call last)" in run.stderr
    [raised] = re.findall(r"^RuntimeError: injected at ([0-9.]+)$", run.stderr, re.MULTILINE)
    assert ended - float(raised) < END_S
    assert verify(mpi, tmp_path / "out")[0] is False


def test_rank_0_that_cannot_write_takes_the_world_with_it(
    mpi: Mpi, long_job: Path, tmp_path: Path, sample: Callable[[bool], None]
) -> None:
    """The others would wait for it."""
    sample(mpi.name == "openmpi")
    output = tmp_path / "out"
    options = ["run", long_job, "--output", output, "--set", "parallel.stages=2", *SLOWLY]
    with World(mpi, 2, ["python", FAULTY_RANK, 0, 50, "full", *options]) as world:
        run = world.wait(START_S)
    assert run.returncode == 3, run.stderr
    where = f"rank 0 node {socket.gethostname()} replica 0 stage 0 shard 0"
    problem = "journal.jsonl: cannot be read or written (File too large); correct that and run again"
    assert f"mpinfer: fatal on {where}: {output}/{problem}" in run.stderr
    assert "nothing has moved" not in run.stderr
    assert verify(mpi, output) == (False, journaled(output))
    assert state(output) in ("starting", "running")  # it could not write that either


def journaled(output: Path) -> int:
    """Results that the journal holds, in whole lines; the first line is its header."""
    journal = output / "journal.jsonl"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def state(output: Path) -> str:
    """What `status.json` says last."""
    return json.loads((output / "status.json").read_text())["state"]


def verify(mpi: Mpi, output: Path) -> tuple[bool, int]:
    """What `mpinfer verify` says: whether the run is complete, and of how many records."""
    verified = mpirun(mpi, None, ["mpinfer", "verify", output])
    verdict = json.loads(verified.stdout.splitlines()[-1])
    assert (verified.returncode == 0) == verdict["complete"]
    return verdict["complete"], verdict["records"]
