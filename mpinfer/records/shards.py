"""Arrays of results, in files beside them: each of the ranks that compute writes its own, rank 0 only their names.

A shard holds the arrays of some records: of each output, and of each shape that it came in, one `.npy` file with a row
for every record. A result names file and row.
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mpinfer.records.files import make_directory, open_private, output_errors, sync_directory

if TYPE_CHECKING:  # numpy loads only where arrays are
    import numpy as np

ARRAYS = "arrays"
SHARD_BYTES = 64 * 2**20
SHARD_RECORDS = 4096  # of tiny arrays it is the objects around them that take memory


class ShardWriter:
    """Collects arrays until there are enough for a shard. A shard's files are durable before their names are told."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / ARRAYS
        self._waiting: list[tuple[int, dict[str, np.ndarray]]] = []  # records and their arrays, by output
        self._waiting_bytes = 0

    def add(self, index: int, arrays: "dict[str, np.ndarray]") -> None:
        self._waiting.append((index, arrays))
        self._waiting_bytes += sum(array.nbytes for array in arrays.values())

    @property
    def is_full(self) -> bool:
        return self._waiting_bytes >= SHARD_BYTES or len(self._waiting) >= SHARD_RECORDS

    def flush(self) -> list[tuple[int, dict[str, Any]]]:
        """Write what is waiting; where each record's arrays are, by output. Raises `OutputError`.

        Files are named by their first record, which is in no other shard: one that a killed run left behind is replaced
        as soon as that record is computed again.
        """
        import numpy as np

        if not self._waiting:
            return []
        first, _ = self._waiting[0]
        rows: dict[tuple[str, tuple[int, ...], str], list[np.ndarray]] = defaultdict(list)
        named: list[tuple[int, dict[str, Any]]] = []
        kinds: dict[str, list[tuple[tuple[int, ...], str]]] = defaultdict(list)  # shapes and types of each output
        for index, arrays in self._waiting:
            places = {}
            for name, array in arrays.items():
                kind = (array.shape, array.dtype.str)
                if kind not in kinds[name]:
                    kinds[name].append(kind)
                number = kinds[name].index(kind)
                stem = f"{first:09}{f'-{number}' * (number > 0)}.{quote(name, safe='')}"  # names may have any letters
                group = rows[(stem, *kind)]
                places[name] = {"file": f"{ARRAYS}/{stem}.npy", "row": len(group)}
                group.append(array)
            named.append((index, places))
        with output_errors(self._directory):
            make_directory(self._directory)
            for (stem, *_), group in rows.items():
                temporary = self._directory / f"{stem}.npy.tmp"
                with open(temporary, "wb", opener=open_private) as file:
                    # By the file's own `write`: into a file, numpy writes by C's buffers, whose last errors it loses.
                    np.save(SimpleNamespace(write=file.write), np.stack(group))
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self._directory / f"{stem}.npy")
            sync_directory(self._directory)
        self._waiting, self._waiting_bytes = [], 0
        return named


def named_files(result: bytes) -> set[str]:
    """The files that a result's arrays are in."""
    if b'"file"' not in result:
        return set()
    output = json.loads(result).get("output", {})
    places = [value for value in output.values() if isinstance(value, dict) and value.keys() == {"file", "row"}]
    return {place["file"] for place in places}


def remove_others(directory: Path, names: set[str]) -> None:
    """Remove shards that no result names: a killed run wrote them before rank 0 knew of them. Raises `OutputError`."""
    if (directory / ARRAYS).is_dir():
        with output_errors(directory):
            for file in (directory / ARRAYS).iterdir():
                if f"{ARRAYS}/{file.name}" not in names and file.is_file():
                    file.unlink()
