"""A model directory: what it holds, by the headers of its safetensors files.

Needs no torch, so that a mistyped path, a missing shard or a truncated file is told at once.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpinfer.errors import ModelError

HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, "F32" say
    offset: int  # of the first byte, in the file
    size_bytes: int

    def rows(self, rows: range) -> "StoredTensor":
        """The part that holds rows [start, stop) of the first dimension."""
        row_bytes = self.size_bytes // self.shape[0]
        return StoredTensor(
            self.file,
            (len(rows), *self.shape[1:]),
            self.dtype,
            self.offset + rows.start * row_bytes,
            len(rows) * row_bytes,
        )


class Checkpoint:
    """The tensors of a model directory, by name. Raises `ModelError` for missing, truncated or damaged files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(directory):
            for name, tensor in _read_header(file).items():
                self.tensors[name] = tensor


def check_model_directory(path: str) -> Path:
    """The directory as a `Path` when it looks like a model; raises `ModelError`."""
    directory = Path(path)
    if directory.suffix == ".gguf":
        raise ModelError(f"model.path={path}: a GGUF file; convert it first: mpinfer convert {path} DIRECTORY")
    if not directory.is_dir():
        raise ModelError(f"model.path={path}: no such directory; give a directory with config.json and safetensors")
    config = directory / "config.json"
    if not config.is_file():
        raise ModelError(f"model.path={path}: has no config.json; give a Hugging Face model directory")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config}: not valid JSON ({error}); fetch or convert the model again") from None
    return directory


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
