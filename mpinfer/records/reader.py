"""The input: records of a JSONL file, by index."""

import codecs
import hashlib
import json
import reprlib
import stat
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mpinfer.errors import InputError
from mpinfer.records.files import encode_json

LINE_LIMIT_BYTES = 64 * 2**20


class JsonlInput:
    """Records of a JSONL file, by index; their text stays in the file, only byte offsets are held.

    Blank lines are skipped and a UTF-8 byte order mark is tolerated. `check` says in words what is wrong with
    a record, or returns None. Raises `InputError` when the file cannot be read, holds no record, or has a
    line that breaks a rule; the error names the first such line (from 1) and counts the others.

    `convert` makes the record of what a line of another format holds. Then a line that breaks a rule is `refused`
    alone, unless `convert` raises `InputError`: that one line is enough to refuse the file.
    """

    ids: list[str | int]  # of each record; its index where the record gives none
    sha256: str  # of the file's bytes, in hex
    total_bytes: int  # of all records' lines, without line ends
    refused: dict[int, str]  # what is wrong with records that cannot be computed, by index; their ids are their indices

    def __init__(
        self,
        path: str | Path,
        check: Callable[[dict[str, Any]], str | None],
        convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self._path = Path(path)
        self._convert = convert
        self._offsets = array("q")
        self._lengths = array("q")
        self.ids = []
        self.refused = {}
        self._file = self._open()
        try:
            self._scan(check)
        except OSError as error:
            self._file.close()
            raise self._unreadable(error) from error
        except InputError:
            self._file.close()
            raise
        self.total_bytes = sum(self._lengths)

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def lengths(self) -> Sequence[int]:
        """Bytes of each record's line, without its line end."""
        return self._lengths

    def line(self, index: int) -> bytes:
        """One record as JSON, for one that is not refused. Raises `InputError` when it is gone."""
        source = self.source(index)
        return source if self._convert is None else encode_json(self._convert(_parse(source)))

    def source(self, index: int) -> bytes:
        """The raw line of one record, without its line end. Raises `InputError` when it is gone."""
        try:
            self._file.seek(self._offsets[index])
            line = self._file.read(self._lengths[index])
        except OSError as error:
            raise self._unreadable(error) from error
        if len(line) < self._lengths[index]:
            raise InputError(
                f"{self._path}: the file became shorter while it was in use (record {index} is cut off); "
                "leave the input alone until the run has ended"
            )
        return line

    def close(self) -> None:
        self._file.close()

    def _open(self) -> BinaryIO:
        try:
            # Looked at before it is opened: opening a pipe waits for its writer.
            if not stat.S_ISREG(self._path.stat().st_mode):
                raise InputError(
                    f"{self._path}: not a regular file, but records are read again by offset; give a JSONL file"
                )
            return self._path.open("rb")
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(
            f"{self._path}: the input cannot be read ({error.strerror or error}); give a readable JSONL file"
        )

    def _scan(self, check: Callable[[dict[str, Any]], str | None]) -> None:
        digest = hashlib.sha256()
        lines_of_ids: dict[str | int, int] = {}
        first_problem = ""
        bad_lines = 0
        offset = 0
        for number, raw in enumerate(self._raw_lines(digest.update), start=1):
            bom_bytes = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
            line = raw[bom_bytes:].rstrip(b"\r\n")
            cut_off = len(raw) > LINE_LIMIT_BYTES and not raw.endswith(b"\n")
            if line.strip() or cut_off:
                try:
                    if cut_off:
                        raise ValueError(f"longer than the limit of {LINE_LIMIT_BYTES} bytes")
                    record = _parse(line) if self._convert is None else self._convert(_parse(line))
                    self.ids.append(_check_record(record, len(self.ids), number, lines_of_ids, check))
                except InputError as error:
                    raise InputError(f"{self._path}: line {number}: {error}") from None
                except ValueError as problem:
                    if self._convert is not None:
                        self.refused[len(self.ids)] = f"line {number}: {problem}"
                    else:
                        first_problem = first_problem or f"line {number}: {problem}"
                        bad_lines += 1
                    self.ids.append(len(self.ids))  # later default ids stay what they would have been
                self._offsets.append(offset + bom_bytes)
                self._lengths.append(len(line))
            offset += len(raw)
        if bad_lines:
            more = "" if bad_lines == 1 else f" (and {bad_lines - 1} more line{'s' * (bad_lines > 2)})"
            raise InputError(f"{self._path}: {first_problem}; correct that line{more}")
        if not self.ids:
            raise InputError(f"{self._path}: the input holds no record; give a file with one JSON object a line")
        self.sha256 = digest.hexdigest()

    def _raw_lines(self, update: Callable[[bytes], object]) -> Iterator[bytes]:
        """Each line with its end, hashed on the way. Of one over the limit, its beginning."""
        while line := self._file.readline(LINE_LIMIT_BYTES + 1):
            update(line)
            piece = line
            while len(piece) > LINE_LIMIT_BYTES and not piece.endswith(b"\n"):
                piece = self._file.readline(LINE_LIMIT_BYTES + 1)
                update(piece)
            yield line


def _check_record(
    record: dict[str, Any],
    index: int,
    number: int,
    lines_of_ids: dict[str | int, int],
    check: Callable[[dict[str, Any]], str | None],
) -> str | int:
    """The id of the record of a line, entered into `lines_of_ids`; raises `ValueError` with the problem."""
    problem = check(record)
    if problem is not None:
        raise ValueError(problem)
    name = record.get("id", index)
    if type(name) not in (str, int):
        raise ValueError(f"id must be a string or an integer, not {reprlib.repr(name)}")
    earlier = lines_of_ids.setdefault(name, number)
    if earlier != number:
        hint = " (a record without an id gets its index)" if type(name) is int else ""
        raise ValueError(f"id {reprlib.repr(name)} is on lines {earlier} and {number}, but ids must be unique{hint}")
    return name


def _parse(line: bytes) -> dict[str, Any]:
    try:
        # Decoded here because json.loads would guess among other encodings.
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{line[error.start]:02x} in column {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("not usable JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, not {reprlib.repr(record)}")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")
