"""What all preparers share: samples of equal shapes, values as tensors, the processors of a model directory."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpinfer.errors import ModelError, RecordError

Sample = dict[str, torch.Tensor]
"""A record's unbatched tensors, by the model's input names."""


_LONGEST_REASON = 400  # characters: transformers may list all that it knows


class EqualShapes:
    """Samples that share a batch when their shapes and types are the same: nothing is padded."""

    longest: dict[str, int] = {}  # noqa: RUF012 (preparers whose samples vary have their own)

    def collate(self, samples: Sequence[Sample]) -> Sample:
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def key(self, sample: Sample) -> Hashable:
        return tuple((name, sample[name].shape, sample[name].dtype) for name in sorted(sample))

    def size(self, sample: Sample) -> int:
        return 0


def as_tensor(name: str, value: Any) -> torch.Tensor:
    """A number, nested list, array or tensor as a tensor of its own memory; float64 becomes float32.

    Raises `RecordError` for what is not numbers, is ragged or is empty.
    """
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
    else:
        try:
            array = np.asarray(value)
        except ValueError:
            raise RecordError(f"{name}: its lists differ in length; make them equally long") from None
        if array.dtype.kind not in "biufc":
            raise RecordError(f"{name}: has a value that is not a number ({_kind(value)}); give numbers alone")
        tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    if not tensor.numel():
        raise RecordError(f"{name}: is empty (shape {list(tensor.shape)}); give at least one number")
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def source_of(field: str, value: Any) -> tuple[str, Any]:
    """(what messages call it, a path, bytes or the value itself) of a field that holds a file in one of several ways.

    Raises `RecordError` for a mapping with neither bytes nor a path.
    """
    if isinstance(value, dict):
        path, data = value.get("path"), value.get("bytes")
        if path is None and data is None:
            raise RecordError(f"{field}: has neither 'path' nor 'bytes'; give one of them")
        return str(path or field), path if data is None else data
    if isinstance(value, str | Path):
        return str(value), str(value)
    return field, bytes(value) if isinstance(value, bytearray | memoryview) else value


def load_processor(kind: str, directory: Path, trust: bool, **options: Any) -> Any:
    """What transformers' `kind` ("AutoTokenizer", say) makes of a model directory; raises `ModelError`."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError:
        raise ModelError(
            f"{directory}: its processor needs transformers, which is not installed; pip install 'mpinfer[hf]'"
        ) from None
    logging.set_verbosity_error()
    try:
        return getattr(transformers, kind).from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust, **options
        )
    except Exception as error:
        raise ModelError(
            f"{directory}: {kind} of transformers cannot load it ({reason(error)}); install what it asks for, fetch "
            f"the model again, or set model.trust if it comes with code of its own"
        ) from error


def reason(error: Exception) -> str:
    """In one short line, what an error of another library says."""
    lines = (line.strip() for line in str(error).splitlines())
    line = next((line for line in lines if line), type(error).__name__)
    return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + "..."


def _kind(value: Any) -> str:
    """The type of the first thing in nested lists that is not a number."""
    pending = [value]
    while pending:
        first = pending.pop(0)
        if isinstance(first, list | tuple):
            pending[:0] = first
        elif not isinstance(first, bool | int | float | np.number):
            return first.dtype.name if isinstance(first, np.ndarray) else type(first).__name__
    return "a number of more than 64 bits"
