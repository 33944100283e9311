"""Tables and datasets as input: a row is a record."""

import csv
import hashlib
import io
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpinfer.errors import InputError
from mpinfer.plugins import load_object, one_line
from mpinfer.records.arrays import RowInput
from mpinfer.records.files import encode_json
from mpinfer.records.folders import files_below
from mpinfer.records.reader import LINE_LIMIT_BYTES
from mpinfer.spec import InputSpec


def columns_of(spec: InputSpec, names: Sequence[str]) -> dict[str, str]:
    """By field of a record the column that it is: as `input.columns` says, else all columns by their names.

    Raises `InputError` for a column that the table does not have, and for a field given twice.
    """
    if not spec.columns:
        return {name: name for name in names}
    fields = {}
    for entry in spec.columns:
        field, equals, column = entry.partition("=")
        column = column if equals else field
        if column not in names:
            raise InputError(f"input.columns={entry}: no column {column!r}; the columns are {', '.join(names)}")
        if field in fields:
            raise InputError(f"input.columns={entry}: the field {field!r} has a column already; leave one out")
        fields[field] = column
    return fields


class CsvInput:
    """Rows below a header line; by index, their text stays in the file. Tabs separate the columns of `.tsv` files.

    Raises `InputError` for a file that is no such table, and for records that break a rule.
    """

    def __init__(self, spec: InputSpec, check: Callable[[dict[str, Any]], str | None]) -> None:
        self._path = Path(spec.path)
        self._dialect = "excel-tab" if self._path.suffix.lower() == ".tsv" else "excel"
        self.refused: dict[int, str] = {}
        self._offsets, self._lengths = array("q"), array("q")
        try:
            if self._path.exists() and not self._path.is_file():  # opening a pipe waits for its writer
                raise InputError(f"input.path={self._path}: not a regular file, but rows are read again; give a table")
            self._file = self._path.open("rb")
            csv.field_size_limit(LINE_LIMIT_BYTES)  # as in JSONL; csv's own is 128 KiB, too little for documents
            self._scan(spec, check)
        except OSError as error:
            raise InputError(
                f"input.path={self._path}: cannot be read ({error.strerror or error}); give a readable table"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(f"input.path={self._path}: is not UTF-8 ({error.reason}); convert it") from None
        except csv.Error as error:
            raise InputError(f"input.path={self._path}: is no table ({error}); correct it") from None
        self.total_bytes = sum(self._lengths)

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def lengths(self) -> Sequence[int]:
        return self._lengths

    def line(self, index: int) -> bytes:
        """One record as JSON. Raises `InputError` when it is gone."""
        self._file.seek(self._offsets[index])
        text = self._file.read(self._lengths[index])
        if len(text) < self._lengths[index]:
            raise InputError(
                f"input.path={self._path}: the file became shorter while it was in use (record {index} is cut off); "
                f"leave the input alone until the run has ended"
            )
        (row,) = csv.reader(io.StringIO(text.decode(), newline=""), self._dialect)
        return encode_json({**self._record(row), "id": self.ids[index]})

    source = line

    def close(self) -> None:
        self._file.close()

    def _scan(self, spec: InputSpec, check: Callable[[dict[str, Any]], str | None]) -> None:
        digest = hashlib.sha256()
        lines = _Lines(self._file, digest.update)
        rows = csv.reader(lines, self._dialect, strict=True)
        header = next(rows, [])
        if len(set(header)) != len(header) or not any(header):
            raise InputError(f"input.path={self._path}: the first line must name each column, once; correct it")
        fields = columns_of(spec, header)
        self._columns = {field: header.index(column) for field, column in fields.items()}
        named: dict[str, int] = {}  # lines of ids
        start, number = lines.offset, rows.line_num + 1
        for row in rows:
            if row:
                if len(row) != len(header):
                    raise InputError(
                        f"input.path={self._path}: line {number} has {len(row)} columns, the header has "
                        f"{len(header)}; correct that line"
                    )
                record = self._record(row)
                if "id" in record and named.setdefault(record["id"], number) != number:
                    raise InputError(
                        f"input.path={self._path}: id {record['id']!r} is on lines {named[record['id']]} and {number}, "
                        f"but ids must be unique; correct one"
                    )
                if problem := check(record):
                    raise InputError(f"input.path={self._path}: line {number}: {problem}; correct that line")
                self._offsets.append(start)
                self._lengths.append(lines.offset - start)
            start, number = lines.offset, rows.line_num + 1  # a row may have line ends in quotes
        if not self._offsets:
            raise InputError(f"input.path={self._path}: has no row below its header; give a table with records")
        self.ids: Sequence[str | int] = list(named) if named else range(len(self._offsets))
        self.sha256 = digest.hexdigest()

    def _record(self, row: Sequence[str]) -> dict[str, Any]:
        return {field: row[column] for field, column in self._columns.items()}


class _Lines:
    """The lines of a file as text, and how far they were read."""

    def __init__(self, file: Any, update: Callable[[bytes], object]) -> None:
        self._file, self._update, self.offset = file, update, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self._update(line)
        first = self.offset == 0
        self.offset += len(line)
        return line.decode("utf-8-sig" if first else "utf-8")


class ParquetInput(RowInput):
    """Rows of a Parquet file, or of all in a folder by their names. Raises `InputError`."""

    def __init__(self, spec: InputSpec) -> None:
        footers = parquet_footers(spec)
        fields = columns_of(spec, column_names(next(iter(footers.values()))))
        rows = sum(footer.num_rows for footer in footers.values())
        if not rows:
            raise InputError(f"input.path={spec.path}: has no row; give a table with records")
        ids: Sequence[str | int] = range(rows)
        if "id" in fields:
            column = fields["id"]
            with _parquet_errors(spec):
                from pyarrow.parquet import ParquetFile

                ids = []
                for path, footer in footers.items():
                    with ParquetFile(path, metadata=footer) as file:
                        ids += file.read([column])[column].to_pylist()
            if any(type(name) not in (str, int) for name in ids) or len(set(ids)) < rows:
                raise InputError(
                    f"input.path={spec.path}: column {column!r} is the id, so it must hold strings or integers, each "
                    f"once; correct it, or leave it out of input.columns"
                )
        super().__init__(ids, json.dumps([rows, fields]), list(footers))


def parquet_footers(spec: InputSpec) -> dict[Path, Any]:
    """What stands at the ends of a table's files, in the order of its rows; all have the same columns.

    No file stays open: a folder may have more than a process may open. Raises `InputError`.
    """
    path = Path(spec.path)
    with _parquet_errors(spec):
        from pyarrow.parquet import read_metadata

        files = [path / name for name in sorted(files_below(path, (".parquet",)))] if path.is_dir() else [path]
        footers = {file: read_metadata(file) for file in files}
    if not footers:
        raise InputError(f"input.path={path}: the folder holds no .parquet file; give another")
    names = column_names(footers[files[0]])
    for file, footer in footers.items():
        if set(found := column_names(footer)) != set(names):
            raise InputError(
                f"input.path={path}: {file} has the columns {', '.join(found)}, the first file {', '.join(names)}; "
                f"give files with the same columns"
            )
    return footers


def column_names(footer: Any) -> list[str]:
    """Of a table; nested columns count as one."""
    names: list[str] = footer.schema.to_arrow_schema().names
    return names


@contextmanager
def _parquet_errors(spec: InputSpec) -> Iterator[None]:
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise InputError(f"input.path={spec.path}: Parquet needs pyarrow; pip install 'mpinfer[parquet]'") from None
    try:
        yield
    except (OSError, ArrowException) as error:
        raise InputError(f"input.path={spec.path}: cannot be read as Parquet ({error}); give another file") from None


class DatasetInput(RowInput):
    """The items of a `torch.utils.data.Dataset`, or of anything else with a length. Raises `InputError`."""

    def __init__(self, path: str) -> None:
        count = len(open_dataset(path))
        if not count:
            raise InputError(f"input.path={path}: the dataset is empty; give one with items")
        super().__init__(range(count), f"{path} {count}", [])


def open_dataset(path: str) -> Any:
    """What the user's factory makes. Raises `InputError`."""
    factory = load_object(path, "input.path", InputError)
    try:
        dataset = factory()
        len(dataset)
    except Exception as error:
        raise InputError(f"input.path={path}: raised {one_line(error)}; correct it") from error
    if not hasattr(dataset, "__getitem__"):
        raise InputError(f"input.path={path}: gave {type(dataset).__name__}, without items by index; give a dataset")
    return dataset
