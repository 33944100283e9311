"""Weights of models that nobody has, for speed and memory: random numbers that are the same in every layout.

A tensor is a window that moves over one row of random numbers, so that a rank makes its own part of it from little.
"""

import zlib
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import nn

from mpinfer.models.checkpoint import Checkpoint
from mpinfer.models.sources import Slice, Source

_STEP = 17  # numbers from a row of a tensor to the next; one more to the next matrix


@dataclass(frozen=True)
class FakeSource(Source):
    """Makes a tensor, or a part of it, by its name."""

    def load(self, checkpoint: Checkpoint, target: torch.Tensor) -> int:
        """Fill `target`; nothing is read."""
        fill(self.names[0], target, self.part)
        return 0


class FakeStore:
    """Any tensor of a model, by its name."""

    def load(self, name: str, target: torch.Tensor, part: Slice | None = None) -> int:
        fill(name, target, part)
        return 0


def fake_sources(model: nn.Module, names: list[str]) -> dict[str, Source]:
    """The source of every tensor of `names`; tied ones have the same."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: FakeSource({"": [tied.get(name, name)]}) for name in names}


def fill(name: str, target: torch.Tensor, part: Slice | None) -> None:
    """Scaled so that signals neither grow nor vanish; what scales or normalizes is near 1, a variance above 0."""
    if not target.is_floating_point():
        target.data.zero_()
        return
    shape = target.shape if part is None else part.whole
    if len(shape) < 2:
        is_shift = name.endswith(("bias", "mean"))
        row = _numbers(name, prod(shape)) * 0.01
        whole = (row if is_shift else 1 + row).reshape(shape)
    else:
        rows = len(shape) - 1 if "experts" in name else 1  # leading axes: those of a mixture hold matrices, not kernels
        dense = list(accumulate(reversed(shape[rows + 1 :]), lambda a, b: a * b, initial=1))[::-1]
        strides = (*range(_STEP, _STEP + rows), *dense)
        row = _numbers(name, sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1)
        whole = row.mul_(prod(shape[rows:]) ** -0.5).as_strided(tuple(shape), strides)
    if part is None:
        target.data.copy_(whole)
        return
    done = 0
    for each in part.ranges:
        target.data.narrow(part.axis, done, len(each)).copy_(whole.narrow(part.axis, each.start, len(each)))
        done += len(each)


def _numbers(name: str, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
