"""What becomes of a batch that memory does not suffice for: it is computed in halves, and those in halves."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from mpinfer.errors import OutOfMemoryError

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Halving:
    """Counts how often it had to be."""

    def __init__(self, obstacle: str = "") -> None:
        """`obstacle`: why no batch can be computed in halves, if none can."""
        self._obstacle = obstacle
        self.count = 0

    def run(
        self,
        compute: Callable[[Piece], Result],
        piece: Piece,
        halve: Callable[[Piece], tuple[Piece, Piece] | None],
    ) -> list[tuple[Piece, Result | None]]:
        """`piece`, or as many parts of it as memory asks for, in order, each with its result.

        None stands for the result of a part that memory does not suffice for and that `halve` cannot halve. Raises
        `OutOfMemoryError` where there is an obstacle.
        """
        try:
            return [(piece, compute(piece))]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = " ".join(str(error).split())[:200]
        # Only now: the exception held on to what had been computed.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if self._obstacle:
            raise OutOfMemoryError(
                f"out of memory in a batch that cannot be halved, since {self._obstacle} ({problem}); lower "
                f"parallel.micro_batch, or give each rank more memory, and --resume"
            )
        self.count += 1
        halves = halve(piece)
        if halves is None:
            return [(piece, None)]
        return [found for half in halves for found in self.run(compute, half, halve)]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation has failed. That of torch on a CPU raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class RecordAxes:
    """Where the records of a batch lie in the values that cross a cut of a program."""

    def __init__(self, values: Iterable[Any], batch: set[Any]) -> None:
        """`values`: symbolic, as the program has them; `batch`: the symbols of the number of records."""
        self._axes = [_axis(value, batch) for value in values]

    @property
    def are_known(self) -> bool:
        """Whether records can be taken out of a batch, and put together to one."""
        return _UNKNOWN not in self._axes

    def take(self, values: Sequence[Any], start: int, stop: int) -> list[Any]:
        """Of a batch's values those of the records [start, stop)."""
        return [
            value if axis is None else stop - start if axis == _COUNT else value.narrow(axis, start, stop - start)
            for value, axis in zip(values, self._axes, strict=True)
        ]

    def join(self, pieces: Sequence[Sequence[Any]]) -> list[Any]:
        """The values of one batch, of those of several."""
        return [
            found[0] if axis is None else sum(found) if axis == _COUNT else torch.cat(found, axis)
            for found, axis in zip(zip(*pieces, strict=True), self._axes, strict=True)
        ]


_COUNT, _UNKNOWN = -1, -2


def _axis(value: Any, batch: set[Any]) -> int | None:
    """Of a tensor the axis of records; whether a number is that of records; None for what is the same for all."""
    sizes = list(value.shape) if isinstance(value, torch.Tensor) else [value]
    own = [(axis, _formula(size)) for axis, size in enumerate(sizes) if batch & _symbols(size)]
    if not own:
        return None
    (axis, formula), *others = own
    if others or formula not in batch:
        return _UNKNOWN
    return axis if isinstance(value, torch.Tensor) else _COUNT


def _formula(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _symbols(size: Any) -> set[Any]:
    return _formula(size).free_symbols if isinstance(size, torch.SymInt) else set()
