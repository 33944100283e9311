"""How fast messages go between ranks: measured before a plan is made, in a fraction of a second.

One pair of ranks at a time exchanges messages, and the others sleep in a collective: neither their traffic nor their
polling is measured. A pair's first rank leads: it tells the other what comes next and when to stop, so that one clock
keeps the time that a pair may take.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

from mpi4py import MPI

from mpinfer.plan.machine import TYPICAL_INSIDE, Link
from mpinfer.transport.endpoint import Endpoint

_PAIRS_BETWEEN = 4
_BUDGET_S = 0.1  # of a pair, and so many round trips; the round that is under way then is finished
_ROUND_TRIPS = 30  # so that far apart, too, there is time for TCP to open its window
_MOST_S = 0.4  # of a pair, all the same
_PINGS = 100
_TRANSFERS = 6  # of one size
_MESSAGES = 4  # of a transfer, on their way at once
_SIZES = (2**14, 2**17, 2**20)  # bytes of a message; a slow network uses up the budget before the largest
_SPIN_S = 2e-3  # the other rank answers at once, unless it waits for a core

_MANY_ROUND_TRIPS = 4.0  # a transfer that takes fewer is mostly latency: it says little, larger ones more
_LEAST_SHARE = 0.1  # of a transfer's time that its bytes take, whatever the latency was

_TAG = 1
_PING, _STOP = 0, -1  # orders; any other is the size of the messages that follow


def measure_links(endpoint: Endpoint, nodes: Sequence[int]) -> tuple[Link, Link | None]:
    """What messages cost inside a node, and between nodes where there are several. Every rank gets the same numbers.

    Collective. `nodes` holds the node of every rank. Inside is measured between two neighbouring ranks of the first
    node that has two; where none has, it is `TYPICAL_INSIDE`. Between nodes, up to `_PAIRS_BETWEEN` pairs of first
    ranks of successive nodes are measured, and the worst figures count: a pipeline is as fast as its slowest link, and
    each pair's own figures are already the best of several, so what is left between them is no chance.
    """
    inside = [_measure(endpoint, *pair) for pair in _pair_inside(nodes)]
    between = [_measure(endpoint, *pair) for pair in _pairs_between(nodes)]
    return _worst(inside) or TYPICAL_INSIDE, _worst(between)


def _pair_inside(nodes: Sequence[int]) -> list[tuple[int, int]]:
    """None or one: the nodes of a cluster are much alike in this."""
    last: dict[int, int] = {}
    for rank, node in enumerate(nodes):
        if node in last:
            return [(last[node], rank)]
        last[node] = rank
    return []


def _pairs_between(nodes: Sequence[int]) -> list[tuple[int, int]]:
    """The first ranks of a node and the next; of many such pairs a few, spread over all."""
    first: dict[int, int] = {}
    for rank, node in enumerate(nodes):
        first.setdefault(node, rank)
    pairs = list(pairwise(first.values()))
    count = min(_PAIRS_BETWEEN, len(pairs))
    return [pairs[len(pairs) * n // count] for n in range(count)]


def _worst(links: Sequence[Link]) -> Link | None:
    if not links:
        return None
    return Link(max(link.latency_s for link in links), min(link.bytes_per_s for link in links))


def _measure(endpoint: Endpoint, leader: int, follower: int) -> Link:
    """The link between two ranks, told to all. Collective."""
    figures = None
    if endpoint.rank == leader:
        figures = _lead(_Peer(endpoint, follower))
    elif endpoint.rank == follower:
        _follow(_Peer(endpoint, leader))
    return Link(*endpoint.broadcast(figures, root=leader))


def _lead(follower: "_Peer") -> tuple[float, float]:
    """Half the round trip of a small message in seconds, and bytes per second of large ones; the best of each."""
    follower.ping_s()  # the follower may come late: the clock starts once it is there
    started = time.perf_counter()
    latency_s = min(_repeat(follower.ping_s, _PINGS, started + _BUDGET_S / 2)) / 2
    deadline = started + min(_BUDGET_S + _ROUND_TRIPS * 2 * latency_s, _MOST_S)
    for size in _SIZES:
        if size == _SIZES[0] or time.perf_counter() < deadline:
            transfer_s = follower.transfer_s(size)
            if transfer_s > _MANY_ROUND_TRIPS * 2 * latency_s or size == _SIZES[-1]:
                transfer_s = min(transfer_s, *_repeat(partial(follower.transfer_s, size), _TRANSFERS, deadline))
            # Messages and answer take the latency, too; where that is nearly all, what is left is a rough guess.
            bytes_per_s = _MESSAGES * size / max(transfer_s - 2 * latency_s, _LEAST_SHARE * transfer_s)
    follower.tell(_STOP)
    return latency_s, bytes_per_s


def _repeat(measure_s: Callable[[], float], most: int, deadline: float) -> Iterator[float]:
    """Up to `most` measurements, at least one; none begins after the deadline."""
    yield measure_s()
    for _ in range(most - 1):
        if time.perf_counter() > deadline:
            return
        yield measure_s()


def _follow(leader: "_Peer") -> None:
    while (order := leader.hear()) != _STOP:
        if order == _PING:
            leader.tell(_PING)
        else:
            leader.take(order)


class _Peer:
    """The other rank of a pair."""

    def __init__(self, endpoint: Endpoint, rank: int) -> None:
        self._endpoint, self._rank = endpoint, rank
        self._order = bytearray(8)
        self._data = memoryview(bytearray(b"\1") * (_MESSAGES * _SIZES[-1]))  # written once: its pages are there

    def ping_s(self) -> float:
        """Seconds until a small message is answered."""
        started = time.perf_counter()
        self.tell(_PING)
        self.hear()
        return time.perf_counter() - started

    def transfer_s(self, size: int) -> float:
        """Seconds until the other rank says that it has some messages of `size` bytes, for which it was ready."""
        self.tell(size)
        self.hear()
        started = time.perf_counter()
        self._wait([self._endpoint.data.Isend([part, MPI.BYTE], self._rank, _TAG) for part in self._parts(size)])
        self.hear()
        return time.perf_counter() - started

    def take(self, size: int) -> None:
        """The other side of `transfer_s`."""
        receives = [self._endpoint.data.Irecv([part, MPI.BYTE], self._rank, _TAG) for part in self._parts(size)]
        self.tell(size)
        self._wait(receives)
        self.tell(size)

    def tell(self, order: int) -> None:
        message = order.to_bytes(8, "little", signed=True)
        self._wait([self._endpoint.data.Isend([message, MPI.BYTE], self._rank, _TAG)])

    def hear(self) -> int:
        self._wait([self._endpoint.data.Irecv([self._order, MPI.BYTE], self._rank, _TAG)])
        return int.from_bytes(self._order, "little", signed=True)

    def _parts(self, size: int) -> list[memoryview]:
        return [self._data[n * size : (n + 1) * size] for n in range(_MESSAGES)]

    def _wait(self, requests: list[MPI.Request]) -> None:
        """Poll without a pause, which would be measured, but let others have the core; then patiently."""
        started = time.perf_counter()
        while not MPI.Request.Testall(requests):
            if time.perf_counter() - started > _SPIN_S:
                self._endpoint.wait_until(partial(MPI.Request.Testall, requests), f"rank {self._rank}, measuring links")
                return
            os.sched_yield()
