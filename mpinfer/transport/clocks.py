"""How far a rank's clock is from rank 0's.

`time.perf_counter` is the monotonic clock of a kernel: ranks of one share it to the nanosecond, those of different
hosts have nothing in common. So one rank of each kernel compares: along a tree, in as many rounds as the number of
kernels has binary digits, each by several round trips of which the quickest says most (Cristian, 1989).
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from mpi4py import MPI

from mpinfer.transport.endpoint import Endpoint

_TAG = 0  # of no channel
_PINGS = 20
_SPIN_S = 2e-3  # the other rank answers at once, unless it waits for a core
_PAIR = Struct("<dd")


@dataclass(frozen=True)
class Clock:
    """What to add to this rank's `time.perf_counter` for rank 0's, and how far off that may be."""

    offset_s: float
    uncertainty_s: float


def compare_clocks(endpoint: Endpoint, kernel: str | None = None) -> Clock:
    """Collective. `kernel` names the clock that this rank reads; by default it is found out."""
    kernels = endpoint.all_gather(kernel or _kernel())
    firsts = [kernels.index(each) for each in dict.fromkeys(kernels)]
    if len(firsts) == 1:
        return Clock(0.0, 0.0)
    own = _along_tree(endpoint, firsts) if endpoint.rank in firsts else None
    clocks = endpoint.all_gather(own and [own.offset_s, own.uncertainty_s])
    return Clock(*clocks[kernels.index(kernels[endpoint.rank])])


def _kernel() -> str:
    """A host since its last start, and its namespace of clocks, which containers may have of their own."""
    try:
        space = os.readlink("/proc/self/ns/time")
    except OSError:  # older than these namespaces
        space = ""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + space


def _along_tree(endpoint: Endpoint, ranks: list[int]) -> Clock:
    """Those that know their clock teach as many others in each round."""
    place, clock, known = ranks.index(endpoint.rank), Clock(0.0, 0.0), 1
    while known < len(ranks):
        if place < known and place + known < len(ranks):
            _Peer(endpoint, ranks[place + known]).teach(clock)
        elif known <= place < 2 * known:
            clock = _Peer(endpoint, ranks[place - known]).learn()
        known *= 2
    return clock


class _Peer:
    def __init__(self, endpoint: Endpoint, rank: int) -> None:
        self._endpoint, self._rank = endpoint, rank

    def teach(self, own: Clock) -> None:
        self._ping()  # it may come late
        round_trip_s, offset_s = min(self._ping() for _ in range(_PINGS))
        self._send(own.offset_s + offset_s, own.uncertainty_s + round_trip_s / 2)

    def learn(self) -> Clock:
        for _ in range(1 + _PINGS):
            self._receive()
            self._send(time.perf_counter(), 0.0)
        return Clock(*self._receive())

    def _ping(self) -> tuple[float, float]:
        """Seconds of a round trip, and what leads from the other's clock to this one's."""
        started = time.perf_counter()
        self._send(0.0, 0.0)
        theirs, _ = self._receive()
        ended = time.perf_counter()
        return ended - started, (started + ended) / 2 - theirs

    def _send(self, *values: float) -> None:
        data = _PAIR.pack(*values)
        self._wait(self._endpoint.data.Isend([data, MPI.BYTE], self._rank, _TAG))

    def _receive(self) -> tuple[float, float]:
        data = bytearray(_PAIR.size)
        self._wait(self._endpoint.data.Irecv([data, MPI.BYTE], self._rank, _TAG))
        first, second = _PAIR.unpack(data)
        return first, second

    def _wait(self, request: MPI.Request) -> None:
        started = time.perf_counter()
        while not request.Test():
            if time.perf_counter() - started > _SPIN_S:
                self._endpoint.wait_until(request.Test, f"rank {self._rank}, comparing clocks")
                return
            os.sched_yield()
