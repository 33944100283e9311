"""Read one stored tensor into memory, and nothing else."""

from collections.abc import Sequence
from math import prod

import torch

from mpinfer.errors import ModelError
from mpinfer.models.checkpoint import Checkpoint, StoredTensor

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


def check_shape(stored: StoredTensor, name: str, shape: Sequence[int]) -> None:
    """Raises `ModelError` when a stored tensor is not of the shape that the model asks for."""
    if stored.shape != tuple(shape):
        raise ModelError(
            f"{stored.file}: tensor {name!r} has shape {list(stored.shape)}, config.json asks for "
            f"{list(shape)}; check that they are of the same model"
        )


def read_into(checkpoint: Checkpoint, name: str, target: torch.Tensor) -> int:
    """Fill `target` with a stored tensor, converted to its dtype; returns the bytes read.

    Read straight into memory of its own, not through a mapping of the file: the peak is the partition plus one
    tensor, and a file that changes under a running job cannot change its weights. Raises `ModelError` when the
    shape disagrees with the architecture or the file ends early.
    """
    stored = checkpoint.tensors[name]
    check_shape(stored, name, target.shape)
    return read_stored(stored, name, target)


def read_stored(stored: StoredTensor, name: str, target: torch.Tensor) -> int:
    """The same for a part of a stored tensor, of the shape of `target`: what lies between its rows is not read."""
    dtype = _DTYPES.get(stored.dtype)
    if dtype is None or stored.size_bytes != prod(stored.shape) * dtype.itemsize:
        raise ModelError(f"{stored.file}: tensor {name!r} of dtype {stored.dtype} cannot be read; convert the model")
    direct = target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous()
    buffer = target.data if direct else torch.empty(stored.shape, dtype=dtype)
    view = memoryview(buffer.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with open(stored.file, "rb", buffering=0) as stream:
        done = 0
        for offset, size_bytes in stored.runs():
            stream.seek(offset)
            end = done + size_bytes
            while done < end:
                count = stream.readinto(view[done:end])
                if not count:
                    raise ModelError(f"{stored.file}: ended inside tensor {name!r}; fetch or convert the model again")
                done += count
    if not direct:
        target.data.copy_(buffer)
    return stored.size_bytes
