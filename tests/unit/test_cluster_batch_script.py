import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mpinfer.cli import main
from mpinfer.cluster.batch_script import time_limit_s
from mpinfer.errors import SpecError

REPO = Path(__file__).parents[2]
COPIED = sorted(path for path in (REPO / "slurm").iterdir() if path.suffix != ".md")
NODES = ["--nodes", "2", "--ntasks-per-node", "4"]


class Script:
    """What `mpinfer sbatch` prints, as it does where the package is installed in .venv."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        monkeypatch.chdir(REPO)
        monkeypatch.setattr("sys.executable", str(REPO / ".venv/bin/python"))
        monkeypatch.setattr("mpinfer.cluster.launch.wheel_pmi", lambda: "pmix")

    def __call__(self, *words: str, job: str = "jobs/quickstart.yaml") -> str:
        code = main(["sbatch", job, *words])
        printed = self._capsys.readouterr()
        assert (code, printed.err) == (0, "")
        return printed.out

    def refusal(self, *words: str, job: str = "jobs/quickstart.yaml") -> str:
        assert main(["sbatch", job, *words]) == 2
        printed = self._capsys.readouterr()
        assert printed.out == ""
        return printed.err.removeprefix("mpinfer: error: ").rstrip("\n")


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(capsys, monkeypatch)


@pytest.mark.parametrize("path", COPIED, ids=lambda path: path.name)
def test_scripts_to_copy_are_what_their_first_comment_prints(path: Path, script: Script) -> None:
    text = path.read_text(encoding="utf-8")
    program, command, job, *options = shlex.split(text.splitlines()[1].removeprefix("# "))
    assert (program, command) == ("mpinfer", "sbatch")
    assert text == script(*options, job=job), "remake it with the command of its second line"


@pytest.mark.parametrize("path", COPIED, ids=lambda path: path.name)
def test_scripts_to_copy_are_bash(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


def test_the_readme_has_a_row_for_each() -> None:
    text = (REPO / "slurm/README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[`(.+?)`\]\(\1\) \|", text, re.MULTILINE) == [path.name for path in COPIED]


def test_what_a_user_writes_is_quoted(script: Script, tmp_path: Path) -> None:
    job = tmp_path / "my job; rm.yaml"
    job.write_text("model: {path: m}\ninput: {path: 'a b.jsonl'}\n")
    text = script(*NODES, "--output", "my out", "--set", 'generate.stop=["$x"]', "--requeue", job=str(job))
    assert "#SBATCH --job-name=my-job-rm\n" in text
    assert (
        f"mpinfer run '{job}' --resume --set stop.drain_limit_s=90 --set 'generate.stop=[\"$x\"]' --output 'my out' ||"
        in text
    )
    assert "[[ -s 'my out'/journal.jsonl ]]" in text
    assert subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("status", "restarts", "journal", "requeued"),
    [
        (0, 0, True, False),
        (1, 0, True, False),
        (2, 0, True, False),
        (3, 0, True, True),
        (4, 19, True, True),
        (4, 20, True, False),
        (137, 0, True, True),
        (143, 0, True, True),
        (143, 0, False, False),
    ],
)
def test_requeues_what_a_resume_can_go_on_with(
    script: Script, tmp_path: Path, status: int, restarts: int, journal: bool, requeued: bool
) -> None:
    """By the script itself, with programs in the place of Slurm's."""
    text = script(*NODES, "--requeue", "--output", "out").replace('"$PWD"/.venv/bin', str(tmp_path))
    for name, body in (("srun", f"exit {status}"), ("scontrol", f"echo $* >{tmp_path}/asked; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/journal.jsonl").write_text("header\n" * journal)
    environ = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": str(restarts)}
    assert subprocess.run(["bash"], input=text, text=True, cwd=tmp_path, env=environ).returncode == status
    assert (tmp_path / "asked").exists() is requeued


@pytest.mark.parametrize("status", [0, 1, 2, 4])
def test_with_mpirun_the_signal_is_passed_on_and_the_exit_code_too(script: Script, tmp_path: Path, status: int) -> None:
    text = script(*NODES, "--launcher", "mpirun").replace('"$PWD"/.venv/bin', str(tmp_path))
    waits = f"trap 'exit {status}' USR1; kill -USR1 $PPID; while :; do sleep 0.05; done"
    (tmp_path / "mpinfer").write_text(f"#!/bin/bash\n{waits}\n")
    (tmp_path / "mpinfer").chmod(0o755)
    run = subprocess.run(["bash", "-c", text], env={"PATH": "/usr/bin:/bin"}, cwd=tmp_path, timeout=30)
    assert run.returncode == status


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0", "--ntasks-per-node", "4"], "--nodes 0: must be at least 1; raise it"),
        (["--nodes", "1", "--ntasks-per-node", "-2"], "--ntasks-per-node -2: must be at least 1; raise it"),
        ([*NODES, "--cpus-per-task", "0"], "--cpus-per-task 0: must be at least 1"),
        ([*NODES, "--gpus-per-node", "0"], "--gpus-per-node 0: must be at least 1"),
        ([*NODES, "--array", "0"], "--array 0: must be at least 1"),
        ([*NODES, "--time", "4h"], "--time 4h: must be minutes, hours:minutes:seconds or days-hours"),
        ([*NODES, "--time", "0"], "--time 0: must be above 0"),
        ([*NODES, "--partition", "a b"], "--partition 'a b': must be a name without spaces or quotes; correct it"),
        ([*NODES, "--account", "x\n#SBATCH --exclusive"], "--account 'x\\n#SBATCH --exclusive': must be a name"),
        (
            [*NODES, "--set", "generate.stop=\nrm -r ."],
            "has a character that cannot stand in the script's first comment",
        ),
        (
            [*NODES, "--array", "2", "--set", "input.path=a.csv"],
            "--array with input.path=a.csv: only the lines of JSONL",
        ),
        ([*NODES, "--system", "pbs", "--launcher", "srun"], "--launcher srun --system pbs: srun is Slurm's; leave out"),
        ([*NODES, "--launcher", "mpirun", "--mpi", "pmix"], "--mpi pmix: is for srun, and mpirun knows its own; leave"),
        (
            [*NODES, "--system", "pbs", "--requeue"],
            "--requeue --system pbs: a PBS job may seldom requeue itself; leave",
        ),
        ([*NODES, "--set", "parallel.stages=0"], "parallel.stages=0: must be at least 1; raise it"),
    ],
)
def test_bad_input_is_refused(script: Script, words: list[str], message: str) -> None:
    assert message in script.refusal(*words)


