"""What a run that is told to stop does with its records. Without MPI."""

import json

import pytest
from test_control import Doubtful, Lines, Loopback

from mpinfer.coordinator.dispatch import Coordinator
from mpinfer.generate.feed import RecordFeed
from mpinfer.generate.scheduler import Scheduler
from mpinfer.observe.account import Account
from mpinfer.transport.control import ACCOUNT, FINISH, RECORDS, RESULTS, WANT


def test_a_coordinator_that_stops_hands_out_nothing_more_and_takes_in_what_was_begun():
    control, kept = Loopback(size=2), []
    coordinator = Coordinator(control, Lines(8), [1] * 8, range(8), {0: 1, 1: 1}, keep=kept.append)
    control.send(0, WANT, 2)
    control.serve()
    coordinator.stop()
    coordinator.stop()
    assert [(to, kind) for to, kind, _ in control.sent if kind == FINISH] == [(0, FINISH), (1, FINISH)]
    control.send(1, WANT, 2)
    control.serve()
    assert control.sent[-1][1] == WANT, "unanswered"
    control.send(0, RESULTS, [{"index": 0}])
    control.send(0, ACCOUNT, {})
    control.serve()
    assert [result["index"] for result in kept] == [0]
    assert not coordinator.finished
    control.send(1, ACCOUNT, {})
    control.serve()
    assert coordinator.finished
    assert not coordinator.complete


def test_a_feed_that_stops_finishes_what_has_begun_and_forgets_the_rest():
    control = Loopback()
    feed = RecordFeed(control, Doubtful(), ahead=4, step_tokens=64, account=Account())
    scheduler = Scheduler(1, 2, 8, 100, 100)
    feed.refill(scheduler)
    lines = [[index, "a", json.dumps({"token_ids": [index]})] for index in (0, 2, 4)]
    control.send(0, RECORDS, {"records": lines, "more": True})
    feed.wait()
    feed.refill(scheduler)
    scheduler.next_step(0)  # one record of the three: it has two sequences, and there are two slots
    begun = scheduler.sampling(0)[0].index
    control.send(0, RECORDS, {"records": [[6, "a", '{"token_ids": [6]}']], "more": True})
    control.send(0, FINISH, None)
    control.serve()
    assert not feed.refill(scheduler), "nothing will come"
    assert scheduler.unfinished == 2
    for _ in range(3):
        feed.finish(scheduler.commit(0, [(1, None), (1, None)]))
        assert scheduler.next_step(0) is not None
    feed.finish(scheduler.commit(0, [(1, None), (1, None)]))
    assert scheduler.next_step(0) is None
    sent = [body for _, kind, body in control.sent if kind == RESULTS]
    assert [result["index"] for results in sent for result in results] == [begun]


def test_a_feed_that_waits_for_records_is_told():
    control = Loopback()
    feed = RecordFeed(control, Doubtful(), ahead=1, step_tokens=64, account=Account())
    scheduler = Scheduler(1, 2, 8, 100, 100)
    feed.refill(scheduler)
    with pytest.raises(AssertionError):  # the loop-back serves its messages and finds the feed still waiting
        feed.wait()
    control.send(0, FINISH, None)
    feed.wait()
    assert not feed.refill(scheduler)
