"""How a tensor lies in a message: as it is, or in fewer bytes where `transport.wire` allows a loss.

Each class is bound to a piece of memory and a tensor's type and shape: `put` encodes into that memory, `get` decodes.
What is lost, of numbers x that arrive as y:

- `bf16` keeps the range of float32: |x - y| <= |x| / 2**8.
- `fp16` has 65504 as its largest number, beyond which is infinity: |x - y| <= |x| / 2**11, below 6e-5 2**-25 at most.
- `int8` keeps 8 bits and one float32 scale for each row (the innermost dimension: a token's activations, the channels
  of a pixel): |x - y| <= largest |x| of the row / 254, as the rows of LLM.int8() (Dettmers et al., 2022). A row with a
  number that is not finite arrives as NaN.
"""

from collections.abc import Sequence
from ctypes import memmove
from math import prod
from typing import Protocol

import torch

from mpinfer.spec import Wire

ALIGNMENT_BYTES = 64

Shape = tuple[int, ...]


def padded(size_bytes: int) -> int:
    """What a tensor of so many bytes takes in a message."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Encoded(Protocol):
    """A tensor of known type and shape in a piece of memory of `size_bytes`."""

    def __init__(self, space: torch.Tensor, dtype: torch.dtype, shape: Shape) -> None: ...

    @staticmethod
    def size_bytes(dtype: torch.dtype, shape: Shape) -> int: ...

    def put(self, value: torch.Tensor) -> None:
        """Of a tensor on a GPU it is there once the GPU has done what it was asked for."""

    def get(self) -> torch.Tensor:
        """On the device of the memory."""


class Plain:
    """As it is. `get` gives the memory itself."""

    def __init__(self, space: torch.Tensor, dtype: torch.dtype, shape: Shape) -> None:
        self._view = _view(space, 0, dtype, shape)
        self._address, self._size_bytes = self._view.data_ptr(), self._view.nbytes

    @staticmethod
    def size_bytes(dtype: torch.dtype, shape: Shape) -> int:
        return padded(prod(shape) * dtype.itemsize)

    def put(self, value: torch.Tensor) -> None:
        self._view.copy_(value, non_blocking=True)

    def put_dense(self, value: torch.Tensor) -> None:
        """As `put` does, of numbers in their order in memory on the host, in half of the time that torch takes."""
        memmove(self._address, value.data_ptr(), self._size_bytes)

    def get(self) -> torch.Tensor:
        return self._view


class Rounded:
    """As numbers of 16 bits."""

    wire_dtype: torch.dtype

    def __init__(self, space: torch.Tensor, dtype: torch.dtype, shape: Shape) -> None:
        self._dtype = dtype
        self._view = _view(space, 0, self.wire_dtype, shape)

    @classmethod
    def size_bytes(cls, dtype: torch.dtype, shape: Shape) -> int:
        return padded(prod(shape) * cls.wire_dtype.itemsize)

    def put(self, value: torch.Tensor) -> None:
        self._view.copy_(value, non_blocking=True)

    def get(self) -> torch.Tensor:
        return self._view.to(self._dtype)


class RoundedBfloat16(Rounded):
    wire_dtype = torch.bfloat16


class RoundedFloat16(Rounded):
    wire_dtype = torch.float16


class ScaledRows:
    """A float32 scale for each row, then each number as a multiple of its row's scale, from -127 to 127."""

    _STEPS = 127
    _LEAST = 1e-30  # a row whose largest number is smaller arrives as zeros

    def __init__(self, space: torch.Tensor, dtype: torch.dtype, shape: Shape) -> None:
        self._dtype, self._shape = dtype, shape
        width = _width(shape)
        rows = prod(shape) // width
        self._scales = _view(space, 0, torch.float32, (rows, 1))
        self._steps = _view(space, padded(self._scales.nbytes), torch.int8, (rows, width))

    @staticmethod
    def size_bytes(dtype: torch.dtype, shape: Shape) -> int:
        numbers = prod(shape)
        return padded(numbers // _width(shape) * torch.float32.itemsize) + padded(numbers)

    def put(self, value: torch.Tensor) -> None:
        rows = value.reshape(self._steps.shape).float()
        least, most = torch.aminmax(rows, dim=1, keepdim=True)
        largest = torch.maximum(most, -least)
        self._scales.copy_(largest / self._STEPS, non_blocking=True)
        self._steps.copy_((rows * (self._STEPS / largest.clamp(min=self._LEAST))).round_(), non_blocking=True)

    def get(self) -> torch.Tensor:
        return (self._steps * self._scales).to(self._dtype).view(self._shape)


ENCODINGS: Sequence[type[Encoded]] = (Plain, RoundedBfloat16, RoundedFloat16, ScaledRows)
"""By the number that stands for each in a message."""

_LOSSY: dict[Wire, type[Encoded]] = {"bf16": RoundedBfloat16, "fp16": RoundedFloat16, "int8": ScaledRows}


def encoding_of(wire: Wire, dtype: torch.dtype, shape: Shape) -> type[Encoded]:
    """How such a tensor travels: floats encoded where that makes them smaller, all others as they are."""
    lossy = _LOSSY.get(wire)
    if lossy is None or not dtype.is_floating_point or not prod(shape):
        return Plain
    return lossy if lossy.size_bytes(dtype, shape) < Plain.size_bytes(dtype, shape) else Plain


def encoded_bytes(wire: Wire, row_bytes: float, item_bytes: int = torch.float32.itemsize) -> float:
    """Of a row of floats of `item_bytes` each: what the planner reckons with."""
    if wire == "none":
        return row_bytes
    if wire == "int8":
        return row_bytes / item_bytes + torch.float32.itemsize
    return row_bytes * min(1.0, 2 / item_bytes)


def _width(shape: Shape) -> int:
    return shape[-1] if shape else 1


def _view(space: torch.Tensor, offset: int, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
    return space[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
