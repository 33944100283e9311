"""What a rank remembers of its loop: seconds of each phase over time, exactly; phases and messages one by one, the
first and the last so many. All of it is bounded, whatever the length of the run, and most of it allocated once."""

import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Any

from mpinfer.observe.bins import Bins

# Of all ranks together: a browser opens such a trace, and one page shows such a timeline.
_SPANS, _BINS = 500_000, 1 << 16
_SPANS_A_RANK, _BINS_A_RANK, _LEAST_BINS = 1 << 14, 512, 64
SPAN = Struct("<ddBq")  # start, end, phase, step
POINT = Struct("<dHq")  # when, channel, number of the message
MICRO = 1e6


class Kept:
    """The first and the last entries of ever so many."""

    def __init__(self, entry: Struct, most: int) -> None:
        self._entry, self._half = entry, max(1, most // 2)
        self._memory = bytearray(2 * self._half * entry.size)
        self.total = 0

    def add(self, *values: float) -> None:
        place = self.total
        self.total += 1
        if place >= 2 * self._half:
            place = self._half + place % self._half
        self._entry.pack_into(self._memory, place * self._entry.size, *values)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in order."""
        size, half = self._entry.size, self._half
        first = self._memory[: min(self.total, 2 * half) * size]
        if self.total > 2 * half:
            oldest = (half + self.total % half) * size
            first = self._memory[: half * size] + self._memory[oldest:] + self._memory[half * size : oldest]
        left_out = max(0, self.total - 2 * half)
        return {"entries": b64encode(first).decode(), "left_out": left_out, "after": half if left_out else 0}


@dataclass(frozen=True)
class Entries:
    """What was kept, as another rank reads it."""

    first: list[tuple[Any, ...]]
    last: list[tuple[Any, ...]]  # empty where nothing was left out
    left_out: int  # between the two

    @classmethod
    def from_dict(cls, tree: dict[str, Any], entry: Struct) -> "Entries":
        every = list(entry.iter_unpack(b64decode(tree["entries"])))
        cut = tree["after"] or len(every)
        return cls(every[:cut], every[cut:], tree["left_out"])


class Recorder:
    """Is told of every phase that is over, and of messages. `most` spans are kept, and a quarter as many messages."""

    def __init__(self, most: int = 0, bins: int = _BINS_A_RANK) -> None:
        self._count = bins
        self._spans = Kept(SPAN, most) if most else None
        self._points = Kept(POINT, most // 4) if most else None
        self._channels: list[list[Any]] = []
        self.step = 0  # that this rank works on
        self.clock = {"offset_s": 0.0, "uncertainty_s": 0.0}  # what leads to rank 0's, once that is known
        self.restart(time.perf_counter())

    @classmethod
    def of_world(cls, ranks: int, trace: bool) -> "Recorder":
        bins = max(_LEAST_BINS, min(_BINS_A_RANK, _BINS // ranks))
        return cls(min(_SPANS_A_RANK, _SPANS // ranks) if trace else 0, bins)

    def restart(self, now: float) -> None:
        """Forget everything but which channels there are: the loop begins now."""
        self._origin_s = now
        self.bins = Bins(_PHASES, self._count)
        for kept in (self._spans, self._points):
            if kept is not None:
                kept.total = 0

    def add(self, phase: int, start_s: float, end_s: float) -> None:
        origin_s = self._origin_s
        self.bins.add(phase, start_s - origin_s, end_s - origin_s)
        if self._spans is not None:
            self._spans.add(start_s, end_s, phase, self.step)

    def messages(self, source: int, destination: int, tag: int, sent: bool) -> Callable[[int], None]:
        """To be called with a message's number when its send starts (`sent`), or once it has been received."""
        points = self._points
        if points is None:
            return _forget
        channel = len(self._channels)
        self._channels.append([source, destination, tag, sent])

        def note(number: int) -> None:
            points.add(time.perf_counter(), channel, number)

        return note

    def to_dict(self) -> dict[str, Any]:
        """What rank 0 gets; times of this rank's `time.perf_counter`."""
        tree = {"origin_s": self._origin_s, "clock": self.clock, "bins": self.bins.to_dict(MICRO)}
        if self._spans is not None and self._points is not None:
            tree |= {
                "spans": self._spans.to_dict(),
                "points": self._points.to_dict(),
                "channels": self._channels,
            }
        return tree


_PHASES = 5  # of an account


def _forget(number: int) -> None:
    """Nobody asked for a trace."""
