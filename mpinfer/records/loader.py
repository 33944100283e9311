"""From a record as it was handed out to its fields, on the ranks that compute."""

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from mpinfer.errors import InputError, RecordError
from mpinfer.plugins import one_line
from mpinfer.records.arrays import copy_row, open_arrays
from mpinfer.records.inputs import input_format
from mpinfer.records.tables import column_names, columns_of, open_dataset, parquet_footers
from mpinfer.spec import InputFormat, InputSpec

Load = Callable[[dict[str, Any]], dict[str, Any]]


def make_loader(spec: InputSpec) -> Load:
    """Gives the fields of a record, without its id; raises `RecordError` for one that cannot be read."""
    match input_format(spec):
        case "npy" | "npz" | "safetensors" as kind:
            return _rows_of(_array_rows(spec, kind))
        case "parquet":
            return _rows_of(_ParquetRows(spec))
        case "dataset":
            return _rows_of(_dataset_items(spec))
        case "jsonl" if spec.columns:
            return lambda record: _without_id(_renamed(spec, record))
    return _without_id


def _without_id(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "id"}


def _renamed(spec: InputSpec, record: dict[str, Any]) -> dict[str, Any]:
    try:
        return {field: record[column] for field, column in columns_of(spec, list(record)).items()}
    except InputError as error:  # one line's, as each has its own fields
        raise RecordError(str(error)) from None


def _rows_of(read: Callable[[int], dict[str, Any]]) -> Load:
    def load(record: dict[str, Any]) -> dict[str, Any]:
        try:
            return read(record["row"])
        except RecordError:
            raise
        except Exception as error:
            raise RecordError(f"row {record['row']}: cannot be read ({one_line(error)}); correct it") from error

    return load


def _array_rows(spec: InputSpec, kind: InputFormat) -> Callable[[int], dict[str, Any]]:
    arrays = open_arrays(Path(spec.path), kind)
    return lambda row: {name: copy_row(array, row) for name, array in arrays.items()}


def _dataset_items(spec: InputSpec) -> Callable[[int], dict[str, Any]]:
    dataset = open_dataset(spec.path)

    def read(row: int) -> dict[str, Any]:
        item = dataset[row]
        if isinstance(item, dict):
            return item
        if isinstance(item, tuple | list):
            return {str(number): value for number, value in enumerate(item)}
        return {"input": item}

    return read


class _ParquetRows:
    """Reads a row group at a time, and keeps the last one."""

    def __init__(self, spec: InputSpec) -> None:
        footers = parquet_footers(spec)
        fields = columns_of(spec, column_names(next(iter(footers.values()))))
        self._fields = {field: column for field, column in fields.items() if field != "id"}
        self._groups = [(file, footer, n) for file, footer in footers.items() for n in range(footer.num_row_groups)]
        counts = [footer.row_group(group).num_rows for _, footer, group in self._groups]
        self._starts = list(accumulate(counts, initial=0))
        self._held: tuple[int, Any] = (-1, None)

    def __call__(self, row: int) -> dict[str, Any]:
        from pyarrow.parquet import ParquetFile

        number = bisect_right(self._starts, row) - 1
        if self._held[0] != number:
            path, footer, group = self._groups[number]
            with ParquetFile(path, metadata=footer) as file:
                self._held = (number, file.read_row_group(group, columns=list(self._fields.values())))
        table = self._held[1]
        return {field: table[column][row - self._starts[number]].as_py() for field, column in self._fields.items()}
