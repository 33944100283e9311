"""Folders of images or sounds: a file is a record."""

import hashlib
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mpinfer.errors import InputError
from mpinfer.records.files import encode_json
from mpinfer.spec import InputFormat

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


class FolderInput:
    """The files of a folder and of the folders in it that have one of some suffixes, in the order of their names.

    A record's id is its path below the folder. Their contents are not read here: names, sizes and times of change tell
    one input from another. Raises `InputError` when there is none.
    """

    def __init__(self, path: Path, field: str, suffixes: Sequence[str]) -> None:
        self._field, self._folder = field, path if path.is_dir() else path.parent
        self.refused: dict[int, str] = {}
        self._lengths = array("q")
        digest = hashlib.sha256()
        with _read_errors(path):
            self.ids = sorted(files_below(path, suffixes)) if path.is_dir() else [path.name]
            for name in self.ids:
                status = os.stat(f"{self._folder}/{name}")
                self._lengths.append(status.st_size)
                digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        if not self.ids:
            raise InputError(f"input.path={path}: the folder holds no {field} ({', '.join(suffixes)}); give another")
        self.sha256 = digest.hexdigest()
        self.total_bytes = sum(self._lengths)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Sequence[int]:
        return self._lengths

    def line(self, index: int) -> bytes:
        return encode_json({"id": self.ids[index], self._field: str(self._folder / self.ids[index])})

    source = line

    def close(self) -> None:
        """Nothing is open."""


def holds(path: Path, formats: Mapping[str, InputFormat]) -> set[InputFormat]:
    """Which formats, by suffix, the files of a folder have. Raises `InputError` when it cannot be read."""
    with _read_errors(path):
        return {formats[os.path.splitext(name)[1].lower()] for name in files_below(path, tuple(formats))}


def files_below(folder: Path, suffixes: Sequence[str], below: str = "") -> Iterator[str]:
    """Paths below the folder, in no order; hidden files and folders are left out. Raises `OSError`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from files_below(folder / entry.name, suffixes, f"{below}{entry.name}/")
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                yield below + entry.name


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"input.path={path}: {error.filename or path} cannot be read ({error.strerror or error}); make it readable"
        ) from error
