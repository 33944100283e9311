"""Every command in a fenced block of the documents is run, but those for which `tests/documents.py` has a reason."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from documents import EXIT_CODES, NOT_RUN, REPO, SLOW, Block, run_commands, stories
from harness import Mpi, mpirun

# What a checkout has at its top and commands read; what they write stays in the scratch directory.
_READ = ("benchmarks", "docs", "jobs", "launch", "mpinfer", "pyproject.toml", "slurm")
_OPENMPI = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # the documents have a core for each rank


@pytest.mark.parametrize("story", stories().values(), ids=list(stories()))
def test_commands_of_a_document_work_in_order(one_mpi: Mpi, chatty: Path, story: list[Block], tmp_path: Path) -> None:
    """As after the quickstart, with a small model in the place of SmolLM2."""
    for name in _READ:
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / ".venv").symlink_to(one_mpi.bin_dir.parent)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/smollm2-135m").symlink_to(chatty)
    script = ["set -euo pipefail"]
    for block in story:
        if block.title:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        script += [f": {block.document}:{block.line}", *map(expected, run_commands(block))]
    path = f"{one_mpi.bin_dir}:{os.environ['PATH']}"
    ran = mpirun(one_mpi, None, ["/bin/bash", "-xc", "\n".join(script)], 200, tmp_path, {**_OPENMPI, "PATH": path})
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"


def expected(command: str) -> str:
    """The command, which goes on where it ends as its document says."""
    code = EXIT_CODES.get(command)
    return f"{command} || [[ $? == {code} ]]" if code else command


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_commands_that_take_minutes_work_in_a_fresh_checkout(tmp_path: Path) -> None:
    """They install and fetch: in the order of the table, which begins with the quickstart."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in files.rstrip("\0").split("\0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, tmp_path / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in (command for command, why in NOT_RUN.items() if why == SLOW):
        if "make_venv.sh" in command:  # which leaves alone what an earlier command has made
            shutil.rmtree(tmp_path / ".venv")
        ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
