"""What a rank remembers of its loop: exactly, in bounded memory, and the same on rank 0."""

import json
import time
from random import Random
from typing import Any

import pytest

from mpinfer.observe.account import PHASES, Account
from mpinfer.observe.bins import FIRST_WIDTH_S, Bins
from mpinfer.observe.latency import Latency
from mpinfer.observe.recorder import MICRO, POINT, SPAN, Entries, Kept, Recorder


def test_bins_share_out_time_and_merge_exactly() -> None:
    """Against bins of the first width that never merge."""
    random, bins, end_s = Random(0), Bins(2, 8), 0.0
    spans = []
    for _ in range(200):
        start_s, end_s = end_s, end_s + random.choice([0.0, 1e-5, 0.3, 3.0]) * FIRST_WIDTH_S
        spans.append((random.randrange(2), start_s, end_s))
        bins.add(*spans[-1])
    ratio = bins.width_s / FIRST_WIDTH_S
    assert ratio in [2**n for n in range(12)]
    assert bins.width_s * 4 < end_s <= bins.width_s * 8
    for row in range(2):
        for place, amount in enumerate(bins.rows[row]):
            left, right = place * bins.width_s, (place + 1) * bins.width_s
            exact = sum(max(0.0, min(e, right) - max(s, left)) for r, s, e in spans if r == row)
            assert amount == pytest.approx(exact, abs=1e-12)


def test_things_that_are_counted_survive_merging() -> None:
    bins = Bins(1, 4)
    for number in range(1000):
        bins.count(0, number * FIRST_WIDTH_S / 3)
    assert bins.sums() == [1000]
    assert len(bins.rows[0]) == 4


def test_bins_are_the_same_on_rank_0() -> None:
    bins = Bins(2, 8)
    bins.add(1, 0.25 * FIRST_WIDTH_S, 21 * FIRST_WIDTH_S)
    tree = json.loads(json.dumps(bins.to_dict(MICRO)))
    again = Bins.from_dict(tree, 16, MICRO)
    assert again.width_s == bins.width_s == 4 * FIRST_WIDTH_S
    assert again.sums() == pytest.approx(bins.sums(), abs=5e-6)
    again.widen(8 * FIRST_WIDTH_S)
    assert again.sums() == pytest.approx(bins.sums(), abs=5e-6)
    assert again.to_dict(MICRO)["bin_s"] == 8 * FIRST_WIDTH_S


@pytest.mark.parametrize("total", [0, 1, 3, 4, 5, 6, 7, 23])
def test_the_first_and_the_last_entries_are_kept(total: int) -> None:
    kept = Kept(SPAN, 4)
    for number in range(total):
        kept.add(number, number + 0.5, number % 5, number)
    entries = Entries.from_dict(json.loads(json.dumps(kept.to_dict())), SPAN)
    every = [(float(n), n + 0.5, n % 5, n) for n in range(total)]
    if total <= 4:
        assert (entries.first, entries.last, entries.left_out) == (every, [], 0)
    else:
        assert (entries.first, entries.last, entries.left_out) == (every[:2], every[-2:], total - 4)


def test_a_million_events_take_no_more_than_a_few() -> None:
    few, many = Recorder(most=1000), Recorder(most=1000)
    for recorder, count in ((few, 2000), (many, 10**6)):
        recorder.restart(5.0)
        note = recorder.messages(0, 1, 1, sent=True)
        for number in range(count):
            recorder.step = number
            recorder.add(number % 5, 5.0 + number * 1e-3, 5.0 + (number + 1) * 1e-3)
        for number in range(count // 10):
            note(number)
    sizes = [len(json.dumps(recorder.to_dict())) for recorder in (few, many)]
    assert sizes[1] < 1.5 * sizes[0]
    tree = many.to_dict()
    spans, points = Entries.from_dict(tree["spans"], SPAN), Entries.from_dict(tree["points"], POINT)
    assert [span[3] for span in spans.first] == list(range(500))
    assert [span[3] for span in spans.last] == list(range(10**6 - 500, 10**6))
    assert [point[2] for point in points.last] == list(range(10**5 - 125, 10**5))
    assert many.bins.sums() == pytest.approx([200.0] * 5)


def test_a_world_of_any_size_keeps_about_as_much() -> None:
    for ranks in (1, 16, 512, 4096):
        recorder = Recorder.of_world(ranks, trace=True)
        recorder.restart(0.0)
        for number in range(20_000):
            recorder.add(0, number, number + 1)
        tree = recorder.to_dict()
        spans = Entries.from_dict(tree["spans"], SPAN)
        assert ranks * (len(spans.first) + len(spans.last)) <= 500_000
        assert 64 <= len(recorder.bins.rows[0]) <= max(64, 2**16 / ranks)
    assert "spans" not in Recorder.of_world(4, trace=False).to_dict()


def test_the_recorder_has_every_second_of_the_account() -> None:
    account = Account(Recorder(most=100))
    with account.phase("compute"):  # before the loop: forgotten
        time.sleep(0.01)
    account.restart()
    for step in range(3):
        account.recorder.step = step
        with account.phase("compute"):
            time.sleep(0.002)
            with account.phase("receive_wait"):
                time.sleep(0.001)
    seconds = account.close()
    assert dict(zip(PHASES, account.recorder.bins.sums(), strict=True)) == pytest.approx(seconds, abs=1e-9)
    spans: list[Any] = Entries.from_dict(account.recorder.to_dict()["spans"], SPAN).first
    assert [before[1] for before in spans[:-1]] == [after[0] for after in spans[1:]]
    assert sum(end - start for start, end, _, _ in spans) == pytest.approx(sum(seconds.values()))
    assert {step for _, _, phase, step in spans if PHASES[phase] == "compute"} == {0, 1, 2}


def test_percentiles_of_a_histogram() -> None:
    latency = Latency()
    assert latency.summary() is None
    values = [0.001 * (n + 1) for n in range(1000)]
    for value in values:
        latency.add(value)
    summary = latency.summary()
    assert summary is not None
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert summary[name] == pytest.approx(share, rel=0.05)
    assert summary["max"] == 1.0
    for extreme in (0.0, 1e-9, 1e9):
        latency.add(extreme)
    assert latency.summary()["max"] == 1e9  # type: ignore[index]


def test_a_step_may_have_any_number() -> None:
    recorder = Recorder(2)
    recorder.restart(1.0)
    recorder.step = 2**40
    recorder.add(0, 1.0, 2.0)
    assert Entries.from_dict(recorder.to_dict()["spans"], SPAN).first == [(1.0, 2.0, 0, 2**40)]
