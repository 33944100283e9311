"""Latency and bandwidth of ways to send: in turn, round after round, so that all of them meet the same moments, and
each of them comes after each other one."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

from mpinfer.bench.ways import MESSAGES, Way
from mpinfer.transport.endpoint import Endpoint

_MOST_REPEATS, _BURSTS_S = 100, 0.03  # of one size and way, a round: enough for what the way before it left in caches
_WORD_TAG = 3


def compare(endpoint: Endpoint, ways: Mapping[str, Way], size: int, rounds: int) -> dict[str, Any]:
    """Of messages of `size` bytes, by way, medians over the rounds: `latency_s`, half of a round trip; `bytes_per_s`,
    with several messages on their way; and what both are of `raw`'s in the same round. For rank 0. Collective."""
    for way in ways.values():
        way.resize(size)
        for index in range(MESSAGES):  # every buffer's pages are there, and connections are made
            _round_trip_s(endpoint, way, index)
    burst_s = min(_burst_s(endpoint, ways["raw"]) for _ in range(3))
    repeats = endpoint.broadcast(max(1, min(_MOST_REPEATS, int(_BURSTS_S / burst_s))))
    latency: dict[str, list[float]] = {name: [] for name in ways}
    bandwidth: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in _turned(ways, number):
            endpoint.data.Barrier()
            for index in range(MESSAGES):  # untimed: what the way before it left in caches is no fault of this one
                _round_trip_s(endpoint, way, index)
            latency[name].append(sum(_round_trip_s(endpoint, way, n % MESSAGES) for n in range(repeats)) / repeats / 2)
            burst_s = sum(_burst_s(endpoint, way) for _ in range(repeats)) / repeats
            bandwidth[name].append(MESSAGES * size / burst_s)
    return {
        "bytes": size,
        "latency_s": {name: median(figures) for name, figures in latency.items()},
        "latency_of_raw": _of_raw(latency),
        "bytes_per_s": {name: median(figures) for name, figures in bandwidth.items()},
        "bytes_per_s_of_raw": _of_raw(bandwidth),
    }


def _round_trip_s(endpoint: Endpoint, way: Way, index: int) -> float:
    started = time.perf_counter()
    if endpoint.rank == 1:
        way.receive([index])
    way.start(index)
    way.finish()
    if endpoint.rank == 0:
        way.receive([index])
    return time.perf_counter() - started


def _burst_s(endpoint: Endpoint, way: Way) -> float:
    """Until the other rank says that it has them all."""
    started = time.perf_counter()
    if endpoint.rank == 0:
        for index in range(MESSAGES):
            way.start(index)
        way.finish()
    else:
        way.receive(range(MESSAGES))
    confirm(endpoint)
    return time.perf_counter() - started


def confirm(endpoint: Endpoint) -> None:
    """Rank 0 waits for a word of rank 1."""
    word = bytearray(1)
    if endpoint.rank == 0:
        endpoint.data.Recv(word, 1, _WORD_TAG)
    else:
        endpoint.data.Send(word, 0, _WORD_TAG)


def _turned(ways: Mapping[str, Way], number: int) -> list[tuple[str, Way]]:
    """The ways in another order in each round: one that fills caches slows whatever follows it."""
    order = list(ways.items())
    step = 1 + number % (len(order) - 1)
    return [order[step * place % len(order)] for place in range(len(order))]


def _of_raw(figures: Mapping[str, list[float]]) -> dict[str, float]:
    return {
        name: median(own / raw for own, raw in zip(mine, figures["raw"], strict=True)) for name, mine in figures.items()
    }