def test_a_described_cluster_gives_its_size(script: Script, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("nodes: [{count: 3, ranks: 2, cores: 9, memory_gb: 8}, {ranks: 2, cores: 9, memory_gb: 64}]\n")
    text = script("--cluster", str(file))
    assert "#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=2\n#SBATCH --cpus-per-task=4\n" in text


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("{ranks: 2, cores: 8, memory_gb: 8}, {ranks: 1, cores: 8, memory_gb: 8}", "nodes differ in ranks or cores: "),
        ("{cores: 8, memory_gb: 8}", "nodes.ranks=auto: a batch script asks for equal nodes"),
        ("", "nodes=[]: must be at least one group"),
    ],
)
def test_a_described_cluster_that_fits_no_script(script: Script, tmp_path: Path, nodes: str, message: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"nodes: [{nodes}]\n")
    assert f"{file}: {message}" in script.refusal("--cluster", str(file))


@pytest.mark.parametrize("words", [[], ["--nodes", "2"], ["--cluster", "c.yaml", *NODES]])
def test_the_size_is_given_in_one_way(script: Script, words: list[str]) -> None:
    assert script.refusal(*words).startswith("sbatch: needs --nodes and --ntasks-per-node, ")


def test_without_a_scheduler_nothing_is_submitted(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert script.refusal(*NODES, "--submit").startswith("--submit: no sbatch in PATH; submit on a login node")


@pytest.mark.parametrize(("system", "program"), [("slurm", "sbatch"), ("pbs", "qsub"), ("lsf", "bsub")])
def test_submits_what_it_would_print(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, program: str
) -> None:
    printed = script(*NODES, "--system", system)
    (tmp_path / program).write_text(f"#!/bin/sh\ncat >{tmp_path}/text\nexit 7\n")
    (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert main(["sbatch", "jobs/quickstart.yaml", *NODES, "--system", system, "--submit"]) == 7
    submitted = (tmp_path / "text").read_text()
    assert submitted.splitlines()[2:] == printed.splitlines()[2:]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-12", 216000), ("2-12:30", 217800), ("2-12:30:15", 217815)],
)
def test_times_are_slurms(text: str, seconds: int) -> None:
    assert time_limit_s(text) == seconds


@pytest.mark.parametrize("text", ["", "-5", "1:2:3:4", "1-", "4.5", "١"])
def test_other_times_are_refused(text: Any) -> None:
    with pytest.raises(SpecError, match="--time"):
        time_limit_s(text)


def test_other_schedulers_get_their_own_times(script: Script) -> None:
    words = [*NODES, "--time", "1-1:00:30"]
    assert "#PBS -l walltime=25:00:30\n" in script(*words, "--system", "pbs")
    assert "#BSUB -W 25:01\n" in script(*words, "--system", "lsf")


@pytest.mark.parametrize(("time", "warning"), [("4", 60), ("1:00:00", 120), (None, 120)])
def test_ranks_are_warned_in_time(script: Script, time: str | None, warning: int) -> None:
    words = [*NODES, *(["--time", time] if time else [])]
    assert f"#SBATCH --signal=USR1@{warning}\n" in script(*words)
    assert f"#SBATCH --signal=B:USR1@{warning}\n" in script(*words, "--launcher", "mpirun")
    assert f" --set stop.drain_limit_s={warning * 3 // 4} " in script(*words)
    assert script(*words, "--set", "stop.drain_limit_s=7").count("drain_limit_s") == 2  # in the command and its copy
