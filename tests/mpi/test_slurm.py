"""Batch scripts and runs under Slurm, over nodes that are network namespaces of this machine (`slurm_lab.py`)."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import (
    NEAR_TIE,
    REPO,
    Mpi,
    Tiny,
    complete_run,
    eventually,
    mpirun,
    own_cache,
    read_jsonl,
    read_timing,
    write_jsonl,
)
from slurm_lab import SlurmLab, missing
from test_network import surroundings

NODES = ["node1", "node2", "node3", "node4"]
PMI = {"openmpi": "pmix", "mpich": "pmi2"}
COPIED = sorted((REPO / "slurm").glob("*.sbatch"))
END_S = 30
LONG = 4  # times the small job's records
WATCHDOG_S = 4
LEFT_S = 5  # for ranks to end, behind the watchdog
pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmLab]:
    with SlurmLab(len(NODES)) as up:
        yield up


class Job:
    """A job that a command gave to Slurm, from a directory; as a context, until it has ended."""

    def __init__(self, slurm: SlurmLab, directory: Path, command: Sequence[Any]) -> None:
        self._slurm, self._directory = slurm, directory
        self._scratch = tempfile.TemporaryDirectory(prefix="job-")
        own = {"TMPDIR": self._scratch.name, **own_cache(Path(self._scratch.name))}
        environ = {**os.environ, **slurm.environ, **own}
        for name in ("OMP_NUM_THREADS", "HYDRA_LAUNCHER", "HYDRA_LAUNCHER_EXEC"):  # Hydra is to use Slurm, too
            environ.pop(name, None)
        told = subprocess.run(slurm.command(command), cwd=directory, env=environ, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        self.number = told.stdout.split()[-1]  # Submitted batch job 4711

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self._slurm.do("scancel", "--quiet", self.number)
        assert eventually(lambda: self._ended, END_S)
        self._scratch.cleanup()

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self._directory.glob("*.out")))

    def exit_codes(self, timeout_s: float = 200) -> list[str]:
        """Of the job, or of each task of an array, once they are through: "0:0", or with the signal that ended it."""
        assert eventually(lambda: self._ended, timeout_s), self.log
        return [task["ExitCode"] for task in self._slurm.tasks(self.number)]

    @property
    def _ended(self) -> bool:
        return all(task["JobState"] in ("COMPLETED", "FAILED", "CANCELLED") for task in self._slurm.tasks(self.number))


def sbatch(mpi: Mpi, job: Path, *options: Any) -> list[Any]:
    return [mpi.bin_dir / "mpinfer", "sbatch", job, "--time", "10", *options, "--submit"]


def test_batch_script_over_four_nodes_gives_the_results_of_one(
    slurm: SlurmLab, mpi: Mpi, tiny: Tiny, run_layout: Callable[..., Path], tmp_path: Path
) -> None:
    layout = ["--set", "parallel.replicas=2", "--set", "parallel.stages=2"]
    nodes = ["--nodes", 4, "--ntasks-per-node", 1, "--cpus-per-task", 2]
    with Job(slurm, tmp_path, sbatch(mpi, tiny.job, *nodes, *layout, "--output", "results")) as job:
        assert job.exit_codes() == ["0:0"], job.log
    assert "nodes 4, launcher Slurm srun" in job.log
    assert [rank["host"] for rank in read_timing(tmp_path / "results")["ranks"]] == NODES
    assert json.loads((tmp_path / "results/manifest.json").read_text())["complete"] is True
    results = (tmp_path / "results/results.jsonl").read_bytes()
    assert results == (run_layout(mpi, 2, 2) / "results.jsonl").read_bytes()


def test_batch_script_with_srun_passes_the_exit_code_on(slurm: SlurmLab, mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    """Though srun ends the other ranks with the first one that leaves."""
    options = ["--nodes", 4, "--ntasks-per-node", 2, "--set", "model.path=not/there", "--output", "results"]
    with Job(slurm, tmp_path, sbatch(mpi, tiny.job, *options)) as job:
        assert job.exit_codes() == ["2:0"], job.log
        assert "mpinfer: error: model.path=not/there: no such directory" in job.log


def test_batch_script_with_mpirun_passes_the_exit_code_on(
    slurm: SlurmLab, mpi: Mpi, tiny: Tiny, tmp_path: Path
) -> None:
    records = write_jsonl(tmp_path / "records.jsonl", [{"token_ids": [1, 2]}, {"token_ids": [10**6]}])
    options = ["--nodes", 2, "--ntasks-per-node", 1, "--launcher", "mpirun", "--set", f"input.path={records}"]
    with Job(slurm, tmp_path, sbatch(mpi, tiny.job, *options, "--output", "results")) as job:
        assert job.exit_codes() == ["1:0"], job.log
    assert "nodes 2, launcher" in job.log
    assert "launcher Slurm" not in job.log
    assert ["error" in result for result in read_jsonl(tmp_path / "results/results.jsonl")] == [False, True]


def test_array_shares_the_input_out(
    slurm: SlurmLab, one_mpi: Mpi, tiny: Tiny, run_layout: Callable[..., Path], tmp_path: Path
) -> None:
    options = ["--nodes", 1, "--ntasks-per-node", 1, "--array", 2]
    with Job(slurm, tmp_path, sbatch(one_mpi, tiny.job, *options, "--output", "results")) as job:
        assert job.exit_codes() == ["0:0", "0:0"], job.log
    parts = [read_jsonl(tmp_path / "results" / part / "results.jsonl") for part in "12"]
    assert all(parts)
    whole = read_jsonl(run_layout(one_mpi, 2, 2) / "results.jsonl")
    assert [(r["id"], r["output"]) for part in parts for r in part] == [(r["id"], r["output"]) for r in whole]


def test_cluster_leaves_nothing(tmp_path: Path) -> None:
    """Though a job runs when it is taken down, and a node is off."""
    before = surroundings()
    with SlurmLab(2) as slurm:
        slurm.do("sbatch", "--nodelist=node1", f"--output={tmp_path}/out", "--wrap=hostname; srun sleep 1000")
        assert eventually(lambda: (tmp_path / "out").exists() and (tmp_path / "out").read_text(), END_S)
        slurm.power_off("node2")
        assert surroundings() != before
    assert surroundings() == before


@pytest.mark.parametrize("script", COPIED, ids=lambda path: path.name)
def test_slurm_takes_the_scripts_to_copy(slurm: SlurmLab, script: Path) -> None:
    command = slurm.command(["sbatch", "--test-only", script])
    told = subprocess.run(command, env={**os.environ, **slurm.environ}, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not (REPO / "models/smollm2-135m").is_dir(), reason="no models/smollm2-135m")
@pytest.mark.parametrize("script", COPIED, ids=lambda path: path.name)
def test_scripts_to_copy_run_as_they_are(slurm: SlurmLab, tmp_path: Path, script: Path) -> None:
    for name in (".venv", "jobs", "models"):
        (tmp_path / name).symlink_to(REPO / name)
    some = ["--array=1-2%1"] if script.name == "array.sbatch" else []
    with Job(slurm, tmp_path, ["sbatch", *some, script]) as job:
        codes = job.exit_codes(timeout_s=800)
    if script.name == "gpu_nodes.sbatch":
        assert codes == ["2:0"]
        assert "model.device=cuda: torch sees no GPU on this node" in job.log
        return
    assert set(codes) == {"0:0"}, job.log
    outputs = [tmp_path / "out/quickstart" / part for part in ("12" if some else [""])]
    done = [result["id"] for output in outputs for result in read_jsonl(output / "results.jsonl")]
    prompts = [record["id"] for record in read_jsonl(REPO / "jobs/data/prompts.jsonl")]
    assert done == prompts[: len(done)]
    assert some or len(done) == len(prompts)


class LongJob(Job):
    """A job that requeues itself; many steps of little work: half a minute."""

    def __init__(
        self, slurm: SlurmLab, mpi: Mpi, tiny: Tiny, directory: Path, *options: Any, times: int = LONG
    ) -> None:
        self.output, self._mpi, self._job = directory / "results", mpi, tiny.job
        # None comes near a tie: every layout gives the same bytes.
        sure = [
            prompt for prompt, made in zip(tiny.prompts, tiny.references, strict=True) if min(made.margins) > NEAR_TIE
        ]
        self.total = len(sure) * times
        self._input = f"input.path={write_jsonl(directory / 'records.jsonl', [{'token_ids': p} for p in sure * times])}"
        keys = ["parallel.micro_batch=1", "generate.step_tokens=1", self._input]
        overrides = [word for key in keys for word in ("--set", key)]
        nodes = ["--nodes", 2, "--ntasks-per-node", 1, "--requeue", "--output", "results"]
        super().__init__(slurm, directory, sbatch(mpi, tiny.job, *nodes, *overrides, *options))

    def assert_complete(self, kept: int) -> None:
        """To the byte what an unbroken run gives, each result computed once and those that were kept not again."""
        assert 0 < kept < self.total
        assert read_timing(self.output)["records"] <= self.total - kept
        assert (self.output / "journal.jsonl").read_bytes().count(b"\n") == 1 + self.total
        unbroken = complete_run(self._mpi, 2, self._job, self.output.with_name("unbroken"), self._input)
        assert (self.output / "results.jsonl").read_bytes() == (unbroken / "results.jsonl").read_bytes()

    @property
    def results(self) -> int:
        journal = self.output / "journal.jsonl"
        return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0

    def disturb(self, command: str) -> None:
        """Run a command in the middle of a run, with the job's number."""
        self.wait_until(lambda: self.results)
        self._slurm.do(*command.format(self.number).split())

    def is_again(self) -> bool:
        """Whether it was requeued, and has not yet brought new results: ranks take seconds to start."""
        [task] = self._slurm.tasks(self.number)
        return int(task["Restarts"]) > 0 and task["JobState"] in ("PENDING", "RUNNING")

    def wait_until(self, condition: Callable[[], Any]) -> None:
        assert eventually(condition, 120), self.log


