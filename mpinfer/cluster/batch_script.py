"""Batch scripts that run a job under Slurm, PBS or LSF: text, made without MPI and torch.

A script always resumes: on a fresh output directory that just starts, and whoever starts the script again (a user, the
scheduler after a node failed, the script itself) goes on where the last run was. The exit code of the run is the job's.
"""

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mpinfer.errors import LaunchError, SpecError
from mpinfer.spec import JobSpec, StopSpec

System = Literal["slurm", "pbs", "lsf"]
StepLauncher = Literal["srun", "mpirun"]
SUBMIT = {"slurm": "sbatch", "pbs": "qsub", "lsf": "bsub"}  # each takes a script on its standard input

_WARNING_S = 120  # before the time limit, for ranks to finish what they have begun; Slurm may be up to a minute early
_MOST_RESTARTS = 20  # by the script itself: a job that fails at each start must end

# Slurm's: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<a>\d+)(?::(?P<b>\d\d?))?(?::(?P<c>\d\d?))?", re.ASCII)


@dataclass(frozen=True)
class Batch:
    """A job, and what it asks of the scheduler. Raises `SpecError` for what no scheduler can give."""

    command: tuple[str, ...]  # that made the script, for its first comment
    job: str  # path of the job file
    spec: JobSpec
    nodes: int
    tasks_per_node: int
    overrides: tuple[str, ...] = ()  # key.path=value
    output: str | None = None  # None: the job file's
    bin_dir: str = ".venv/bin"  # where mpinfer is; relative to the directory that the job is submitted from
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    time: str | None = None  # as Slurm writes it
    partition: str | None = None  # or queue
    account: str | None = None  # or project
    array: int | None = None  # parts of the input, each a task of its own
    requeue: bool = False  # after a fault and an interruption, too
    launcher: StepLauncher | None = None  # None: srun under Slurm, else mpirun
    mpi: str | None = None  # srun's --mpi; None leaves it to the site's default
    system: System = "slurm"

    def __post_init__(self) -> None:
        for flag in ("nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "array"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise SpecError(f"{_flag(flag)} {value}: must be at least 1; raise it")
        for flag in ("partition", "account", "mpi"):
            value = getattr(self, flag)
            if value is not None and not re.fullmatch(r"[\w.,:+@-]+", value):
                raise SpecError(f"{_flag(flag)} {value!r}: must be a name without spaces or quotes; correct it")
        if any(not text.isprintable() for text in self.command):
            raise SpecError(
                f"{shlex.join(self.command)!r}: has a character that cannot stand in the script's first comment, such "
                "as a line break; rename the file, or put the value into the job file"
            )
        if self.time is not None:
            time_limit_s(self.time)
        if self.array is not None:
            _check_lines(self.spec)
        if self.system != "slurm" and self.launcher == "srun":
            raise SpecError(f"--launcher srun --system {self.system}: srun is Slurm's; leave out --launcher")
        if self.mpi is not None and self.step_launcher != "srun":
            raise SpecError(f"--mpi {self.mpi}: is for srun, and mpirun knows its own; leave it out")
        if self.system == "pbs" and self.requeue:
            raise SpecError(
                "--requeue --system pbs: a PBS job may seldom requeue itself; leave it out, and submit the same script "
                "again after exit code 3 or 4: it resumes"
            )

    @property
    def step_launcher(self) -> StepLauncher:
        return self.launcher or ("srun" if self.system == "slurm" else "mpirun")

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def cores_per_node(self) -> int:
        return self.tasks_per_node * (self.cpus_per_task or 1)

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.-]+", "-", Path(self.job).stem, flags=re.ASCII)


def batch_script(batch: Batch) -> str:
    """The script, for the scheduler of `batch.system`."""
    return {"slurm": slurm_script, "pbs": pbs_script, "lsf": lsf_script}[batch.system](batch)


