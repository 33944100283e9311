"""`mpinfer bench JOB.yaml`: from the command line to a laboratory, whose worlds `mpinfer launch`'s means start."""

import os
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from mpinfer.cluster.binding import allowed_cores
from mpinfer.cluster.context import read_context
from mpinfer.cluster.launch import Launcher, find_launcher, launch_command
from mpinfer.errors import ExitCode, LaunchError, SpecError
from mpinfer.experiments.cell import RunFailed, Start
from mpinfer.experiments.laboratory import Experiment, run_laboratory
from mpinfer.experiments.strategies import DEFAULT, Matrix, load_matrix, named
from mpinfer.records.manifest import verify
from mpinfer.spec import AUTO, FAKE, load_spec

_REPEATS = 3


def bench(arguments: Namespace) -> ExitCode:
    """Raises `MpinferError` for what cannot be begun."""
    context = read_context()
    if context.size > 1:
        raise LaunchError(
            f"bench: {context.launcher} has started it on {context.size} ranks, but it starts worlds itself, one after "
            "another; start it once, without a launcher, inside the allocation"
        )
    experiment = experiment_of(arguments)
    hosts = [host for host in arguments.hosts.split(",") if host]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's: as Ctrl-C
    return run_laboratory(experiment, starter(find_launcher(os.environ), arguments.job, hosts))


def experiment_of(arguments: Namespace) -> Experiment:
    """What the command line and the matrix file ask for; the command line has the last word. Raises `SpecError`."""
    a = arguments
    if a.matrix is not None:
        matrix, strategies = load_matrix(a.matrix)
    else:
        names = DEFAULT if a.strategies is None else [name for name in a.strategies.split(",") if name]
        strategies = named(names)
        matrix = Matrix(tuple(strategy.name for strategy in strategies))
    ranks = matrix.ranks if a.ranks is None else _numbers(a.ranks)
    if not ranks:
        raise SpecError("bench: needs numbers of ranks; give -n, for example -n 1,2,4, or ranks in the matrix file")
    repeats = (_REPEATS if matrix.repeats == AUTO else matrix.repeats) if a.repeats is None else a.repeats
    if repeats < 1:
        raise SpecError(f"--repeats {repeats}: must be at least 1; raise it")
    overrides = [*a.overrides, *([f"model.weights={FAKE}"] if a.fake_weights else [])]
    reference = (None if matrix.reference == AUTO else matrix.reference) if a.reference is None else a.reference
    output = a.output or f"{load_spec(a.job, overrides).output.path}-bench"
    return Experiment(
        command=shlex.join(["mpinfer", *a.words]),
        job=a.job,
        overrides=tuple(overrides),
        strategies=strategies,
        ranks=tuple(sorted(set(ranks))),
        repeats=repeats,
        reference=reference,
        weak=a.weak or matrix.weak,
        output=Path(output),
    )


def starter(launcher: Launcher, job: str, hosts: Sequence[str]) -> Start:
    """Starts `mpinfer run` in worlds, and waits for their end. What they print goes to a file beside the output."""

    def start(ranks: int, overrides: Sequence[str], directory: Path) -> None:
        program = [sys.executable, "-m", "mpinfer", "run", job, "--output", str(directory)]
        program += [part for override in overrides for part in ("--set", override)]
        command, environment = launch_command(
            launcher, ranks, hosts, program, cores=len(allowed_cores()), root=os.geteuid() == 0
        )
        log = directory.with_name(directory.name + ".log")
        with log.open("wb") as printed:
            world = subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed
            )
            try:
                code = world.wait()
            except KeyboardInterrupt:
                world.terminate()
                world.wait()
                raise
        if not verify(directory).complete:  # launchers may rewrite exit codes
            raise RunFailed(_reason(log) or f"ended with exit code {code}; {log} has what it printed")

    return start


def _reason(log: Path) -> str:
    """The one line that says why a run failed; "" where there is none."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        for mark in ("mpinfer: error: ", "mpinfer: fatal "):
            if mark in line:
                return line.partition(mark)[2]
    return ""


def _numbers(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise SpecError(f"-n {text}: must be numbers of ranks of at least 1, with commas between; write -n 1,2,4")
    return tuple(map(int, numbers))
