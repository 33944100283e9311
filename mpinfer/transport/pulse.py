"""What ranks know of each other's life: what this one does, and how long ago any of them moved.

Ranks tell rank 0 how long ago they moved, and rank 0 tells all of them how long ago any did: ages, since the clocks of
hosts differ. Those messages have a communicator of their own, and are no movement themselves.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mpi4py import MPI

from mpinfer.transport.lost import acknowledge, is_loss

_TAG = 1
_COORDINATOR = 0


@dataclass
class Activity:
    """What this rank does, noted by the main thread and read by the watchdog; times of `time.monotonic`."""

    operation: object = "computing"
    waiting: bool = False
    since_s: float = field(default_factory=time.monotonic)  # of the wait, or of the end of the last one
    moved_s: float = field(default_factory=time.monotonic)  # when this rank last got on with anything

    def wait_for(self, operation: object) -> tuple[object, bool]:
        """This rank waits from now on; returns what `resume` needs."""
        outer = self.operation, self.waiting
        self.operation, self.waiting, self.since_s = operation, True, time.monotonic()
        return outer

    def resume(self, outer: tuple[object, bool]) -> None:
        """What was waited for is there."""
        self.operation, self.waiting = outer
        self.since_s = self.moved_s = time.monotonic()

    def move(self) -> None:
        self.moved_s = time.monotonic()

    def __str__(self) -> str:
        doing = f"waiting for {self.operation}" if self.waiting else str(self.operation)
        return f"{doing} for {time.monotonic() - self.since_s:.1f} s"


@dataclass
class _Sign:
    """The last sign of life of another rank."""

    heard_s: float
    waiting: bool = False
    doing: str = "starting"
    moved_s: float | None = None  # when it last got on with anything
    vitals: Any = None  # as `Pulse.vitals` of that rank made them


class Pulse:
    """This rank's signs of life. Collective to make; `beat` is for the main thread."""

    def __init__(self, activity: Activity) -> None:
        self._comm, self._activity = MPI.COMM_WORLD.Dup(), activity
        size, now = self._comm.size, time.monotonic()
        others = range(1, size) if self._comm.rank == _COORDINATOR else (_COORDINATOR,)
        self.signs = {rank: _Sign(now) for rank in others}
        self._sends: dict[int, tuple[MPI.Request, bytes]] = {}
        self._others_moved_s = now
        self.vitals: Callable[[], Any] = lambda: None  # what else rank 0 hears of this one; JSON-able, and small

    @property
    def moved_s(self) -> float:
        """When any rank last got on with anything, as far as this one knows."""
        return max(self._activity.moved_s, self._others_moved_s)

    def start_anew(self) -> None:
        """Whatever came before says nothing: this process did not run."""
        now = time.monotonic()
        self._activity.moved_s = self._others_moved_s = now
        for sign in self.signs.values():
            sign.heard_s = now

    def forget(self, lost: set[int]) -> None:
        """They have died."""
        for rank in lost & self.signs.keys():
            del self.signs[rank]

    def beat(self) -> None:
        """Take in what others tell, and tell them. Who has not taken the last message in gets no other."""
        try:
            self._exchange()
        except MPI.Exception as error:
            if not is_loss(error):
                raise
            self.forget(acknowledge(self._comm))

    def _exchange(self) -> None:
        self._take_in()
        is_coordinator = self._comm.rank == _COORDINATOR
        moved_s = self.moved_s if is_coordinator else self._activity.moved_s  # nobody hears its own news again
        vitals = None if is_coordinator else self.vitals()
        news = [time.monotonic() - moved_s, self._activity.waiting, str(self._activity), vitals]
        body = json.dumps(news).encode()
        for rank in list(self.signs):
            last = self._sends.get(rank)
            if last is None or last[0].Test():
                self._sends[rank] = self._comm.Isend([body, MPI.BYTE], rank, _TAG), body

    def _take_in(self) -> None:
        status = MPI.Status()
        while (message := self._comm.Improbe(MPI.ANY_SOURCE, _TAG, status)) is not None:
            body = bytearray(status.Get_count(MPI.BYTE))
            message.Recv([body, MPI.BYTE])
            age_s, waiting, doing, vitals = json.loads(body)
            now = time.monotonic()
            self.signs[status.Get_source()] = _Sign(now, waiting, doing, now - age_s, vitals)
            self._others_moved_s = max(self._others_moved_s, now - age_s)
