"""Accounts, dispatch and feed, without MPI."""

import json
import time
from collections import deque

import pytest

from mpinfer.coordinator.dispatch import Coordinator
from mpinfer.errors import RecordError
from mpinfer.generate.feed import RecordFeed
from mpinfer.generate.scheduler import Limits, Scheduler, Sequence
from mpinfer.generate.tasks import Generate
from mpinfer.generate.text import Text, stop_token_ids
from mpinfer.observe.account import PHASES, Account
from mpinfer.observe.report import Before, timing, timing_table
from mpinfer.plan.layout import Plan, Replica
from mpinfer.spec import GenerateSpec
from mpinfer.transport.control import ACCOUNT, DROP, RECORDS, RESULTS, WANT


class Loopback:
    """A control plane of one process: messages are handled when somebody waits."""

    def __init__(self, size=1):
        self.size, self.lost = size, set()
        self.sent = []
        self._handlers = {}
        self._queue = deque()

    def on(self, kind, handler):
        self._handlers[kind] = handler

    def attach(self, channel):
        """Nobody waits long here."""

    def send(self, destination, kind, body):
        self.sent.append((destination, kind, body))
        self._queue.append((destination, kind, json.loads(json.dumps(body))))

    def serve(self):
        while self._queue:
            source, kind, body = self._queue.popleft()
            if kind in self._handlers:
                self._handlers[kind](source, body)

    def wait_until(self, done):
        self.serve()
        assert done()


class Lines:
    """Records that hold their index."""

    def __init__(self, count):
        self.ids = [f"r{i}" for i in range(count)]

    def line(self, index):
        return json.dumps({"token_ids": [index]}).encode()


def test_every_second_belongs_to_one_phase():
    account = Account()
    account.restart()
    started = time.perf_counter()
    with account.phase("compute"):
        time.sleep(0.02)
        with account.phase("send_wait"):
            time.sleep(0.01)
    time.sleep(0.01)
    seconds = account.close()
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - started, abs=0.005)
    assert seconds["compute"] >= 0.02
    assert seconds["send_wait"] >= 0.01
    assert seconds["overhead"] >= 0.01
    assert seconds["idle"] == 0


def test_records_are_handed_out_once_and_by_even_shares_of_cost():
    control = Loopback(size=2)
    Coordinator(control, Lines(6), [10, 10, 10, 30, 30, 30], range(6), {0: 1, 1: 1}, keep=lambda result: None)
    taken = {0: [], 1: []}
    for leader in (1, 0, 1, 0):
        control.send(leader, WANT, 10)
        control.serve()
        taken[leader] += [index for index, _, _ in control.sent[-1][2]["records"]]
    assert taken == {1: [3, 4], 0: [5, 0, 1, 2]}  # 60 of 120 each, long ones first, whoever asks again
    assert control.sent[-1][2] == {"records": [], "more": True}  # the answer is yet to come


def test_few_long_records_are_shared_to_the_nearest_one():
    control = Loopback(size=2)
    Coordinator(control, Lines(8), [100] * 4 + [101] * 4, range(8), {0: 1, 1: 1}, keep=lambda result: None)
    shares = []
    for leader in (0, 1):
        control.send(leader, WANT, 10)
        control.serve()
        shares.append(len(control.sent[-1][2]["records"]))
    assert shares == [4, 4]


def test_the_last_record_goes_to_whoever_is_idle():
    control = Loopback(size=3)
    Coordinator(control, Lines(1), [100], range(1), {0: 1, 1: 1, 2: 1}, keep=lambda result: None)
    control.send(2, WANT, 10)
    control.serve()
    assert len(control.sent[-1][2]["records"]) == 1


