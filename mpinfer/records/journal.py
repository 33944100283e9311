"""The journal: every result made durable as it comes, so that a killed run goes on where it was.

A line is the CRC-32 of its JSON in 8 hex digits, a space, the JSON. The first line is the header: what the
results belong to. Every other line is one result, in the order of arrival.
"""

import errno
import fcntl
import json
import logging
import os
import threading
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mpinfer.errors import OutputError
from mpinfer.records.files import (
    JOURNAL,
    MANIFEST,
    RESULTS,
    encode_json,
    make_directory,
    open_private,
    output_error,
    output_errors,
    read_manifest,
    sync_directory,
    write_all,
)

FORMAT = 1
SYNC_RESULTS = 64  # results that wait for one fsync,
SYNC_INTERVAL_S = 1.0  # and the longest that one of them waits

_CRC_BYTES = 8
_T = TypeVar("_T")
_READ_BYTES = 1 << 12  # at a time, of a line of unknown length
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run got, by its journal."""

    results: int
    failed: int
    total: int


class Done(Set[int]):
    """Indices of records with a result, and where its line in the journal begins: behind the header, so never at 0. In
    5 bytes a record, of which the high one is not touched before the journal is 4 GB long."""

    def __init__(self, records: int) -> None:
        self._low, self._high = array("I", [0]) * records, bytearray(records)
        self._count = 0

    @classmethod
    def _from_iterable(cls, it: Iterable[_T]) -> set[_T]:
        """What set operations make."""
        return set(it)

    def enter(self, index: int, offset: int) -> None:
        """For one that is not yet in."""
        self._count += 1
        self._high[index], self._low[index] = divmod(offset, 1 << 32)

    def offset(self, index: int) -> int:
        return (self._high[index] << 32) + self._low[index]

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and 0 <= index < len(self._low) and self.offset(index) > 0

    def __iter__(self) -> Iterator[int]:
        return (index for index in range(len(self._low)) if self.offset(index))

    def __len__(self) -> int:
        return self._count


class Journal:
    """Append-only, checksummed, fsynced file of results: what makes a killed run resumable.

    A lock on the file keeps other runs out until `close`. A thread of its own writes and fsyncs, so that
    `append` does not wait for the disk; when it fails, every later `append`, `flush` and `close` says so.
    """

    done: "Done"  # indices of records with a result, from earlier runs and from this one
    errors: int  # how many of those results are errors
    identity: dict[str, Any]
    input_sha256: str
    complete: bool  # whether the directory's manifest says that the run is over

    @classmethod
    def open(
        cls,
        directory: Path,
        identity: dict[str, Any],
        input_sha256: str,
        ids: Sequence[str | int],
        resume: bool,
    ) -> "Journal":
        """Start the journal of a run, or with `resume` go on with the one that is there, if there is one.

        `ids` are the records' ids by index. A torn tail, left by a crash, is cut off. Raises `OutputError`
        when the directory cannot be used, belongs to another run or job, or its journal is damaged.
        """
        directory = Path(directory)
        path = directory / JOURNAL
        with output_errors(path):
            if directory.exists() and not directory.is_dir():
                raise OutputError(f"{directory}: is not a directory; choose another output.path")
            make_directory(directory)
            if not path.exists():
                _refuse_lost_journal(directory)
            fd = open_private(path, os.O_RDWR | os.O_CREAT)
            try:
                _lock(fd, directory)
                if not resume and _holds_results(directory):
                    raise OutputError(
                        f"{directory}: holds {_kind_of_run(directory)}; "
                        "use --resume to continue it or choose another output.path"
                    )
                if not resume:
                    os.ftruncate(fd, 0)  # a run that ended before its first result left nothing to lose
                return cls(fd, directory, identity, input_sha256, ids)
            except BaseException:
                os.close(fd)
                raise

    def __init__(
        self,
        fd: int,
        directory: Path,
        identity: dict[str, Any],
        input_sha256: str,
        ids: Sequence[str | int],
    ) -> None:
        """Take over a locked descriptor; `open` is the way in."""
        self.identity = json.loads(json.dumps(identity))  # as it will be read back
        self.input_sha256 = input_sha256
        self.done = Done(len(ids))
        self.errors = 0
        self.complete = _is_complete(directory)
        self._fd = fd
        self._directory = directory
        self._path = directory / JOURNAL
        self._ids = ids
        self._end = self._recover()  # where the next line will go
        self._durable = self._end  # what the disk surely has ends here

        self._pending: list[bytes] = []
        self._hurry = False
        self._closed = False
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._writer = threading.Thread(target=self._write_behind, name="journal", daemon=True)
        self._writer.start()

    def append(self, result: dict[str, Any]) -> None:
        """Take a result; it is durable soon. The first result of a record wins, later ones are ignored.

        Raises `OutputError` when this or an earlier result could not be written, `ValueError` when the result
        is not one of this run or not JSON.
        """
        problem = self._problem(result)
        if problem is not None:
            raise ValueError(problem)
        line = _encode(result)
        with self._changed:
            self._check_usable()
            if result["index"] in self.done:
                return
            self._enter(result, self._end)
            self._end += len(line)
            self._pending.append(line)
            if len(self._pending) in (1, SYNC_RESULTS):  # what the writer waits for; others need not wake it
                self._changed.notify_all()

    def flush(self) -> None:
        """Wait until every result is durable. Raises `OutputError` when one cannot be."""
        with self._changed:
            self._check_usable()
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._durable == self._end or self._failure is not None)
            self._hurry = False
            self._check_usable()

    def results_in_order(self) -> Iterator[bytes]:
        """Results as JSON without a line end, by index. Only before `close`; raises `OutputError`."""
        self.flush()
        for index in self.done:
            with output_errors(self._path):
                payload = _decode(self._line(self.done.offset(index)))
            if payload is None:
                raise OutputError(
                    f"{self._path}: the result of record {index} was damaged after it was written; "
                    "check the file system, then run again with --resume"
                )
            yield payload

    def _line(self, offset: int) -> bytes:
        """The line that begins there, or what is left of it."""
        line = b""
        while not line.endswith(b"\n"):
            piece = os.pread(self._fd, max(_READ_BYTES, len(line)), offset + len(line))
            line += piece[: piece.find(b"\n") + 1] or piece
            if not piece:
                break
        return line

    def close(self) -> None:
        """Make every result durable and release the lock. Raises `OutputError` when one could not be."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self._writer.join()
            with output_errors(self._path):
                os.close(self._fd)

    def _write_behind(self) -> None:
        """The writer thread: batches to the disk until the journal is closed or a write fails."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if not self._pending:
                    return
                self._changed.wait_for(lambda: len(self._pending) >= SYNC_RESULTS or self._hurry, SYNC_INTERVAL_S)
                batch, self._pending = b"".join(self._pending), []
            try:
                write_all(self._fd, batch)
                os.fsync(self._fd)
            except Exception as error:
                # Nothing may follow a torn line, and a failed fsync cannot be repeated: this is the end.
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._durable += len(batch)
                self._changed.notify_all()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise output_error(self._path, self._failure) from self._failure
        if self._closed:
            raise ValueError("the journal is closed")

    def _problem(self, result: dict[str, Any]) -> str | None:
        """Why a result cannot be one of this run."""
        index = result["index"]
        if not 0 <= index < len(self._ids):
            return f"result for record {index}, but there are {len(self._ids)}"
        if result["id"] != self._ids[index]:
            return f"result for record {index} with id {result['id']!r}, not {self._ids[index]!r}"
        if ("output" in result) == ("error" in result):
            return f"result for record {index} without exactly one of output and error"
        return None

    def _enter(self, result: dict[str, Any], offset: int) -> None:
        self.done.enter(result["index"], offset)
        self.errors += "error" in result

    def _recover(self) -> int:
        """Enter what the file holds, cut off a torn tail, write a missing header; the offset of the end."""
        header = _encode(
            {
                "journal": FORMAT,
                "identity": self.identity,
                "input_sha256": self.input_sha256,
                "count": len(self._ids),
            }
        )
        with open(self._fd, "rb", closefd=False) as file:
            torn = file.readline()
            # A run killed while it wrote the header left a part of it. Anything else is not ours to cut.
            fresh = header.startswith(torn) and torn != header
            end = 0 if fresh else self._read(file)
        os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)
        if fresh:
            write_all(self._fd, header)
            end = len(header)
        os.fsync(self._fd)
        sync_directory(self._directory)
        return end

    def _read(self, file: BinaryIO) -> int:
        """Enter the results of a journal; the offset where its good lines end."""
        end = 0
        bad_number = 0
        for number, offset, payload, length in _lines(file):
            if payload is None:
                bad_number = bad_number or number
                if number == 1:
                    raise OutputError(
                        f"{self._path}: line 1 is not the header of a journal, so what the results belong to is "
                        "unknown; choose another output.path"
                    )
            elif bad_number:
                raise OutputError(
                    f"{self._path}: line {bad_number} is damaged but good lines follow, so it is no torn tail; "
                    f"restore the file, or keep only its first {bad_number - 1} lines and resume again"
                )
            else:
                if number == 1:
                    self._match(json.loads(payload))
                else:
                    self._reenter(json.loads(payload), number, offset)
                end = offset + length
        return end

    def _match(self, header: dict[str, Any]) -> None:
        """Raise unless the journal was begun for this job and this input."""
        if header.get("journal") != FORMAT:
            raise OutputError(
                f"{self._path}: journal format {header.get('journal')!r} is not {FORMAT}, the one of this version; "
                "resume with the version that began the run, or choose another output.path"
            )
        for key in {**self.identity, **header["identity"]}:
            now, then = (
                repr(identity[key]) if key in identity else "absent" for identity in (self.identity, header["identity"])
            )
            if now != then:
                raise OutputError(
                    f"{self._directory}: cannot resume, {key} is {now} but the run was begun with {then}; "
                    "set it back or choose another output.path"
                )
        if header["input_sha256"] != self.input_sha256:
            raise OutputError(
                f"{self._directory}: cannot resume, the input file changed (sha256 {self.input_sha256}, the run was "
                f"begun with {header['input_sha256']}); restore the input or choose another output.path"
            )

    def _reenter(self, result: dict[str, Any], number: int, offset: int) -> None:
        problem = self._problem(result)
        if problem is not None:
            raise OutputError(f"{self._path}: line {number} is a {problem}; choose another output.path")
        if result["index"] not in self.done:
            self._enter(result, offset)


def read_progress(directory: Path) -> Progress | None:
    """How far the run in a directory got; None without a readable journal. Neither writes nor locks.

    Raises `OSError`.
    """
    try:
        file = (directory / JOURNAL).open("rb")
    except FileNotFoundError:
        return None
    with file:
        entries = (json.loads(payload) for _, _, payload, _ in _lines(file) if payload is not None)
        header: dict[str, Any] = next(entries, {})
        if header.get("journal") != FORMAT:
            return None
        total: int = header["count"]
        kinds = bytearray(total)  # of results; the first one of a record wins
        for result in entries:
            kinds[result["index"]] = kinds[result["index"]] or 1 + ("error" in result)
    failed = kinds.count(2)
    return Progress(kinds.count(1) + failed, failed, total)


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes | None, int]]:
    """Number (from 1), offset, JSON (None when damaged or torn) and length of each line."""
    file.seek(0)
    offset = 0
    for number, line in enumerate(file, start=1):
        yield number, offset, _decode(line), len(line)
        offset += len(line)


def _encode(entry: dict[str, Any]) -> bytes:
    payload = encode_json(entry)
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def _decode(line: bytes) -> bytes | None:
    """The JSON of a line, or None when the line is torn or damaged."""
    payload = line[_CRC_BYTES + 1 : -1]
    if line != b"%08x %b\n" % (zlib.crc32(payload), payload):
        return None
    return payload


def _lock(fd: int, directory: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{directory}: is in use by another run; wait for its end or choose another output.path"
        ) from None
    except OSError as error:
        # Parallel file systems are often mounted without locks; that must not stop every run on them.
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        _log.warning("%s: the file system has no locks; take care that no two runs use this path", directory)


def _refuse_lost_journal(directory: Path) -> None:
    """Raise when a directory without a journal holds files that the merge would replace."""
    for name in (MANIFEST, RESULTS):
        if (directory / name).exists():
            raise OutputError(
                f"{directory}: holds {_kind_of_run(directory)} ({name}) without its {JOURNAL}, so --resume cannot "
                "continue it; move it away or choose another output.path"
            )


def _holds_results(directory: Path) -> bool:
    """Whether starting afresh would lose something. A journal that cannot be read counts as something."""
    if not (directory / JOURNAL).stat().st_size:
        return False
    progress = read_progress(directory)
    return progress is None or progress.results > 0 or (directory / MANIFEST).exists()


def _kind_of_run(directory: Path) -> str:
    return "a complete run" if _is_complete(directory) else "an unfinished run"


def _is_complete(directory: Path) -> bool:
    return (read_manifest(directory) or {}).get("complete") is True
