"""The files of an output directory: their names, and writing one so that it is either whole or absent."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mpinfer.errors import OutputError

JOURNAL = "journal.jsonl"
RESULTS = "results.jsonl"
MANIFEST = "manifest.json"
TIMING, TIMELINE, TRACE, REPORT, STATUS = "timing.json", "timeline.json", "trace.json", "report.html", "status.json"


def write_atomically(path: Path, data: bytes | Iterable[bytes], durable: bool = True) -> None:
    """Write `data` to `path`: after a crash the file is the whole old one, the whole new one, or absent.

    When this returns, the content and the name are durable; with `durable` off they wait for the system, and only a
    crash of this process, not of the machine, leaves the file whole. Raises `OutputError` when the file cannot be
    written; the file at `path` is then as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with output_errors(path):
            with open(temporary, "wb", opener=open_private) as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
            if durable:
                sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def open_private(path: str | Path, flags: int) -> int:
    """For `open`: what a run writes is for its user's eyes, whatever the umask, until that user shares it."""
    return os.open(path, flags, 0o600)


def encode_json(entry: dict[str, Any]) -> bytes:
    """JSON in one line, without its end. Raises `ValueError` for NaN and infinities, which JSON does not have."""
    try:
        return json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, as "\ud83d" in an input id: only escaped is it UTF-8
        return json.dumps(entry, allow_nan=False).encode()


def write_all(fd: int, data: bytes) -> None:
    """Write every byte at the descriptor's position; raises `OSError`."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def make_directory(directory: Path) -> None:
    """Where there is none, a private one; its name and those of the parents it needs are durable. Raises `OSError`."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in missing:
        with suppress(PermissionError):  # one may write in directories that one may not read, which syncing asks for
            sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable; raises `OSError`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems keep names durable by themselves and know no fsync of a directory.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of an output directory; None when it is absent or not a JSON object."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` from the block into an `OutputError` about `path`."""
    try:
        yield
    except OSError as error:
        raise output_error(path, error) from error


def output_error(path: Path, error: BaseException) -> OutputError:
    """The one line for a read or a write of `path` that failed."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free some space and run again with --resume"
    else:
        fix = "correct that and run again with --resume, or choose another output.path"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return OutputError(f"{path}: cannot be read or written ({reason}); {fix}")