def test_a_replica_that_is_ahead_gets_more():
    control = Loopback(size=2)
    Coordinator(control, Lines(8), [1] * 8, range(8), {0: 1, 1: 1}, keep=lambda result: None)
    for leader in (0, 1):
        control.send(leader, WANT, 2)
        control.serve()
    control.send(0, RESULTS, [{"index": 0}, {"index": 1}])
    control.send(0, WANT, 9)
    control.serve()
    assert [index for index, _, _ in control.sent[-1][2]["records"]] == [4, 5, 6]  # half of the 6 that are left


def test_the_coordinator_is_finished_when_results_and_accounts_are_in():
    control, kept = Loopback(size=1), []
    coordinator = Coordinator(control, Lines(2), [5, 5], [1], {0: 1}, keep=kept.append)
    control.send(0, WANT, 5)
    control.serve()
    assert not coordinator.finished
    control.send(0, RESULTS, [{"index": 1}])
    control.serve()
    assert coordinator.complete
    assert not coordinator.finished
    control.send(0, ACCOUNT, {"rank": 0})
    control.serve()
    assert coordinator.finished
    assert kept == [{"index": 1, "id": "r1"}]


class Doubtful:
    """Prepares records; refuses the odd ones."""

    def sequences(self, index, id, line):
        if index % 2:
            raise RecordError("odd: refused; be even")
        return [Sequence(index, id, json.loads(line)["token_ids"], Limits(4), number) for number in range(2)]

    def output(self, sequences):
        return {"token_ids": [sequence.new_tokens for sequence in sequences]}


def test_the_feed_keeps_the_scheduler_stocked_and_reports_bad_records():
    control = Loopback()
    feed = RecordFeed(control, Doubtful(), ahead=1, step_tokens=64, account=Account())
    scheduler = Scheduler(1, 2, 8, 100, 100)
    assert feed.refill(scheduler)
    assert control.sent == [(0, WANT, 3)]  # two slots and one ahead
    feed.refill(scheduler)
    assert len(control.sent) == 1  # it does not ask twice
    control.send(0, RECORDS, {"records": [[0, "a", '{"token_ids": [1]}'], [1, "b", "{}"]], "more": True})
    feed.wait()
    feed.refill(scheduler)
    assert scheduler.unfinished == 2
    assert control.sent[-2] == (
        0,
        RESULTS,
        [{"index": 1, "error": {"type": "RecordError", "message": "odd: refused; be even"}}],
    )
    assert control.sent[-1] == (0, WANT, 1)
    control.send(0, RECORDS, {"records": [], "more": False})
    feed.wait()
    assert not feed.refill(scheduler)
    scheduler.next_step(0)
    first, second = scheduler.sampling(0)
    first.new_tokens, second.new_tokens = [5, 6], [7]
    feed.finish([second])
    assert control.sent[-1][1] == RECORDS  # nothing sent: the record's other sample is still at work
    feed.finish([first])
    assert control.sent[-1] == (0, RESULTS, [{"index": 0, "output": {"token_ids": [[5, 6], [7]]}}])
    assert feed.tokens == {"prompt_tokens": 2, "new_tokens": 3}


def test_the_feed_drops_what_another_replica_was_first_with():
    control = Loopback()
    feed = RecordFeed(control, Doubtful(), ahead=4, step_tokens=64, account=Account())
    scheduler = Scheduler(1, 2, 8, 100, 100)
    feed.refill(scheduler)
    lines = [[index, "a", json.dumps({"token_ids": [index]})] for index in (0, 2, 4)]
    control.send(0, RECORDS, {"records": lines, "more": True})
    feed.wait()
    feed.refill(scheduler)
    scheduler.next_step(0)  # the two sequences of record 4, of prompts of equal length the last
    at_work = scheduler.sampling(0)[0].index
    waiting = next(index for index in (0, 2, 4) if index != at_work)
    control.send(0, DROP, [at_work, waiting])
    control.serve()
    feed.refill(scheduler)
    assert scheduler.unfinished == 4  # those at work end their step
    feed.finish(scheduler.commit(0, [(1, None), (1, None)]))
    scheduler.next_step(0)
    (left,) = {sequence.index for sequence in scheduler.sampling(0)}
    assert left not in (at_work, waiting)
    assert scheduler.unfinished == 2
    assert not [message for message in control.sent if message[1] == RESULTS]


