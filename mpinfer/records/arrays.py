"""Arrays as input: `.npy`, `.npz` and safetensors files, an entry of the first dimension a record."""

import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpinfer.errors import InputError
from mpinfer.records.files import encode_json
from mpinfer.spec import InputFormat

if TYPE_CHECKING:  # numpy loads only where arrays are
    import numpy as np

_HEADER_LIMIT_BYTES = 100_000_000
_NUMPY_TYPES: dict[str, Any] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
    "BF16": [("bfloat16", "<u2")],  # numpy has none: its bits, in a type that cannot be taken for integers
}

# What the readers of the formats raise for bytes that are none of theirs.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    RecursionError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class RowInput:
    """Records that are numbers of rows: the ranks that compute open the input themselves."""

    def __init__(self, ids: Sequence[str | int], facts: str, files: Sequence[Path]) -> None:
        """`facts`: what tells one input from another, beside the names, sizes and times of change of its files."""
        self.ids = ids
        self.refused: dict[int, str] = {}
        digest = hashlib.sha256(facts.encode())
        self.total_bytes = 0
        for file in files:
            status = file.stat()
            self.total_bytes += status.st_size
            digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        self.sha256 = digest.hexdigest()
        self._row_bytes = max(1, self.total_bytes // max(1, len(ids)))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Sequence[int]:
        return [self._row_bytes] * len(self.ids)

    def line(self, index: int) -> bytes:
        return encode_json({"id": self.ids[index], "row": index})

    source = line

    def close(self) -> None:
        """Nothing is open."""


class ArrayInput(RowInput):
    """Rows of the arrays of a file. Raises `InputError` when it has none."""

    def __init__(self, path: Path, kind: InputFormat) -> None:
        arrays = open_arrays(path, kind)
        facts = json.dumps({name: [str(array.dtype), array.shape] for name, array in arrays.items()})
        super().__init__(range(len(next(iter(arrays.values())))), facts, [path])


def open_arrays(path: Path, kind: InputFormat) -> "dict[str, np.ndarray]":
    """The arrays of a file by name, `input` where they have none, all with equally many rows; not read yet where the
    format allows. Their rows: `copy_row`. Raises `InputError`.
    """
    import numpy as np

    try:
        if kind == "safetensors":
            arrays = _map_safetensors(path)
        elif kind == "npz":
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        else:
            arrays = {"input": np.lib.format.open_memmap(path, mode="r")}
    except _DAMAGE as error:
        raise InputError(f"input.path={path}: cannot be read as {kind} ({error}); give a file of numbers") from None
    rows = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if not rows or 0 in rows.values() or len(set(rows.values())) > 1:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise InputError(
            f"input.path={path}: holds {shapes or 'no array'}; give arrays with equally many rows, one or more: a row "
            f"is a record"
        )
    return arrays


def copy_row(array: "np.ndarray", row: int) -> "np.ndarray":
    """One row of an array of `open_arrays`, in memory of its own; bfloat16 becomes float32."""
    import numpy as np

    found = np.array(array[row])
    if found.dtype.names == ("bfloat16",):
        return np.left_shift(found["bfloat16"], 16, dtype=np.uint32, out=np.empty(found.shape, np.uint32)).view("<f4")
    return found


def _map_safetensors(path: Path) -> "dict[str, np.ndarray]":
    """Memory maps of the tensors; raises one of `_DAMAGE`."""
    import numpy as np

    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        size_bytes = path.stat().st_size
        if header_bytes > min(_HEADER_LIMIT_BYTES, size_bytes - 8):
            raise ValueError(f"a header of {header_bytes} bytes in a file of {size_bytes}")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    arrays: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        if entry["dtype"] not in _NUMPY_TYPES:
            raise ValueError(f"tensor {name!r} is {entry['dtype']}, not one of {', '.join(_NUMPY_TYPES)}")
        dtype, shape, (start, stop) = np.dtype(_NUMPY_TYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
        if stop - start != prod(shape) * dtype.itemsize or 8 + header_bytes + stop > size_bytes or start < 0:
            raise ValueError(f"tensor {name!r} does not lie in the file")
        if stop > start:
            arrays[name] = np.memmap(path, dtype, "r", 8 + header_bytes + start, tuple(shape))
        else:
            arrays[name] = np.empty(shape, dtype)
    return arrays