def slurm_script(batch: Batch) -> str:
    srun = batch.step_launcher == "srun"
    limit_s = None if batch.time is None else time_limit_s(batch.time)
    warning_s = _WARNING_S if limit_s is None else min(_WARNING_S, limit_s // 4)
    if batch.spec.stop == StopSpec():  # the time that is left is longer than where nobody has told
        drain = f"stop.drain_limit_s={warning_s * 3 // 4}"
        batch = replace(batch, overrides=(drain, *batch.overrides))
    head = _directives(
        "#SBATCH --",
        f"job-name={batch.name}",
        f"nodes={batch.nodes}",
        f"ntasks-per-node={batch.tasks_per_node}",
        batch.cpus_per_task and f"cpus-per-task={batch.cpus_per_task}",
        batch.gpus_per_node and f"gpus-per-node={batch.gpus_per_node}",
        batch.time and f"time={batch.time}",
        batch.partition and f"partition={batch.partition}",
        batch.account and f"account={batch.account}",
        batch.array and f"array=1-{batch.array}",
        f"output=%x-{'%A_%a' if batch.array else '%j'}.out",
        "open-mode=append",
        "requeue",
        f"signal={'' if srun else 'B:'}USR1@{warning_s}",
    )
    run = _srun(batch) if srun else _MPIRUN.format(step=_run(batch, f"mpinfer launch -n {batch.ranks}"))
    output = '"$part"' if batch.array else shlex.quote(batch.spec.output.path)
    requeue = _REQUEUE.format(most=_MOST_RESTARTS, output=output) if batch.requeue else ""
    return _script(batch, head, "SLURM_ARRAY_TASK_ID", run + requeue)


def pbs_script(batch: Batch) -> str:
    gpus = f":ngpus={batch.gpus_per_node}" if batch.gpus_per_node else ""
    head = _directives(
        "#PBS -",
        f"N {batch.name}",
        f"l select={batch.nodes}:ncpus={batch.cores_per_node}:mpiprocs={batch.tasks_per_node}{gpus}",
        batch.time and f"l walltime={_clock(time_limit_s(batch.time), seconds=True)}",
        batch.partition and f"q {batch.partition}",
        batch.account and f"A {batch.account}",
        batch.array and f"J 1-{batch.array}",
        "j oe",
        "r y",
    )
    enter = 'cd "$PBS_O_WORKDIR"\n'
    return _script(batch, head, "PBS_ARRAY_INDEX", _over_hosts(batch, "PBS_NODEFILE"), enter)


def lsf_script(batch: Batch) -> str:
    head = _directives(
        "#BSUB -",
        f"J {shlex.quote(f'{batch.name}[1-{batch.array}]') if batch.array else batch.name}",
        f"n {batch.nodes * batch.cores_per_node}",
        f'R "span[ptile={batch.cores_per_node}]"',
        batch.gpus_per_node and f'gpu "num={batch.gpus_per_node}"',
        batch.time and f"W {_clock(time_limit_s(batch.time), seconds=False)}",
        batch.partition and f"q {batch.partition}",
        batch.account and f"P {batch.account}",
        f"o {batch.name}.{'%J.%I' if batch.array else '%J'}.out",
        "r",
        batch.requeue and 'Q "3 4"',
    )
    return _script(batch, head, "LSB_JOBINDEX", _over_hosts(batch, "LSB_DJOB_HOSTFILE"))


def submit(system: System, script: str) -> int:
    """Hand a script to its scheduler; returns that command's exit code. Raises `LaunchError` where there is none."""
    program = SUBMIT[system]
    if shutil.which(program) is None:
        raise LaunchError(
            f"--submit: no {program} in PATH; submit on a login node of the cluster, or leave --submit out and take "
            "the text there"
        )
    return subprocess.run([program], input=script, text=True, check=False).returncode


def time_limit_s(text: str) -> int:
    """Seconds of a time limit as Slurm writes it. Raises `SpecError`."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise SpecError(
            f"--time {text}: must be minutes, hours:minutes:seconds or days-hours:minutes:seconds; write for example "
            "90, 1:30:00 or 2-12:00:00"
        )
    fields = [int(match[name]) for name in "abc" if match[name] is not None]
    if match["days"] is not None:
        hours, minutes, seconds = [*fields, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *fields, 0], 2: [0, *fields], 3: fields}[len(fields)]
    total_s = int(match["days"] or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
    if total_s == 0:
        raise SpecError(
            f"--time {text}: must be above 0, which some sites take for no limit; leave --time out for that"
        )
    return total_s


_SCRIPT = """\
#!/bin/bash
# {command}
{head}
# What the site needs, such as module load, goes here: before set -u, which few modules bear.
{enter}export PATH={path}:"$PATH"
set -euo pipefail
{part}
status=0
{run}exit "$status"
"""

_SRUN = """\
# mpinfer binds ranks to cores by itself. Before the time is up Slurm sends it USR1: it finishes what has begun, and
# leaves with 4.
srun {mpi}--cpu-bind=none --kill-on-bad-exit=1 \\
    {step} || status=$?
"""

# In the background: Slurm's signal has to reach mpirun by way of the shell, which hears none while it runs a command.
_MPIRUN = """\
trap 'kill -USR1 $!' USR1 # from Slurm, before the time is up: mpinfer finishes what has begun, and leaves with 4
{step} & # with the mpirun of this MPI
wait $! || status=$?
if ((status > 128)); then # it was the signal that ended the wait, not mpirun
    status=0
    wait $! || status=$?
fi
"""

_REQUEUE = """\
# Slurm itself requeues only after a preemption or when a node failed. Above 2 are faults (3), interruptions (4) and
# ranks that were killed; where there is a journal, --resume has something to go on with.
if ((status > 2 && ${{SLURM_RESTART_COUNT:-0}} < {most})) && [[ -s {output}/journal.jsonl ]]; then
    scontrol requeue "$SLURM_JOB_ID" || true # it says why not: Slurm may have done it
fi
"""

# Lines in a row: results that are concatenated are in input order.
_PART = """
# This task's lines of the input, the same at every start, and its own output directory.
part={directory}/"${index}"
mkdir -p {directory}
split -n l/"${index}"/{array} {input} >"$part.tmp"
mv "$part.tmp" "$part.jsonl"
"""


def _script(batch: Batch, head: str, index: str, run: str, enter: str = "") -> str:
    """The parts in order; `index` is the variable with the number of an array's task."""
    here, output = batch.bin_dir, shlex.quote(batch.spec.output.path)
    part = _PART.format(directory=output, index=index, array=batch.array, input=shlex.quote(batch.spec.input.path))
    return _SCRIPT.format(
        command=shlex.join(batch.command),
        head=head,
        enter=enter,
        path=shlex.quote(here) if here.startswith("/") else f'"$PWD"/{shlex.quote(here)}',
        part=part if batch.array else "",
        run=run,
    )


def _directives(prefix: str, *options: str | int | bool | None) -> str:
    return "".join(f"{prefix}{option}\n" for option in options if option)


def _srun(batch: Batch) -> str:
    cpus = f"export SRUN_CPUS_PER_TASK={batch.cpus_per_task} # srun does not take it over from sbatch\n"
    mpi = f"--mpi={batch.mpi} " if batch.mpi else ""
    return (cpus if batch.cpus_per_task else "") + _SRUN.format(mpi=mpi, step=_run(batch, "mpinfer run"))


def _run(batch: Batch, program: str) -> str:
    words = [program, shlex.quote(batch.job), "--resume"]
    words += [word for override in batch.overrides for word in ("--set", shlex.quote(override))]
    if batch.array:
        words += ["--set", '"input.path=$part.jsonl"', "--output", '"$part"']
    elif batch.output is not None:
        words += ["--output", shlex.quote(batch.output)]
    return " ".join(words)


def _over_hosts(batch: Batch, hosts_file: str) -> str:
    """Started on the first host; mpirun starts the others' ranks by ssh."""
    step = _run(batch, f'mpinfer launch -n {batch.ranks} --hosts "$hosts"')
    return f'hosts=$(sort -u "${hosts_file}" | paste -sd, -)\n{step} || status=$?\n'


def _check_lines(spec: JobSpec) -> None:
    """Raises `SpecError` where the input cannot be cut between lines."""
    if spec.input.format in ("jsonl", "openai-batch") or spec.input.path.endswith(".jsonl"):
        return
    raise SpecError(
        f"--array with input.path={spec.input.path}: only the lines of JSONL are shared out; convert it, or leave "
        "--array out and submit a job for each input with --set input.path=... --output DIR"
    )


def _clock(total_s: int, seconds: bool) -> str:
    """Hours:minutes, rounded up, with :seconds where the scheduler takes them."""
    if seconds:
        return f"{total_s // 3600}:{total_s // 60 % 60:02}:{total_s % 60:02}"
    minutes = -(-total_s // 60)
    return f"{minutes // 60}:{minutes % 60:02}"


def _flag(field: str) -> str:
    """The command line's name of a field."""
    return "--" + field.replace("tasks_per_node", "ntasks-per-node").replace("_", "-")
