"""`trace.json`: the phases of every rank and the messages between them, for Perfetto or chrome://tracing.

A process a rank; clocks are rank 0's, and time 0 is when the first of them began. What was not kept shows as one span.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from mpinfer.observe.account import PHASES
from mpinfer.observe.bins import Bins
from mpinfer.observe.recorder import POINT, SPAN, Entries

_COMPUTE = PHASES.index("compute")
_WORLD = 10**6  # the process of what is no rank's
_Point = tuple[int, int]  # rank, nanoseconds


def trace_json(
    ranks: Sequence[dict[str, Any]], traces: Sequence[dict[str, Any]], records: Bins, records_origin_s: float
) -> Iterator[bytes]:
    """The file, piece by piece. `ranks` as `timing.json` has them, and what each has recorded, in the same order;
    results that came to rank 0, and when it began to count them."""
    # Perfetto drops what is before time 0.
    origin_s = min(records_origin_s, *(trace["origin_s"] + trace["clock"]["offset_s"] for trace in traces))
    clocks = {str(rank["rank"]): trace["clock"] for rank, trace in zip(ranks, traces, strict=True)}
    yield f'{{"displayTimeUnit":"ms","otherData":{json.dumps({"clocks": clocks})},"traceEvents":[\n'.encode()
    yield b",\n".join(_counter(records, records_origin_s - origin_s))
    ends: tuple[dict[Any, _Point], dict[Any, _Point]] = {}, {}  # of messages: received, sent
    for rank, trace in zip(ranks, traces, strict=True):
        shift_s = trace["clock"]["offset_s"] - origin_s
        yield b"".join(b",\n" + event for event in _names(rank))
        yield b"".join(b",\n" + event for event in _spans(rank["rank"], trace, shift_s))
        for (channel, number), at in _points(trace, shift_s):
            ends[channel[-1]][*channel[:-1], number] = rank["rank"], at
    received, sent = ends
    for number, message in enumerate(sent.keys() & received.keys()):
        yield b"".join(b",\n" + event for event in _flow(number, message, sent[message], received[message]))
    yield b"\n]}\n"


def _names(rank: dict[str, Any]) -> Iterator[bytes]:
    number = rank["rank"]
    place = "/".join(str(rank["coordinates"][axis]) for axis in ("replica", "stage", "shard"))
    name = json.dumps(f"rank {number} node {rank['host']} {place}")
    yield _meta(number, "process_name", f'"name":{name}')
    yield _meta(number, "process_sort_index", f'"sort_index":{number}')
    yield _meta(number, "thread_name", '"name":"phases"')


def _meta(process: int, what: str, value: str) -> bytes:
    return f'{{"ph":"M","pid":{process},"tid":0,"name":"{what}","args":{{{value}}}}}'.encode()


def _spans(rank: int, trace: dict[str, Any], shift_s: float) -> Iterator[bytes]:
    if "spans" not in trace:
        return
    kept = Entries.from_dict(trace["spans"], SPAN)
    if kept.last:
        span = f'{{"ph":"X","pid":{rank},"tid":0,"name":"{kept.left_out} phases left out","args":{{}}'
        yield f"{span},{_time(kept.first[-1][1] + shift_s, kept.last[0][0] + shift_s)}}}".encode()
    for start_s, end_s, phase, step in (*kept.first, *kept.last):
        arguments = f'"step":{step}' if phase == _COMPUTE else ""
        span = f'{{"ph":"X","pid":{rank},"tid":0,"name":"{PHASES[phase]}","args":{{{arguments}}}'
        yield f"{span},{_time(start_s + shift_s, end_s + shift_s)}}}".encode()


def _points(trace: dict[str, Any], shift_s: float) -> Iterator[tuple[tuple[tuple[Any, ...], int], int]]:
    """Of each message that was kept: its channel and number, and when."""
    if "points" not in trace:
        return
    kept = Entries.from_dict(trace["points"], POINT)
    channels = [tuple(channel) for channel in trace["channels"]]
    for at_s, channel, number in (*kept.first, *kept.last):
        yield (channels[channel], number), _ns(at_s + shift_s)


def _flow(number: int, message: tuple[int, ...], sent: _Point, received: _Point) -> Iterator[bytes]:
    _, _, tag, count = message
    same = f'"id":{number},"tid":0,"cat":"message","name":"message","args":{{"tag":{tag},"number":{count}}}'
    yield f'{{"ph":"s","pid":{sent[0]},"ts":{_us(sent[1])},{same}}}'.encode()
    yield f'{{"ph":"f","bp":"e","pid":{received[0]},"ts":{_us(received[1])},{same}}}'.encode()


def _counter(records: Bins, shift_s: float) -> Iterator[bytes]:
    yield _meta(_WORLD, "process_name", '"name":"records"')
    yield _meta(_WORLD, "process_sort_index", '"sort_index":-1')
    tree, done = records.to_dict(), 0
    for place, count in enumerate([0, *tree["rows"][0]]):
        done += count
        ts = _us(_ns(place * tree["bin_s"] + shift_s))
        yield f'{{"ph":"C","pid":{_WORLD},"name":"records done","ts":{ts},"args":{{"records":{done}}}}}'.encode()


def _time(start_s: float, end_s: float) -> str:
    """Whole nanoseconds: what follows a span begins where that ends, and does not overlap it."""
    start, end = _ns(start_s), _ns(end_s)
    return f'"ts":{_us(start)},"dur":{_us(end - start)}'


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _us(nanoseconds: int) -> str:
    sign, (whole, part) = "-" * (nanoseconds < 0), divmod(abs(nanoseconds), 1000)
    return f"{sign}{whole}.{part:03}"
