"""Where MPI outlives ranks that die (Open MPI, `mpirun --with-ft ulfm`), the other replicas finish the run."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from harness import Mpi, World, complete_run, find_mpis, read_timing, require
from test_fault import END_S, START_S, journaled, state, verify

RUN_S = 280
# Slow enough to be killed in the midst, quick enough for what is left.
UNHURRIED = ("--set", "parallel.micro_batch=4", "--set", "parallel.in_flight=2", "--set", "generate.step_tokens=8")


@pytest.fixture
def tolerant() -> Mpi:
    """The MPI that outlives ranks."""
    mpi = next((mpi for mpi in find_mpis() if mpi.name == "openmpi"), None)
    if mpi is None:
        pytest.skip("only Open MPI outlives ranks")
    return replace(require(mpi), options=("--with-ft", "ulfm"))


def kill_one(mpi: Mpi, job: Path, output: Path, victim: int, layout: str, wait_s: float) -> tuple[int, str]:
    """Run a job in a layout (replicas x stages x shards) and kill a rank after the first results; how it ends."""
    axes = zip(("replicas", "stages", "shards"), layout.split("x"), strict=True)
    options = [part for axis, count in axes for part in ("--set", f"parallel.{axis}={count}")]
    with World(mpi, 4, ["mpinfer", "run", job, "--output", output, *options, *UNHURRIED]) as world:
        world.wait_until(lambda: journaled(output), START_S)
        os.kill(world.ranks()[victim], signal.SIGKILL)
        run = world.wait(wait_s)
        assert not world.processes()
    return run.returncode, run.stderr


@pytest.mark.timeout(RUN_S + START_S)
@pytest.mark.parametrize(("layout", "victim"), [("4x1x1", 2), ("2x2x1", 3), ("2x2x1", 1), ("2x1x2", 3)])
def test_other_replicas_go_on(
    tolerant: Mpi,
    layout: str,
    victim: int,
    long_job: Path,
    unbroken: bytes,
    tmp_path: Path,
    sample: Callable[[bool], None],
) -> None:
    sample((layout, victim) == ("2x2x1", 1))
    output, total = tmp_path / "out", len(unbroken.splitlines())
    code, stderr = kill_one(tolerant, long_job, output, victim, layout, RUN_S)
    assert code == 0, stderr
    assert stderr.count(f"warning: rank {victim} has died; other replicas take over") == 1
    assert (output / "results.jsonl").read_bytes() == unbroken
    assert journaled(output) == total, "each result is kept once"
    assert verify(tolerant, output) == (True, total)
    timing = read_timing(output)
    assert timing["lost_ranks"] == [victim]
    left = [rank for rank in range(4) if rank != victim]
    assert [account["rank"] for account in timing["ranks"]] == left
    assert [row["rank"] for row in json.loads((output / "timeline.json").read_text())["ranks"]] == left
    assert state(output) == "complete"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "victim", "why"),
    [
        ("2x2x1", 0, "rank 0 has died, and with it who gathers the results"),
        ("1x4x1", 0, "rank 0 has died, and with it who gathers the results"),
        ("1x4x1", 2, "records are left, and no replica to compute them"),
    ],
)
def test_without_rank_0_or_any_replica_the_world_ends(
    tolerant: Mpi, layout: str, victim: int, why: str, long_job: Path, unbroken: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    code, stderr = kill_one(tolerant, long_job, output, victim, layout, END_S)
    assert code != 0
    assert why in stderr
    assert "--resume continues the run" in stderr
    complete_run(tolerant, 2, long_job, output, resume=True)
    assert (output / "results.jsonl").read_bytes() == unbroken
