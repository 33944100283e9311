"""A thread on every rank that ends a world in which nothing moves, and says why.

A rank moves when an operation ends, when a message comes, and while it computes: when it waits for nobody, and its main
thread uses the processor or reads and writes. Of other ranks the main thread hears, which this thread interrupts for it
now and then (`transport/pulse.py`): this thread calls MPI for nothing but to end the world. A rank that waits is
stuck only when nobody moves. One that is stopped cannot tell: the others see that it is silent.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from mpinfer.errors import ExitCode

_LOOK_EVERY_S = 0.5
_BEATS, _BEAT_S = 12, 5.0  # in the time that nothing may move for, and at least every so many seconds
_SILENT_BEATS = 4  # that a rank may be late with its own
_EXPLAIN_S = 1.0  # for the others to explain themselves, too
_BEGINNING = 10  # times as patient before the loop: a library or a tensor may come from storage in one piece
_STEPS = 10  # that one step may take as long as when it was timed: in one call of torch nothing can be told
_BUSY_SHARE = 0.02  # of the time on the processor: less is no computing
_BUSY_BYTES = 1 << 16  # read or written between two looks
_WAKE = signal.SIGURG  # ignored by whoever does not handle it


class Activity(Protocol):
    """What this rank does."""

    @property
    def waiting(self) -> bool: ...

    def move(self) -> None: ...


class Sign(Protocol):
    """The last sign of life of a rank; its time is of `time.monotonic`."""

    heard_s: float
    waiting: bool
    doing: str


class Pulse(Protocol):
    """What this rank hears of others. Rank 0 hears of all, the others of rank 0."""

    @property
    def moved_s(self) -> float: ...

    @property
    def signs(self) -> Mapping[int, Sign]: ...

    def beat(self) -> None: ...

    def start_anew(self) -> None: ...


class Watchdog:
    """Watches from its creation, on the main thread, until `close`. With `timeout_s` 0 it does not.

    `end` ends the world with an exit code; `where` names this rank.
    """

    def __init__(
        self,
        activity: Activity,
        pulse: Pulse,
        timeout_s: float,
        where: Callable[[], str],
        end: Callable[[int], object],
    ) -> None:
        self._activity, self._pulse, self._where, self._end = activity, pulse, where, end
        self._timeout_s = timeout_s
        self.limit_s = _BEGINNING * timeout_s  # how long nothing may move
        self._main = threading.main_thread().ident or 0
        self._beat_next = self._looked = time.monotonic()
        self._effort = _effort(self._main)
        self._over = threading.Event()
        if timeout_s:
            signal.signal(_WAKE, lambda *_: pulse.beat())
            signal.siginterrupt(_WAKE, False)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin_loop(self, longest_step_s: float) -> None:
        """From now on ranks compute steps, of which the longest took so long when it was timed."""
        self._pulse.start_anew()
        self.limit_s = max(self._timeout_s, _STEPS * longest_step_s)

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        every_s = min(_LOOK_EVERY_S, self._timeout_s / _BEATS)
        while not self._over.wait(every_s):
            now = time.monotonic()
            if self.look(now) > every_s + self._timeout_s / _SILENT_BEATS:
                self._pulse.start_anew()  # stopped and continued, or the machine slept
            elif now - self._pulse.moved_s > self.limit_s:
                self._explain(now)
                self._end(ExitCode.FAULT)
            if now >= self._beat_next and not self._over.is_set():
                self._beat_next = now + min(self._timeout_s / _BEATS, _BEAT_S)
                signal.pthread_kill(self._main, _WAKE)

    def look(self, now: float) -> float:
        """Note whether this rank computes; returns the seconds since the last look."""
        passed_s, self._looked = now - self._looked, now
        (cpu_s, moved_bytes), self._effort = self._effort, _effort(self._main)
        busy = self._effort[0] - cpu_s > _BUSY_SHARE * passed_s or self._effort[1] - moved_bytes > _BUSY_BYTES
        if busy and not self._activity.waiting:
            self._activity.move()
        return passed_s

    def suspects(self, now: float) -> list[str]:
        """Who the others wait for: those that are silent, or else those that wait for nobody, or else all."""
        signs = self._pulse.signs
        silent_s = _SILENT_BEATS * self._timeout_s / _BEATS
        silent = [
            f"rank {rank} is silent for {now - sign.heard_s:.1f} s (stopped, hung or cut off); it was {sign.doing}"
            for rank, sign in signs.items()
            if now - sign.heard_s > silent_s
        ]
        idle = [f"rank {rank} does not get on: {sign.doing}" for rank, sign in signs.items() if not sign.waiting]
        return silent or idle or [f"rank {rank} is {sign.doing}" for rank, sign in signs.items()]

    def _explain(self, now: float) -> None:
        """In one piece, past the buffers that the main thread may hold."""
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        lines = [
            f"mpinfer: nothing has moved for {now - self._pulse.moved_s:.1f} s (watchdog.timeout_s="
            f"{self._timeout_s:g}); {self._where()}: {self._activity}; --resume continues the run",
            *(f"mpinfer: {suspect}" for suspect in self.suspects(now)),
        ]
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, ("\n".join(lines) + f"\n{stack}").encode())
        time.sleep(_EXPLAIN_S)


def _effort(thread: int) -> tuple[float, int]:
    """Seconds of a thread on the processor, and bytes that this process has read and written, where the kernel says."""
    seconds = time.clock_gettime(time.pthread_getcpuclockid(thread))
    try:
        counts = [int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines()]
    except OSError:
        counts = []
    return seconds, sum(counts)
