"""A strategy on a number of ranks, and what starts its runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpinfer.errors import MpinferError
from mpinfer.spec import JobSpec

Start = Callable[[int, Sequence[str], Path], None]
"""Runs a job in a world of so many ranks, with overrides, into a directory; raises `RunFailed`."""


class RunFailed(MpinferError):
    """A run did not complete; the message says why."""


@dataclass(eq=False)
class Cell:
    strategy: str
    ranks: int
    overrides: list[str] = field(default_factory=list)
    spec: JobSpec | None = None  # None for one that does not fit
    problem: str = ""
    twin: "Cell | None" = None  # of the same settings: its runs are this one's, too
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def own(self) -> "Cell":
        """Whose runs count."""
        return self.twin or self

    @property
    def is_complete(self) -> bool:
        return bool(self.own.runs)

    @property
    def output(self) -> Path:
        """Of its first run."""
        return Path(self.own.runs[0]["directory"])
