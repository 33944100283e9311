"""Whether all nodes see the same model: a cheap fingerprint of its files, taken once a node.

Names and sizes of all files, and what is in the small ones (the configuration, the index of the weights). Weights of
equal size but other numbers are not told apart: that would mean to read them all.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpinfer.errors import LaunchError

_SMALL_BYTES = 2**20
_SHOWN = 3  # names in a message

Files = dict[str, str]  # name to what is known of the file


def model_files(path: str) -> Files:
    """The files of a model directory, or the one file; empty where nothing is. Hidden ones and notes do not count."""
    root = Path(path)
    if root.is_file():
        return {root.name: _fingerprint(root)}
    if not root.is_dir():
        return {}
    files = sorted(file for file in root.iterdir() if file.is_file())
    return {file.name: _fingerprint(file) for file in files if not file.name.startswith(".") and file.suffix != ".md"}


def digest(files: Files) -> str:
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()


def check_copies(path: str, by_node: Mapping[str, Files]) -> None:
    """Hold the files of all nodes against those of the first. Raises `LaunchError`."""
    first, *others = by_node
    for node in others:
        ours, theirs = by_node[first], by_node[node]
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if different:
            what = f"{_list(different)} differ" if theirs else "there is nothing"
            raise LaunchError(
                f"model.path={path}: not the same on all nodes: on {node} {what}, compared to {first}; copy the "
                "model to every node, or put it on a file system that they share"
            )


def _fingerprint(file: Path) -> str:
    size = file.stat().st_size
    return f"{size} {hashlib.sha256(file.read_bytes()).hexdigest() if size <= _SMALL_BYTES else ''}"


def _list(names: Sequence[str]) -> str:
    more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*names[:_SHOWN], *more])
