"""Runs under Slurm, over nodes that are network namespaces of this machine (`slurm_lab.py`)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Mpi, Tiny, mpirun, read_timing
from slurm_lab import SlurmLab, missing

NODES = ["node1", "node2", "node3", "node4"]
PMI = {"openmpi": "pmix", "mpich": "pmi2"}
pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmLab]:
    with SlurmLab(len(NODES)) as up:
        yield up


def test_srun_over_four_nodes_gives_the_results_of_one(
    slurm: SlurmLab, mpi: Mpi, tiny: Tiny, run_layout: Callable[..., Path], tmp_path: Path
) -> None:
    srun = ["srun", "-N", 4, "-n", 4, f"--mpi={PMI[mpi.name]}", "--kill-on-bad-exit=1"]
    job = [mpi.bin_dir / "mpinfer", "run", tiny.job, "--output", tmp_path]
    layout = ["--set", "parallel.replicas=2", "--set", "parallel.stages=2"]
    run = mpirun(mpi, None, slurm.command([*srun, *job, *layout]), env=slurm.environ)
    assert run.returncode == 0, run.stderr
    assert "nodes 4, launcher Slurm srun" in run.stderr
    assert [rank["host"] for rank in read_timing(tmp_path)["ranks"]] == NODES
    assert json.loads((tmp_path / "manifest.json").read_text())["complete"] is True
    results = (tmp_path / "results.jsonl").read_bytes()
    assert results == (run_layout(mpi, 2, 2) / "results.jsonl").read_bytes()


@pytest.mark.parametrize("flags", [[], ["--kill-on-bad-exit=1"]], ids=["plain", "kill"])
def test_srun_that_makes_four_worlds_of_one_is_refused(
    slurm: SlurmLab, mpi: Mpi, tiny: Tiny, tmp_path: Path, flags: list[str]
) -> None:
    srun = ["srun", "-N", 4, "-n", 4, "--mpi=none", *flags]
    job = [mpi.bin_dir / "mpinfer", "run", tiny.job, "--output", tmp_path / "out"]
    run = mpirun(mpi, None, slurm.command([*srun, *job]), env=slurm.environ)
    assert run.returncode in ((2, 143) if flags else (2,)), "143 where srun ended the others"
    assert "Slurm srun started 4 ranks but MPI shows a world of 1" in run.stderr
    assert f"--mpi={PMI[mpi.name]}" in run.stderr
    assert not (tmp_path / "out").exists()
