"""What a job's input is: its format, and its records by index."""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mpinfer.errors import InputError
from mpinfer.records.arrays import ArrayInput
from mpinfer.records.folders import AUDIO_SUFFIXES, IMAGE_SUFFIXES, FolderInput, holds
from mpinfer.records.reader import JsonlInput
from mpinfer.records.tables import CsvInput, DatasetInput, ParquetInput
from mpinfer.spec import AUTO, InputFormat, InputSpec

_OF_FOLDERS: dict[str, InputFormat] = {
    **dict.fromkeys(IMAGE_SUFFIXES, "images"),
    **dict.fromkeys(AUDIO_SUFFIXES, "audio"),
    ".parquet": "parquet",
}
_SUFFIXES: dict[str, InputFormat] = {
    **_OF_FOLDERS,
    ".csv": "csv",
    ".tsv": "csv",
    ".npy": "npy",
    ".npz": "npz",
    ".safetensors": "safetensors",
}


class Input(Protocol):
    """Records by index, on rank 0."""

    @property
    def ids(self) -> Sequence[str | int]:
        """Of each record; no two are the same."""

    @property
    def sha256(self) -> str:
        """What a resumed run must find again, in hex."""

    @property
    def total_bytes(self) -> int: ...

    @property
    def refused(self) -> dict[int, str]:
        """What is wrong with records that cannot be computed, by index."""

    @property
    def lengths(self) -> Sequence[int]:
        """Bytes of each record."""

    def __len__(self) -> int: ...

    def line(self, index: int) -> bytes:
        """One record as JSON, as it is handed out. Raises `InputError` when it is gone."""

    def source(self, index: int) -> bytes:
        """The same as it stands in the input."""

    def close(self) -> None: ...


def input_format(spec: InputSpec) -> InputFormat:
    """As given, or by the suffix, or by what a folder holds. Raises `InputError` for a folder that does not say."""
    if spec.format != AUTO:
        return spec.format
    path = Path(spec.path)
    if path.is_dir():
        kinds = holds(path, _OF_FOLDERS)
        if len(kinds) != 1:
            found = " and ".join(sorted(kinds)) or "neither images nor audio nor parquet"
            raise InputError(f"input.path={path}: the folder holds {found}; set input.format, or give another folder")
        return next(iter(kinds))
    if re.fullmatch(r"[\w.]+:[\w.]+", spec.path) and not path.exists():
        return "dataset"
    return _SUFFIXES.get(path.suffix.lower(), "jsonl")


class _First(Sequence[Any]):
    """The beginning of a sequence whose items may have to be read."""

    def __init__(self, items: Sequence[Any], limit: int) -> None:
        self._items, self._places = items, range(limit)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._items[self._places[index]]


class FirstRecords:
    """So many records from the beginning of an input."""

    def __init__(self, records: Input, limit: int) -> None:
        self.ids: Sequence[str | int] = _First(records.ids, limit)
        self.lengths = records.lengths[:limit]
        self.refused = {index: problem for index, problem in records.refused.items() if index < limit}
        self.total_bytes = sum(self.lengths)
        self.sha256 = hashlib.sha256(f"{records.sha256} {limit}".encode()).hexdigest()
        self.line, self.source, self.close = records.line, records.source, records.close

    def __len__(self) -> int:
        return len(self.ids)


def open_input(
    spec: InputSpec,
    check: Callable[[dict[str, Any]], str | None],
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> Input:
    """The records of a job; raises `InputError`. `check` and `convert` as `JsonlInput` takes them."""
    records = _open(spec, check, convert)
    return records if spec.limit == AUTO or spec.limit >= len(records) else FirstRecords(records, spec.limit)


def _open(
    spec: InputSpec,
    check: Callable[[dict[str, Any]], str | None],
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> Input:
    match input_format(spec):
        case "csv":
            return CsvInput(spec, check)
        case "parquet":
            return ParquetInput(spec)
        case "images":
            return FolderInput(Path(spec.path), "image", IMAGE_SUFFIXES)
        case "audio":
            return FolderInput(Path(spec.path), "audio", AUDIO_SUFFIXES)
        case "npy" | "npz" | "safetensors" as kind:
            return ArrayInput(Path(spec.path), kind)
        case "dataset":
            return DatasetInput(spec.path)
    return JsonlInput(spec.path, check, convert)
