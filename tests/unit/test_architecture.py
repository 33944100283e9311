"""The walls of the house: which room imports which, and who may import MPI, torch and other heavy libraries."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]

# A room may import itself, the rooms of its row, and what those may import.
ROWS: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "directories": set(),
    "spec": {"errors"},
    "schema": {"spec"},
    "completion": set(),
    "plugins": {"errors"},
    "cluster": {"spec", "plan", "directories"},
    "plan": {"spec"},
    "observe": {"spec", "plan"},
    "records": {"spec", "plugins"},
    "models": {"spec", "plan", "plugins", "directories"},
    "transport": {"spec", "plan"},
    "pipeline": {"models", "transport", "observe"},
    "generate": {"pipeline", "records"},
    "forward": {"pipeline", "records"},
    "engine": {"generate", "forward"},
    "coordinator": {"records", "transport", "observe"},
    "preview": {"cluster", "engine"},
    "world": {"cluster", "transport", "version"},
    "layout": {"preview", "world", "version"},
    "job": {"layout", "coordinator"},
    "api": {"job"},
    "bench": {"world", "pipeline"},
    "experiments": {"preview"},
    "cli": {"job", "bench", "experiments", "schema", "completion"},
    "__init__": {"version", "api"},
    "__main__": {"cli"},
}
WITHOUT_TORCH_AND_MPI = {
    "errors",
    "version",
    "directories",
    "spec",
    "schema",
    "completion",
    "plugins",
    "cluster",
    "plan",
    "records",
}
WITHOUT_TORCH = {"generate/scheduler.py"}
NEVER_AT_TOP_LEVEL = {"transformers", "matplotlib", "accelerate", "gguf", "PIL", "soundfile", "pyarrow"}


@dataclass(frozen=True)
class Import:
    file: Path  # below mpinfer/
    line: int
    name: str  # with the package it comes from, as in torch.nn
    top_level: bool  # happens when the module is imported
    for_types: bool  # below `if TYPE_CHECKING`

    @property
    def room(self) -> str:
        return self.file.parts[0].removesuffix(".py")

    @property
    def package(self) -> str:
        return self.name.split(".")[0]

    def __str__(self) -> str:
        return f"mpinfer/{self.file}:{self.line} imports {self.name}"


class _Walk(ast.NodeVisitor):
    def __init__(self, file: Path) -> None:
        self._file, self._functions, self._for_types = file, 0, False
        self.found: list[Import] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"mpinfer/{self._file}:{node.lineno}: imports are absolute here"
        for alias in node.names:
            self._add(node, f"{node.module}.{alias.name}")

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        outside = self._for_types
        self._for_types = outside or ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body:
            self.visit(statement)
        self._for_types = outside
        for statement in node.orelse:
            self.visit(statement)

    def _add(self, node: ast.stmt, name: str) -> None:
        self.found.append(Import(self._file, node.lineno, name, not self._functions, self._for_types))


def imports_of(source: str, file: Path) -> list[Import]:
    walk = _Walk(file)
    walk.visit(ast.parse(source))
    return walk.found


def imports() -> Iterator[Import]:
    for path in sorted((REPO / "mpinfer").rglob("*.py")):
        yield from imports_of(path.read_text(encoding="utf-8"), path.relative_to(REPO / "mpinfer"))


def allowed(room: str) -> set[str]:
    return {room}.union(*map(allowed, ROWS[room]))


def test_every_room_has_a_row_and_every_row_a_room() -> None:
    rooms = {
        path.stem for path in (REPO / "mpinfer").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms == ROWS.keys()


def test_imports_go_down_or_stay_in_the_room() -> None:
    """Those for type checkers too: an annotation that names a higher room is a wish to call it."""
    within = [found for found in imports() if found.package == "mpinfer"]
    assert len(within) > 50
    assert not [str(found) for found in within if found.name.split(".")[1] not in allowed(found.room)]


def test_only_transport_imports_mpi4py_and_what_is_measured_beside_it() -> None:
    importing = {found.room for found in imports() if found.package == "mpi4py" and not found.for_types}
    assert importing == {"transport", "bench"}


def test_geometry_and_bookkeeping_import_neither_torch_nor_mpi() -> None:
    pure = [found for found in imports() if found.room in WITHOUT_TORCH_AND_MPI and not found.for_types]
    assert not [str(found) for found in pure if found.package in ("torch", "mpi4py")]
    torchless = [found for found in imports() if str(found.file) in WITHOUT_TORCH and not found.for_types]
    assert torchless
    assert not [str(found) for found in torchless if found.package == "torch"]


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    at_once = [found for found in imports() if found.top_level and not found.for_types]
    assert not [str(found) for found in at_once if found.package in NEVER_AT_TOP_LEVEL]


@pytest.mark.parametrize(
    "module", ["mpinfer", "mpinfer.job", "mpinfer.api", "mpinfer.preview", "mpinfer.generate.scheduler"]
)
def test_is_imported_without_torch_and_numpy(module: str) -> None:
    """A run binds its threads before the math libraries load, and refuses bad input without waiting for them."""
    program = (
        "import sys; from unittest.mock import MagicMock; sys.modules['mpi4py'] = MagicMock(); "
        f"import {module}; print(sorted({{'torch', 'numpy', 'transformers'}} & sys.modules.keys()))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPO)
    assert answer.stdout == "[]\n"


def test_contributing_shows_these_rows() -> None:
    shown = {}
    for line in (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\| `mpinfer/(\w+)(?:/|\.py)` \| .* \| ([^|]*) \|", line):
            shown[match[1]] = set(re.findall(r"\w+", match[2])) - {"nothing"}
    assert shown == {room: row for room, row in ROWS.items() if not room.startswith("__")}


def test_the_walk_tells_kinds_of_import_apart() -> None:
    source = """
import torch.nn
from mpinfer import spec
if TYPE_CHECKING:
    from mpinfer.job import World
else:
    import numpy
try:
    import gguf
except ImportError:
    pass
async def f():
    if True:
        import transformers
"""
    found = {(i.name, i.top_level, i.for_types) for i in imports_of(source, Path("plan/x.py"))}
    assert found == {
        ("torch.nn", True, False),
        ("mpinfer.spec", True, False),
        ("mpinfer.job.World", True, True),
        ("numpy", True, False),
        ("gguf", True, False),
        ("transformers", False, False),
    }