@pytest.mark.slow
@pytest.mark.parametrize("command", ["scontrol requeue {}", "scancel --signal=USR1 {}", "scancel --signal=KILL {}.0"])
def test_broken_job_is_requeued_and_goes_on(
    slurm: SlurmLab, mpi: Mpi, tiny: Tiny, tmp_path: Path, command: str
) -> None:
    with LongJob(slurm, mpi, tiny, tmp_path) as job:
        job.disturb(command)
        job.wait_until(job.is_again)
        kept = job.results
        assert job.exit_codes() == ["0:0"], job.log
    job.assert_complete(kept)
    assert ("records done; --resume goes on" in job.log) is ("KILL" not in command)


@pytest.mark.slow
def test_warned_mpirun_leaves_in_order(slurm: SlurmLab, mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    with LongJob(slurm, mpi, tiny, tmp_path, "--launcher", "mpirun") as job:
        job.disturb("scancel --batch --signal=USR1 {}")
        job.wait_until(job.is_again)
        kept = job.results
        assert job.exit_codes() == ["0:0"], job.log
    job.assert_complete(kept)
    assert "records done; --resume goes on" in job.log


@pytest.mark.slow
def test_cancelled_job_is_not_requeued(slurm: SlurmLab, one_mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    with LongJob(slurm, one_mpi, tiny, tmp_path) as job:
        job.disturb("scancel {}")
        job.exit_codes()
        [task] = slurm.tasks(job.number)
    assert (task["JobState"], task["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.slow
def test_preempted_job_leaves_in_order_and_goes_on(slurm: SlurmLab, mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    with LongJob(slurm, mpi, tiny, tmp_path) as job:
        job.wait_until(lambda: job.results)
        started = time.monotonic()
        slurm.do("srun", "--partition=urgent", "--nodes=4", "--exclusive", "--time=1", "true")
        ended_s = time.monotonic() - started
        kept = job.results
        assert job.exit_codes() == ["0:0"], job.log
        assert int(slurm.tasks(job.number)[0]["Restarts"]) == 1
    print(f"\n{mpi.name}: preempted, the other job through after {ended_s:.1f} s")
    job.assert_complete(kept)
    assert "records done; --resume goes on" in job.log


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_job_that_meets_its_time_limit_is_requeued_and_goes_on(
    slurm: SlurmLab, mpi: Mpi, tiny: Tiny, tmp_path: Path
) -> None:
    """Slurm warns some seconds before the end of the minute, as the script asks, and looks at limits every half."""
    with LongJob(slurm, mpi, tiny, tmp_path, "--time", "1", times=6 * LONG) as job:
        job.wait_until(lambda: job.results and job.is_again())
        kept = job.results
        assert job.exit_codes(timeout_s=400) == ["0:0"], job.log
        restarts = int(slurm.tasks(job.number)[0]["Restarts"])
    print(f"\n{mpi.name}: {kept} of {job.total} records within the first limit, {restarts} restarts")
    assert "records done; --resume goes on" in job.log
    job.assert_complete(kept)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_job_outlives_a_node_that_vanishes(mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    """With a stage on it. The ranks that are left end by the watchdog; Slurm or the script requeues the job, on other
    nodes, once Slurm's own timeouts are over."""
    options = ["--set", "parallel.stages=2", "--set", f"watchdog.timeout_s={WATCHDOG_S}"]
    with SlurmLab(3) as slurm, LongJob(slurm, mpi, tiny, tmp_path, *options) as job:
        job.wait_until(lambda: job.results)
        [lost] = {"node1", "node2"} - {slurm.tasks(job.number)[0]["BatchHost"]}
        slurm.power_off(lost)
        begun = time.monotonic()
        assert eventually(lambda: "nothing has moved" in job.log, WATCHDOG_S + LEFT_S), job.log
        told_s = time.monotonic() - begun
        job.wait_until(job.is_again)
        requeued_s = time.monotonic() - begun
        kept = job.results
        assert job.exit_codes() == ["0:0"], job.log
    print(f"\n{mpi.name}: a node vanished, told after {told_s:.1f} s, the job queued again after {requeued_s:.1f} s")
    job.assert_complete(kept)


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
