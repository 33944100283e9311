"""How much of sending is hidden while the sender computes."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import Any

import torch

from mpinfer.bench.speed import confirm
from mpinfer.bench.ways import Way
from mpinfer.errors import SpecError
from mpinfer.transport.endpoint import Endpoint
from mpinfer.transport.progress import check_progress, progressing

_ROWS = 256  # and columns of the matrices whose product is a piece of computing
_LEAST_PIECES = 20


@dataclass(frozen=True)
class Case:
    """A way to send, and what keeps the message moving."""

    way: Way
    between: Callable[[], object] = lambda: None  # called between two pieces of computing
    beside: Callable[[], AbstractContextManager[None]] = nullcontext  # lasts while the sender computes


def cases(endpoint: Endpoint, ways: Mapping[str, Way]) -> dict[str, Case]:
    """What there is on this rank: a thread only where MPI serves several."""
    channel, raw = ways["channel"], ways["raw"]
    found = {
        "channel, no calls": Case(channel),
        "channel, progress points": Case(channel, channel.progress),
        "channel, points and a thread": Case(channel, channel.progress, lambda: progressing(endpoint, "thread")),
        "Isend, no calls": Case(raw),
        "Isend, Test": Case(raw, raw.progress),
        "gloo, its own thread": Case(ways["gloo"]),
    }
    if not can_progress("thread"):
        del found["channel, points and a thread"]
    return found


def can_progress(how: str) -> bool:
    """Whether `transport.progress` may be `how` in this process."""
    try:
        check_progress(how)
    except SpecError:
        return False
    return True


def overlap(endpoint: Endpoint, ways: Mapping[str, Way], size: int, rounds: int) -> dict[str, Any]:
    """By case, the share of sending `size` bytes that is hidden behind about as much computing of the sender:
    1 - (both together - the computing alone) / the sending alone, the median over the rounds. For rank 0. Collective.
    """
    for way in ways.values():
        way.resize(size)
    tried = cases(endpoint, ways)
    one_s = median(_compute_s(1) for _ in range(_LEAST_PIECES))
    send_s = median(_send_s(endpoint, Case(ways["raw"]), 0) for _ in range(1 + rounds))
    pieces = max(_LEAST_PIECES, ceil(send_s / one_s))
    alone: dict[str, list[float]] = {name: [] for name in tried}
    hidden: dict[str, list[float]] = {name: [] for name in tried}
    computing = []
    for _ in range(rounds):
        endpoint.data.Barrier()
        if endpoint.rank == 0:
            computing.append(_compute_s(pieces))
        for name, case in tried.items():
            endpoint.data.Barrier()
            alone[name].append(_send_s(endpoint, case, 0))
            endpoint.data.Barrier()
            both_s = _send_s(endpoint, case, pieces)
            if endpoint.rank == 0:
                hidden[name].append(1 - (both_s - computing[-1]) / alone[name][-1])
    if endpoint.rank != 0:
        return {}
    return {
        "bytes": size,
        "compute_s": median(computing),
        "pieces": pieces,
        "library_progress": can_progress("library"),
        "send_s": {name: median(figures) for name, figures in alone.items()},
        "hidden": {name: median(figures) for name, figures in hidden.items()},
    }


def _send_s(endpoint: Endpoint, case: Case, pieces: int) -> float:
    """Seconds until rank 1 has said that a message is there, while rank 0 computes so many pieces."""
    started = time.perf_counter()
    if endpoint.rank == 0:
        case.way.start(0)
        with case.beside():
            _compute(pieces, case.between)
        case.way.finish()
    else:
        case.way.receive([0])
    confirm(endpoint)
    return time.perf_counter() - started


def _compute_s(pieces: int) -> float:
    started = time.perf_counter()
    _compute(pieces, lambda: None)
    return time.perf_counter() - started


def _compute(pieces: int, between: Callable[[], object]) -> None:
    matrix = torch.zeros(_ROWS, _ROWS)
    for _ in range(pieces):
        torch.mm(matrix, matrix)
        between()
