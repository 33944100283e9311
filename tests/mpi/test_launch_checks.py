"""Ranks that do not fit together are refused at the start, with their names and the fix."""

import shutil
from pathlib import Path

from harness import Mpi, Tiny, mpirun

# Rank 1 is another one: of another version, or on a node with a model of its own.
OTHER_VERSION = "import mpinfer.version; mpinfer.version.VERSION = '0.0.9'"
OTHER_NODE = "import os, socket; os.chdir('other'); socket.gethostname = lambda: 'other'"
PROGRAM = """
import os, sys
if "1" in (os.environ.get("OMPI_COMM_WORLD_RANK"), os.environ.get("PMI_RANK")):
    {difference}
from mpinfer.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_mixed_versions_are_refused(mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    program = ["python", "-c", PROGRAM.format(difference=OTHER_VERSION)]
    run = mpirun(mpi, 2, [*program, "run", tiny.job, "--output", tmp_path / "out"])
    assert run.returncode == 2, run.stderr
    [line] = [line for line in run.stderr.splitlines() if "mpinfer: error: " in line]
    assert "error: mpinfer differs between ranks: 0.1.0 on rank 0 of " in line
    assert ", 0.0.9 on rank 1 of " in line
    assert not (tmp_path / "out").exists()


def test_mixed_versions_do_not_keep_doctor_from_its_report(one_mpi: Mpi) -> None:
    run = mpirun(one_mpi, 2, ["python", "-c", PROGRAM.format(difference=OTHER_VERSION), "doctor"])
    assert run.returncode == 0, run.stderr
    assert "warning: mpinfer differs between ranks: 0.1.0 on rank 0 of " in run.stdout


def test_another_model_on_another_node_is_refused(mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    for model in (tmp_path / "model", tmp_path / "other/model"):
        shutil.copytree(tiny.model, model)
    with (tmp_path / "other/model/config.json").open("a") as config:
        config.write("\n")
    program = ["python", "-c", PROGRAM.format(difference=OTHER_NODE)]
    job = ["run", tiny.job, "--set", "model.path=model", "--output", "out"]
    run = mpirun(mpi, 2, [*program, *job], cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    [line] = [line for line in run.stderr.splitlines() if "mpinfer: error: " in line]
    assert "model.path=model: not the same on all nodes: on other config.json differ, compared to " in line
    assert "Traceback" not in run.stderr
