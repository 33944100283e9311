"""A model directory: what it holds, by the headers of its safetensors files.

Needs no torch, so that a mistyped path, a missing shard or a truncated file is told at once.
"""

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from mpinfer.errors import ModelError
from mpinfer.spec import AUTO, FAKE, ModelSpec

Kind = Literal["decoder", "graph"]

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, "F32" say
    offset: int  # of the first byte, in the file
    size_bytes: int
    stride_bytes: int = 0  # from row to row, where other bytes lie between them

    def part(self, axis: int, part: range) -> "StoredTensor":
        """Rows (axis 0), or columns (axis 1) of a matrix, [start, stop)."""
        item_bytes = self.size_bytes // prod(self.shape)
        row_bytes = item_bytes * prod(self.shape[1:])
        if axis == 0:
            shape, skipped_bytes, stride_bytes = (len(part), *self.shape[1:]), part.start * row_bytes, 0
        else:
            shape, skipped_bytes, stride_bytes = (self.shape[0], len(part)), part.start * item_bytes, row_bytes
        size_bytes = prod(shape) * item_bytes
        return StoredTensor(self.file, shape, self.dtype, self.offset + skipped_bytes, size_bytes, stride_bytes)

    def runs(self) -> Iterator[tuple[int, int]]:
        """(offset in the file, bytes) of everything that lies in one piece, in order."""
        if not self.stride_bytes:
            yield self.offset, self.size_bytes
            return
        row_bytes = self.size_bytes // self.shape[0]
        for row in range(self.shape[0]):
            yield self.offset + row * self.stride_bytes, row_bytes


class Checkpoint:
    """The tensors of a model directory or of one safetensors file, by name.

    Raises `ModelError` for missing, truncated or damaged files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(directory) if directory.is_dir() else [directory]:
            for name, tensor in _read_header(file).items():
                self.tensors[name] = tensor

    @classmethod
    def of(cls, file: Path, tensors: dict[str, StoredTensor]) -> "Checkpoint":
        """Tensors that lie in a file of another format."""
        checkpoint = cls.__new__(cls)
        checkpoint.directory, checkpoint.tensors = file, tensors
        return checkpoint


def check_model(spec: ModelSpec) -> Kind:
    """What kind of model the job names, once all of its files are found there and whole; raises `ModelError`."""
    path = Path(spec.path)
    factory = re.fullmatch(r"[\w.]+:[\w.]+", spec.path) is not None and not path.exists()
    if spec.weights == FAKE and path.suffix == ".pt2":
        raise ModelError(
            f"model.weights={FAKE}: is for a model directory or a factory, and {path} has its own in the "
            "file; leave it out"
        )
    if spec.weights not in (AUTO, FAKE) and not factory:
        raise ModelError(
            f"model.weights={spec.weights}: is for a model made by package.module:factory, and {spec.path} has its "
            f"own; leave it out"
        )
    if factory:
        _check_weights_file(spec.weights)
    elif path.suffix == ".pt2":
        if not path.is_file():
            raise ModelError(f"model.path={path}: no such file; give a program that torch.export.save wrote")
    else:
        config = _read_object(check_model_directory(spec.path) / "config.json")
        if spec.weights != FAKE:
            Checkpoint(path)
        if _is_decoder(config, spec.task):
            return "decoder"
    if spec.task in ("generate", "score"):
        raise ModelError(
            f"model.path={path}: model.task={spec.task} needs a decoder language model in a Hugging Face directory; "
            f"use classify, embed or forward"
        )
    return "graph"


def _is_decoder(config: dict[str, Any], task: str) -> bool:
    """By the task and the architecture's name."""
    if task in ("classify", "forward"):
        return False
    name = str((config.get("architectures") or [""])[0])
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return True
    # Others may be decoders that transformers knows by another name, but these are surely none.
    return task in ("generate", "score") and not name.endswith(("Model", "Classification", "ForMaskedLM"))


def _check_weights_file(weights: str) -> None:
    if weights in (AUTO, FAKE):
        return
    file = Path(weights)
    if file.suffix not in (".safetensors", ".pt", ".pth"):
        raise ModelError(f"model.weights={file}: not a .safetensors, .pt or .pth file; give one of these")
    if not file.is_file():
        raise ModelError(f"model.weights={file}: no such file; give a .safetensors, .pt or .pth file")
    if file.suffix == ".safetensors":
        Checkpoint(file)


def check_model_directory(path: str) -> Path:
    """The directory as a `Path` when it looks like a model; raises `ModelError`."""
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(
            f"model.path={path}: no such directory; give a directory with config.json and safetensors, a .gguf or .pt2 "
            f"file, or package.module:factory"
        )
    config = directory / "config.json"
    if not config.is_file():
        raise ModelError(f"model.path={path}: has no config.json; give a Hugging Face model directory")
    _read_object(config)
    return directory


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises `ModelError`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON ({error}); fetch or convert the model again") from None
    return found


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise ModelError(f"{directory}: has no model.safetensors; convert the weights to safetensors first")
        return [single]
    files = _read_object(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(
            f"{index}: not a safetensors index (no weight_map from tensors to files); fetch the model again"
        )
    names = sorted(set(files.values()))
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
            header = json.loads(stream.read(header_bytes), object_pairs_hook=_object_of_unique_names)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        start = 8 + header_bytes
        tensors = {name: _stored(file, name, entry, start) for name, entry in header.items()}
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise ModelError(f"{file}: not a safetensors file ({error}); fetch or convert the model again") from None
    needed_bytes = max((t.offset + t.size_bytes for t in tensors.values()), default=start)
    if needed_bytes != actual_bytes:
        raise ModelError(
            f"{file}: has {actual_bytes} bytes, its header describes {needed_bytes}: truncated or damaged; "
            f"fetch or convert the model again"
        )
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if tensor.offset != end:
            problem = "shares bytes with another" if tensor.offset < end else "lies behind bytes that are no tensor's"
            raise ModelError(f"{file}: tensor {name!r} {problem}; fetch or convert the model again")
        end += tensor.size_bytes
    return tensors


def _object_of_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names a tensor twice")
    return found


def _stored(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """What an entry of a header describes; raises `ValueError`."""
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} is without dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}, shape {shape!r} and data_offsets {offsets!r}")
    size_bytes = offsets[1] - offsets[0]
    if prod(shape) * ITEM_BYTES.get(dtype, 0) not in (size_bytes, 0) or size_bytes < 0:
        raise ValueError(f"tensor {name!r} of shape {shape} in {dtype} has {size_bytes} bytes")
    return StoredTensor(file, tuple(shape), dtype, start + offsets[0], size_bytes)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
