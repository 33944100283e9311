"""Stop in order when told to by SIGTERM, SIGINT or SIGUSR1: of a scheduler, before a time limit, or of a user.

While nothing is in hand the world ends at once. Later rank 0 hands out no more records, what has begun is finished, and
every rank leaves with the exit code of an interrupted run. Who is told twice does not wait for that, and nobody waits
longer than the drain limit.

A thread of its own takes signals, from a pipe that the interpreter writes to when they come: Python's handlers run on
the main thread alone, and not while that computes. It calls MPI for nothing but to end the world.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

from mpinfer.errors import ExitCode
from mpinfer.transport.control import COORDINATOR, STOP
from mpinfer.transport.endpoint import Endpoint

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_AGAIN_S = 1.0  # sooner it is the same request: launchers and schedulers both pass signals on
_FIRST_S = 1.0  # for rank 0 to end the world, if it was told, too: one line is enough
_LONGEST_S = 86400.0  # between two looks at nothing
_HEARD = 0  # of another rank; no signal has this number


class Stop:
    """This rank's part in it, from its creation on; on the main thread, one in a process."""

    def __init__(self, endpoint: Endpoint, where: Callable[[], str]) -> None:
        self._endpoint, self._where = endpoint, where
        self._draining = False  # whether a stop waits for work in hand,
        self._limit_s = 0.0  # and how long
        self._asked_s: float | None = None
        self._told = False
        self._save: Callable[[], None] = lambda: None
        reads, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reads,), name="stop", daemon=True).start()

    def drain(self, limit_s: float, save: Callable[[], None] = lambda: None) -> None:
        """From now on there is work in hand to be finished first; `save` is called before the world ends without it."""
        self._limit_s, self._save, self._draining = limit_s, save, True
        self._endpoint.attach(self)

    def close(self) -> None:
        """Give signals back to who had them before."""
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._pipe)  # which ends the thread

    def complete_finished(self) -> None:
        """At every progress point: tell rank 0, once."""
        if self._asked_s is not None and not self._told:
            self._told = True
            self._endpoint.send(COORDINATOR, STOP, None)

    def hear(self) -> None:
        """Rank 0 was told by another rank: the drain limit runs here, too."""
        os.write(self._pipe, bytes([_HEARD]))

    def _listen(self, reads: int) -> None:
        while True:
            limit_s = _LONGEST_S if self._asked_s is None else self._asked_s + self._limit_s - time.monotonic()
            if not select.select([reads], [], [], max(0.0, limit_s))[0]:
                if self._asked_s is not None:
                    self._end(f"work in hand was not finished within {self._limit_s:g} s (stop.drain_limit_s)")
                continue
            if not (read := os.read(reads, 1)):
                os.close(reads)
                return
            number = read[0]
            if number == _HEARD:
                self._asked_s = self._asked_s or time.monotonic()
            elif number not in _SIGNALS:
                continue  # the pipe tells of others, too
            elif not self._draining:
                self._end("nothing was in hand")
            elif self._asked_s is None:
                self._asked_s = time.monotonic()
            elif time.monotonic() > self._asked_s + _AGAIN_S:
                self._end("told twice")

    def _end(self, why: str) -> None:
        if self._endpoint.rank != COORDINATOR:
            time.sleep(_FIRST_S)
        sys.stderr.write(f"mpinfer: interrupted on {self._where()}: {why}; --resume continues the run\n")
        try:
            self._save()
        finally:
            self._endpoint.abort(ExitCode.INTERRUPTED)
