"""Every command in the documents is one that its program takes, and every file in them is one that its reader takes.

Nothing is run here: `tests/mpi/test_document_commands.py` does that.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from documents import (
    DOCUMENTS,
    EXIT_CODES,
    ILLUSTRATED,
    LANGUAGES,
    NOT_RUN,
    REPO,
    Block,
    blocks,
    calls,
    name_of,
    prose_commands,
)

from mpinfer.cli import parse
from mpinfer.cluster.describe import load_cluster
from mpinfer.experiments.strategies import load_matrix
from mpinfer.spec import load_spec

FENCED = [(block.document, command) for block in blocks("sh") for command in block.commands]
COMMANDS = [*FENCED, *prose_commands()]
TITLES = {block.title for block in blocks()}
NAMES = [[name] for name in ("completion", "launch", "plan", "run", "sbatch", "top", "verify")]  # alone, in prose
PLACEHOLDERS = {"JOB.yaml", "job.yaml"}

_HELP = """
import runpy, sys
sys.path.insert(0, "benchmarks")
for script in sys.argv[1:]:
    print("=====", script)
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
"""


def test_every_fence_is_of_a_kind_that_is_checked() -> None:
    assert not [block for block in blocks() if block.language not in LANGUAGES]
    assert len(blocks()) * 2 == sum(path.read_text().count("```") for path in DOCUMENTS), "a fence is not understood"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_stand_in_fences_of_sh(path: Path) -> None:
    """Neither in what commands print, nor indented, where nothing finds them."""
    programs = r"(\$ |(mpinfer|mpirun|mpiexec|srun|sbatch|python3?|pip|bash|source) )"
    printed = "\n".join(block.text for block in blocks("text") if block.document == name_of(path))
    assert not re.findall(rf"^\s*{programs}.*", printed, re.MULTILINE)
    assert not re.findall(rf"^ {{4,}}{programs}.*", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_exceptions_are_in_a_document() -> None:
    assert {*NOT_RUN, *EXIT_CODES} <= {command for _, command in FENCED}


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: f"{block.document}:{block.line}")
def test_shell_is_bash(block: Block) -> None:
    assert subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_mpinfer_takes_the_command(document: str, command: str, tmp_path: Path) -> None:
    for program, *words in calls(command):
        if program != "mpinfer" or "--help" in words or words in NAMES:
            continue
        arguments = parse([re.sub("^[A-Z]$", "1", word) for word in words])  # -n N
        if "job" in arguments and arguments.job not in PLACEHOLDERS:
            job = titled(document, arguments.job, tmp_path) or REPO / arguments.job
            load_spec(job, arguments.overrides)


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_scripts_are_there(document: str, command: str) -> None:
    for words in calls(command):
        for word in words:
            if re.search(r"\w\.(py|sh|sbatch)$", word) and "/" in word:
                assert (REPO / word).exists()


def test_benchmarks_take_their_options() -> None:
    """Those with options: their --help, in one process, which loads torch once."""
    asked: dict[str, set[str]] = {}
    for _, command in COMMANDS:
        for words in calls(command):
            script = next((word for word in words[:2] if word.startswith("benchmarks/") and word.endswith(".py")), None)
            if script:
                asked.setdefault(script, set()).update(word for word in words if word.startswith("--"))
    parsing = [script for script in asked if "argparse" in (REPO / script).read_text(encoding="utf-8")]
    assert not [script for script, options in asked.items() if options and script not in parsing]
    shown = subprocess.run([sys.executable, "-c", _HELP, *parsing], capture_output=True, text=True, cwd=REPO)
    assert shown.returncode == 0, shown.stderr
    helps = dict(zip(parsing, re.split("^=====.*\n", shown.stdout, flags=re.MULTILINE)[1:], strict=True))
    assert not [(script, option) for script in parsing for option in asked[script] if option not in helps[script]]


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: f"{block.document}:{block.line}")
def test_yaml_is_a_job_a_cluster_or_a_matrix(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "block.yaml"
    path.write_text(block.text, encoding="utf-8")
    tree = yaml.safe_load(block.text)
    if "nodes" in tree:
        load_cluster(path, sum(group["count"] * group["ranks"] for group in tree["nodes"]))
    elif "strategies" in tree:
        load_matrix(str(path))
    else:
        load_spec(path)


@pytest.mark.parametrize("block", blocks("json"), ids=lambda block: f"{block.document}:{block.line}")
def test_json_is_a_value_a_line(block: Block) -> None:
    assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{block.document}:{block.line}")
def test_python_is_a_file_that_a_command_runs(block: Block) -> None:
    """Or, where it shows the shape of code, at least Python."""
    ast.parse(block.text)
    if block.document not in ILLUSTRATED:
        stem = Path(block.title).stem
        assert stem
        files = [other.text for other in blocks("sh", "yaml") if other.document == block.document]
        assert any(re.search(rf"\b{stem}(\.py|:)", text) for text in files), "nothing runs it"


def titled(document: str, name: str, directory: Path) -> Path | None:
    """The file that a block of the document is, written into a directory."""
    for block in blocks():
        if (block.document, block.title) == (document, name):
            (directory / name).write_text(block.text, encoding="utf-8")
            return directory / name
    return None
