"""Read a partition's tensors from a directory of safetensors, and nothing else.

`Checkpoint` is the index: which file holds which tensor, of what shape. It is built from the files' headers
alone, so a missing shard or a truncated file is found before any weight is read.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from mpinfer.errors import ModelError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, "F32" say
    offset: int  # of the first byte, in the file
    size_bytes: int


class Checkpoint:
    """The tensors of a model directory, by name. Raises `ModelError` for missing, truncated or damaged files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(directory):
            for name, tensor in _read_header(file).items():
                self.tensors[name] = tensor


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise ModelError(f"{directory}: has no model.safetensors; convert the weights to safetensors first")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index}: not a safetensors index ({error!r}); fetch the model again") from None
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index}: names {name!r}, a path outside the model directory; refuse this model")
        if not (directory / name).is_file():
            raise ModelError(f"{directory / name}: this shard is named in the index but missing; fetch it again")
    return [directory / name for name in names]


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The header of a safetensors file: 8 bytes of length, that much JSON, then the tensors' bytes."""
    actual_bytes = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            if header_bytes > min(HEADER_LIMIT_BYTES, actual_bytes - 8):
                raise ValueError(f"a header of {header_bytes} bytes in a file of {actual_bytes}")
            header: dict[str, Any] = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        start = 8 + header_bytes
        tensors = {
            name: StoredTensor(
                file,
                tuple(int(n) for n in entry["shape"]),
                entry["dtype"],
                start + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ModelError(f"{file}: not a safetensors file ({error}); fetch or convert the model again") from None
    needed_bytes = max((t.offset + t.size_bytes for t in tensors.values()), default=start)
    if needed_bytes != actual_bytes:
        raise ModelError(
            f"{file}: has {actual_bytes} bytes, its header describes {needed_bytes}: truncated or damaged; "
            f"fetch or convert the model again"
        )
    return tensors


def read_into(checkpoint: Checkpoint, name: str, target: torch.Tensor) -> int:
    """Fill `target` with a stored tensor, converted to its dtype; returns the bytes read.

    Read straight into memory of its own, not through a mapping of the file: the peak is the partition plus one
    tensor, and a file that changes under a running job cannot change its weights. Raises `ModelError` when the
    shape disagrees with the architecture or the file ends early.
    """
    stored = checkpoint.tensors[name]
    if stored.shape != tuple(target.shape):
        raise ModelError(
            f"{stored.file}: tensor {name!r} has shape {list(stored.shape)}, config.json asks for "
            f"{list(target.shape)}; check that they are of the same model"
        )
    dtype = _DTYPES.get(stored.dtype)
    if dtype is None or stored.size_bytes != prod(stored.shape) * dtype.itemsize:
        raise ModelError(f"{stored.file}: tensor {name!r} of dtype {stored.dtype} cannot be read; convert the model")
    direct = target.dtype == dtype and target.device.type == "cpu"
    buffer = target.data if direct else torch.empty(stored.shape, dtype=dtype)
    view = memoryview(buffer.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with open(stored.file, "rb", buffering=0) as stream:
        stream.seek(stored.offset)
        done = 0
        while done < stored.size_bytes:
            count = stream.readinto(view[done:])
            if not count:
                raise ModelError(f"{stored.file}: ended inside tensor {name!r}; fetch or convert the model again")
            done += count
    if not direct:
        target.data.copy_(buffer)
    return stored.size_bytes
