"""Power is lost at any moment of a run: what had reached the disk is enough to go on from, and claims no more.

The calls of a run alone (the program of `test_injected.py`) are traced, and what a disk may hold after each of them is
laid out: contents as of the last fsync of a file, names as of the last fsync of their directory, or either of them as
the run saw it, since a disk may be ahead of what it was asked for.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from test_injected import PROGRAM, state

from mpinfer.records.manifest import verify

TRACED = "openat,read,write,lseek,fsync,rename,unlink,ftruncate,mkdir,close"
LINE = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)")
QUOTED = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="no strace: install it to trace a run")

Image = tuple[tuple[str, bytes | None], ...]
"""What a disk holds: contents by name; None for a directory."""


@dataclass(eq=False)
class Node:
    """A file, or where `data` is None a directory."""

    data: bytearray | None
    durable: bytes = b""  # contents, by the last fsync
    names: dict[str, "Node"] = field(default_factory=dict)
    durable_names: dict[str, "Node"] = field(default_factory=dict)

    def sync(self) -> None:
        self.durable, self.durable_names = bytes(self.data or b""), dict(self.names)


class Disk:
    """Replays calls below one directory."""

    def __init__(self, root: Path) -> None:
        self._root_path, self._root = root, Node(None)
        self._open: dict[int, list] = {}  # by descriptor: node, position, whether at the end always

    def images(self) -> set[Image]:
        """What it may hold if power is lost now."""
        return {
            tuple(sorted(self._walk(self._root, "", names, contents)))
            for names in ("durable_names", "names")
            for contents in ("durable", "data")
        }

    def apply(self, call: str, arguments: str, result: int) -> bool:
        """Whether anything changed, on the disk or in what it still has to write."""
        if result < 0:
            return False
        if call in ("openat", "mkdir", "unlink", "rename"):
            paths = [text.decode() for text in _texts(arguments)]
            return self._opened(paths[0], arguments, result) if call == "openat" else self._renamed(call, paths)
        number = int(arguments.split(",")[0])
        if number not in self._open:
            return False
        node, position, appends = self._open[number]
        match call:
            case "close":
                del self._open[number]
                return False
            case "read":
                self._open[number][1] = position + result
                return False
            case "lseek":
                self._open[number][1] = result
                return False
            case "fsync":
                node.sync()
            case "ftruncate":
                size = int(arguments.split(",")[1])
                node.data[:] = node.data[:size].ljust(size, b"\0")
            case "write":
                [written] = _texts(arguments)
                position = len(node.data) if appends else position
                node.data[position : position + result] = written[:result]
                self._open[number][1] = position + result
        return True

    def _opened(self, path: str, flags: str, number: int) -> bool:
        place = self._place(path)
        if place is None:
            return False
        directory, name = place
        node = directory.names.get(name) if name else directory
        created = node is None
        if node is None:
            node = directory.names[name] = Node(bytearray())
        if "O_TRUNC" in flags:
            node.data = bytearray()
        self._open[number] = [node, 0, "O_APPEND" in flags]
        return created or "O_TRUNC" in flags

    def _renamed(self, call: str, paths: list[str]) -> bool:
        places = [self._place(path) for path in paths]
        if None in places:
            return False
        (directory, name), *target = [place for place in places if place]
        if call == "mkdir":
            directory.names[name] = Node(None)
        else:
            node = directory.names.pop(name)
            for other, new in target:
                other.names[new] = node
        return True

    def _place(self, path: str) -> tuple[Node, str] | None:
        """The directory that a path lies in, and its name there; the root's name is empty."""
        if Path(path) == self._root_path:
            return self._root, ""
        if not Path(path).is_relative_to(self._root_path):
            return None
        *parents, name = Path(path).relative_to(self._root_path).parts
        node = self._root
        for parent in parents:
            node = node.names[parent]
        return node, name

    def _walk(self, node: Node, path: str, names: str, contents: str) -> Iterator[tuple[str, bytes | None]]:
        for name, child in getattr(node, names).items():
            if child.data is None:
                yield f"{path}{name}", None
                yield from self._walk(child, f"{path}{name}/", names, contents)
            else:
                yield f"{path}{name}", bytes(getattr(child, contents))


def _texts(arguments: str) -> list[bytes]:
    return [bytes.fromhex(text.replace("\\x", "")) for text in QUOTED.findall(arguments)]


def run(directory: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(directory)], check=True, timeout=60)


def test_what_is_on_the_disk_is_enough(tmp_path: Path) -> None:
    (tmp_path / "traced").mkdir()
    directory, trace = tmp_path / "traced/out", tmp_path / "trace"
    strace = ["strace", "-f", "-xx", "-s", "1000000", "-o", str(trace), "-e", f"trace={TRACED}"]
    subprocess.run([*strace, sys.executable, "-c", PROGRAM, str(directory)], check=True, timeout=60)
    unbroken = state(directory)
    disk, images = Disk(directory.parent), {}
    for line in trace.read_text().splitlines():
        if (found := LINE.match(line)) and disk.apply(found[1], found[2], int(found[3])):
            latest = disk.images()
            images.update(dict.fromkeys(latest, line[:200]))
    assert len(images) > 20
    [last] = latest
    assert dict(last) == {"out": None, "out/arrays": None} | {
        f"out/{path.relative_to(directory)}": path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }, "once a run has ended, all of it is on the disk"
    complete = 0
    for number, (image, line) in enumerate(images.items()):
        root = tmp_path / str(number)
        root.mkdir()
        for name, data in image:
            (root / name).mkdir() if data is None else (root / name).write_bytes(data)
        claimed = (root / "out").is_dir() and verify(root / "out").complete
        assert not claimed or state(root / "out") == unbroken, line
        complete += claimed
        run(root / "out")
        assert state(root / "out") == unbroken, line
        assert verify(root / "out").complete
    assert 0 < complete < len(images)