def test_a_feed_that_is_put_off_waits_and_does_not_ask_again():
    control = Loopback()
    feed = RecordFeed(control, Doubtful(), ahead=1, step_tokens=64, account=Account())
    scheduler = Scheduler(1, 2, 8, 100, 100)
    feed.refill(scheduler)
    control.send(0, RECORDS, {"records": [], "more": True})
    with pytest.raises(AssertionError):  # the loop-back serves its messages and finds the feed still waiting
        feed.wait()
    assert feed.refill(scheduler)
    assert [message[1] for message in control.sent].count(WANT) == 1
    control.send(0, RECORDS, {"records": [], "more": False})
    feed.wait()
    assert not feed.refill(scheduler)


def test_prompts_without_a_tokenizer(tmp_path):
    task = Generate(Text(tmp_path, 10), GenerateSpec(), set(), max_length=4, needs_logits=False)
    (sequence,) = task.sequences(3, "x", '{"token_ids": [1, 9]}')
    assert sequence.prompt == [1, 9]
    for record, word in (
        ({"token_ids": []}, "empty"),
        ({"token_ids": [10]}, "vocabulary of 10"),
        ({"token_ids": [1, 2, 3, 4]}, "has 4 tokens"),
        ({"prompt": "hello"}, "no tokenizer"),
        ({"token_ids": [1], "generate": {"stop": "."}}, "without a tokenizer"),
    ):
        with pytest.raises(RecordError, match=word):
            task.sequences(0, "x", json.dumps(record))


def test_stop_ids_follow_the_generation_config(tiny_llama, tmp_path):
    _, model = tiny_llama
    assert stop_token_ids(tmp_path, model.config) == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert stop_token_ids(tmp_path, model.config) == {3, 4}


def account_of(rank, **seconds):
    phases = {f"{phase}_s": float(seconds.get(phase, 0)) for phase in PHASES}
    place = {"replica": 0, "stage": rank, "shard": 0}
    figures = {
        "in_flight_s": 2.0 * rank,
        "bytes_sent": 10,
        "weight_bytes": 4,
        "peak_memory_bytes": 8,
        "read_bytes": 2_000_000,
        "storage_bytes": 1_000_000,
    }
    return {
        "rank": rank,
        "host": "h",
        "coordinates": place,
        **phases,
        **figures,
        "prompt_tokens": 30 * (1 - rank),
        "new_tokens": 10 * (1 - rank),
    }


def test_timing_adds_up():
    plan = Plan((Replica((0, 1), 2, 1, (0, 1, 2), 4, 2, 100, 1.0),))
    accounts = [account_of(0, compute=6, receive_wait=2, overhead=2), account_of(1, compute=3, send_wait=1, idle=4)]
    report = timing(plan, 5, 10.0, Before({"mpi": 0.75, "plan": 0.25}, 2.0, 8.0, 9.0), accounts)
    assert (report["plan"]["replicas"], report["plan"]["stages"], report["plan"]["cuts"]) == (1, 2, (0, 1, 2))
    assert report["plan"]["layouts"][0]["ranks"] == (0, 1)
    assert report["ranks"][1]["idle_s"] == 6.0  # it ended two seconds early
    assert report["bubble"] == pytest.approx((2 + 1 + 6) / 20)
    assert report["overlap"] == pytest.approx(1 - 1 / 2)
    assert report["imbalance"] == pytest.approx(6 / 4.5 - 1)
    assert (report["records_per_s"], report["tokens_per_s"], report["all_tokens_per_s"]) == (0.5, 1.0, 4.0)
    table = timing_table(report)
    assert "predicted 9.00 s" in table
    assert "MB of weights read, " in table
    assert " MB fetched from storage)" in table
    assert len(table.splitlines()) == 5
