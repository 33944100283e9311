"""The input: records of a JSONL file, by index."""

import codecs
import hashlib
import json
import reprlib
import stat
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mpinfer.errors import InputError
from mpinfer.records.files import encode_json
from mpinfer.records.unique import Names

LINE_LIMIT_BYTES = 64 * 2**20
_RUN = 64  # lines: what finding one of them adds up
_KNOWN_IDS = 1 << 14  # of records that were asked for last: more than are in hand at a time


class JsonlInput:
    """Records of a JSONL file, by index; their text and ids stay in the file. Some 5 bytes a record are held.

    Blank lines are skipped and a UTF-8 byte order mark is tolerated. `check` says in words what is wrong with
    a record, or returns None. Raises `InputError` when the file cannot be read, holds no record, or has a
    line that breaks a rule; the error names the first such line (from 1) and counts the others.

    `convert` makes the record of what a line of another format holds. Then a line that breaks a rule is `refused`
    alone, unless `convert` raises `InputError`: that one line is enough to refuse the file.
    """

    ids: Sequence[str | int]  # of each record; its index where the record gives none
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
        self._lengths = array("I")
        self._end_bytes = 0  # of the first record's line end, which all others should have
        self._run_starts, self._run_offsets = array("q"), array("q")  # of lines that only such line ends are between
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
        return len(self._lengths)

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
            self._file.seek(self._offset(index))
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
        names: Names | None = None  # not before a record gives an id
        first_problem = ""
        bad_lines = 0
        offset = 0
        for number, raw in enumerate(self._raw_lines(digest.update), start=1):
            bom_bytes = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
            line = raw[bom_bytes:].rstrip(b"\r\n")
            cut_off = len(raw) > LINE_LIMIT_BYTES and not raw.endswith(b"\n")
            if line.strip() or cut_off:
                index = len(self)
                name: str | int | None = None
                try:
                    if cut_off:
                        raise ValueError(f"longer than the limit of {LINE_LIMIT_BYTES} bytes")
                    record = _parse(line) if self._convert is None else self._convert(_parse(line))
                    name = _check_record(record, index, check)
                    if "id" in record and names is None:
                        names = Names()
                        for earlier in range(index):
                            names.add(earlier)
                except InputError as error:
                    raise InputError(f"{self._path}: line {number}: {error}") from None
                except ValueError as problem:
                    if self._convert is not None:
                        self.refused[index] = f"line {number}: {problem}"
                    else:
                        first_problem = first_problem or f"line {number}: {problem}"
                        bad_lines += 1
                if names is not None:
                    names.add((index,) if name is None else name)  # which is nobody's id
                if not index:
                    self._end_bytes = len(raw) - bom_bytes - len(line)
                self._enter(offset + bom_bytes, len(line))
            offset += len(raw)
        if not bad_lines and names is not None:
            first_problem, bad_lines = self._refuse_repeated(names)
        if bad_lines:
            more = "" if bad_lines == 1 else f" (and {bad_lines - 1} more line{'s' * (bad_lines > 2)})"
            raise InputError(f"{self._path}: {first_problem}; correct that line{more}")
        if not len(self):
            raise InputError(f"{self._path}: the input holds no record; give a file with one JSON object a line")
        self.ids = range(len(self)) if names is None else _Ids(len(self), self._name)
        self.sha256 = digest.hexdigest()

    def _enter(self, offset: int, length: int) -> None:
        """Note where the next record's line is."""
        index = len(self)
        if not index or index - self._run_starts[-1] == _RUN or offset != self._offset(index):
            self._run_starts.append(index)
            self._run_offsets.append(offset)
        self._lengths.append(length)

    def _offset(self, index: int) -> int:
        """Where a record's line begins: behind those before it in its run, and their line ends."""
        run = bisect_right(self._run_starts, index) - 1
        start = self._run_starts[run]
        return self._run_offsets[run] + sum(self._lengths[start:index]) + (index - start) * self._end_bytes

    def _name(self, index: int) -> str | int:
        name: str | int = index if index in self.refused else json.loads(self.line(index)).get("id", index)
        return name

    def _refuse_repeated(self, names: Names) -> tuple[str, int]:
        """Refuse records that repeat the id of an earlier one; the first such line, and how many there are."""
        earlier: dict[str | int, int] = {}
        repeated: list[tuple[int, int]] = []  # records, and the earlier ones
        for index in names.suspects():
            if index not in self.refused and earlier.setdefault(name := self._name(index), index) != index:
                repeated.append((index, earlier[name]))
        lines = self._line_numbers({index for pair in repeated for index in pair})
        problems = []
        for index, first in repeated:
            name = self._name(index)
            hint = " (a record without an id gets its index)" if type(name) is int else ""
            problems.append(
                f"line {lines[index]}: id {reprlib.repr(name)} is on lines {lines[first]} and {lines[index]}, "
                f"but ids must be unique{hint}"
            )
        if self._convert is not None:
            self.refused.update((index, problem) for (index, _), problem in zip(repeated, problems, strict=True))
            return "", 0
        return problems[0] if problems else "", len(problems)

    def _line_numbers(self, indices: set[int]) -> dict[int, int]:
        """Of records, from 1."""
        wanted = {self._offset(index): index for index in indices}
        found, offset = {}, 0
        self._file.seek(0)
        for number, raw in enumerate(self._file if wanted else (), start=1):
            begins = offset + (len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0)
            if begins in wanted:
                found[wanted[begins]] = number
            offset += len(raw)
        return found

    def _raw_lines(self, update: Callable[[bytes], object]) -> Iterator[bytes]:
        """Each line with its end, hashed on the way. Of one over the limit, its beginning."""
        while line := self._file.readline(LINE_LIMIT_BYTES + 1):
            update(line)
            piece = line
            while len(piece) > LINE_LIMIT_BYTES and not piece.endswith(b"\n"):
                piece = self._file.readline(LINE_LIMIT_BYTES + 1)
                update(piece)
            yield line


class _Ids(Sequence[str | int]):
    """Ids that are read where they stand."""

    def __init__(self, count: int, name: Callable[[int], str | int]) -> None:
        self._count, self._name = count, lru_cache(_KNOWN_IDS)(name)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._name(range(self._count)[index])


def _check_record(record: dict[str, Any], index: int, check: Callable[[dict[str, Any]], str | None]) -> str | int:
    """The id of a record; raises `ValueError` with the problem."""
    problem = check(record)
    if problem is not None:
        raise ValueError(problem)
    name = record.get("id", index)
    if type(name) not in (str, int):
        raise ValueError(f"id must be a string or an integer, not {reprlib.repr(name)}")
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
