"""trace.json and timeline.json, of made-up ranks."""

import json
import time
from collections import defaultdict
from typing import Any

import pytest

from mpinfer.observe.account import PHASES
from mpinfer.observe.bins import Bins
from mpinfer.observe.recorder import Recorder
from mpinfer.observe.timeline import bubble, timeline
from mpinfer.observe.trace import trace_json

WALL_S = 1.0


def ranks(count: int) -> list[dict[str, Any]]:
    """As timing.json has them: idle fills up what is missing to the wall."""
    return [
        {"rank": n, "host": f'"n{n}"', "coordinates": {"replica": 0, "stage": n, "shard": 0}, "idle_s": 0.4}
        for n in range(count)
    ]


def recorded(origin_s: float, offset_s: float = 0.0, most: int = 100, steps: int = 6) -> dict[str, Any]:
    """Six steps of 0.1 s, of which half is computed and half waited; then this rank is through."""
    recorder = Recorder(most, bins=64)
    recorder.clock = {"offset_s": offset_s, "uncertainty_s": 1e-6}
    recorder.restart(origin_s)
    for step in range(steps):
        at_s = origin_s + step * 0.1
        recorder.step = step
        recorder.add(PHASES.index("receive_wait"), at_s, at_s + 0.05)
        recorder.add(PHASES.index("compute"), at_s + 0.05, at_s + 0.1)
    return json.loads(json.dumps(recorder.to_dict()))


def results() -> Bins:
    bins = Bins(1, 64)
    for at_s in (0.1, 0.2, 0.9):
        bins.count(0, at_s)
    return bins


def events(traces: list[dict[str, Any]], records_origin_s: float = 50.0) -> list[dict[str, Any]]:
    data = b"".join(trace_json(ranks(len(traces)), traces, results(), records_origin_s))
    return json.loads(data)["traceEvents"]


def test_every_rank_is_a_process_on_the_clock_of_rank_0() -> None:
    found = events([recorded(50.0), recorded(7.01, offset_s=43.0)])
    names = {event["pid"]: event["args"]["name"] for event in found if event["name"] == "process_name"}
    assert names.items() >= {0: 'rank 0 node "n0" 0/0/0', 1: 'rank 1 node "n1" 0/1/0'}.items()
    spans = defaultdict(list)
    for event in found:
        if event["ph"] == "X":
            spans[event["pid"]].append(event)
    assert [spans[rank][0]["ts"] for rank in (0, 1)] == [0, pytest.approx(10_000)]
    for own in spans.values():
        assert [span["name"] for span in own] == ["receive_wait", "compute"] * 6
        assert [span["args"].get("step") for span in own if span["name"] == "compute"] == list(range(6))
        ends = [round(1000 * (span["ts"] + span["dur"])) for span in own]
        assert [round(1000 * span["ts"]) for span in own[1:]] == ends[:-1]  # to the nanosecond
    done = [event["args"]["records"] for event in found if event["ph"] == "C"]
    assert done == sorted(done)
    assert done[-1] == 3


def test_nothing_is_before_time_0() -> None:
    found = events([recorded(50.0)], records_origin_s=49.5)
    assert min(event["ts"] for event in found if event["ph"] == "C") == 0
    assert min(event["ts"] for event in found if event["ph"] == "X") == 500_000


def test_messages_are_drawn_where_both_ends_are_known() -> None:
    sender, receiver = Recorder(100), Recorder(100)
    for recorder, sent in ((sender, True), (receiver, False)):
        note = recorder.messages(0, 1, 7, sent)
        started = time.perf_counter()
        for number in range(3 if sent else 1, 5):
            note(number)
        recorder.add(0, started, time.perf_counter())
    assert sender.to_dict()["origin_s"] < receiver.to_dict()["origin_s"]
    found = events([sender.to_dict(), receiver.to_dict()])
    starts, ends = ([e for e in found if e["ph"] == kind] for kind in ("s", "f"))
    assert [event["args"]["number"] for event in starts] == [event["args"]["number"] for event in ends]
    assert {event["args"]["number"] for event in starts} == {3, 4}
    assert {event["pid"] for event in starts} == {0}
    assert {event["pid"] for event in ends} == {1}
    for start, end in zip(starts, ends, strict=True):
        assert start["id"] == end["id"]
        assert start["ts"] <= end["ts"]
        assert end["bp"] == "e"
    assert len({event["id"] for event in starts}) == 2


def test_what_was_left_out_shows_as_one_span() -> None:
    found = [event for event in events([recorded(50.0, most=4)]) if event["ph"] == "X"]
    assert [event["name"] for event in found] == [
        "8 phases left out",
        "receive_wait",
        "compute",
        "receive_wait",
        "compute",
    ]
    gap, _, before, after, _ = found
    assert gap["ts"] == pytest.approx(before["ts"] + before["dur"])
    assert gap["ts"] + gap["dur"] == pytest.approx(after["ts"])


def test_without_spans_there_are_processes_all_the_same() -> None:
    found = events([recorded(50.0, most=0)])
    assert {event["ph"] for event in found} == {"M", "C"}


def test_the_timeline_sums_up_to_the_account() -> None:
    every = ranks(2)
    traces = [recorded(50.0), recorded(7.0, offset_s=43.004)]
    times = json.loads(json.dumps(timeline(every, traces, results())))
    assert [rank["start_s"] for rank in times["ranks"]] == [0, pytest.approx(0.004)]
    for rank in times["ranks"]:
        seconds = [sum(row) / 1e6 for row in rank["microseconds"]]
        assert dict(zip(times["phases"], seconds, strict=True)) == pytest.approx(
            {"compute": 0.3, "send_wait": 0, "receive_wait": 0.3, "idle": 0.4, "overhead": 0}, abs=1e-4
        )
        assert sum(seconds) == pytest.approx(WALL_S, abs=1e-4)
    assert bubble(times, WALL_S) == pytest.approx(0.7, abs=1e-3)
    assert sum(times["records"]) == 3


def test_ranks_of_other_lengths_get_bins_of_one_width() -> None:
    times = timeline(ranks(2), [recorded(50.0, steps=200), recorded(50.0, steps=2)], results())
    long, short = (rank["microseconds"] for rank in times["ranks"])
    assert times["bin_s"] == 0.5
    assert len(long[0]) > 30
    assert sum(map(sum, long)) / 1e6 == pytest.approx(20.4, abs=1e-3)
    assert sum(short[0]) / 1e6 == pytest.approx(0.1, abs=1e-3)
