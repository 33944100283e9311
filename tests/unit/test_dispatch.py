"""Who gets which record while a run goes on: replicas of any speed, in virtual time and without MPI."""

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.coordinator_load import Lines, VirtualReplica, World, makespan
from mpinfer.coordinator.dispatch import Coordinator
from mpinfer.coordinator.replica import Replica, pace_of_speed
from mpinfer.errors import WorldLostError
from mpinfer.transport.control import COMPUTED, DROP, RECORDS, RESULTS, WANT

ONE_SLOW = [1.0, 1.0, 1.0, 1 / 3]
KNOWN = dict(enumerate(ONE_SLOW))
UNKNOWN = dict.fromkeys(KNOWN, 1.0)
NEVER = float("inf")


class Driven(World):
    """A world whose messages to replicas are only noted, and whose time goes by as the test says."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.sent: list[tuple[int, str, Any]] = []

    def send(self, destination: int, kind: str, body: Any) -> None:
        self.sent.append((destination, kind, body))

    def after(self, seconds: float, source: int, kind: str, body: Any) -> None:
        """Rank `source` says something when so much time has gone by."""
        self.now += seconds
        self._handlers[kind](source, body)

    def given(self, leader: int) -> list[int]:
        """Records that a leader has been given so far."""
        return [
            index
            for destination, kind, body in self.sent
            if (destination, kind) == (leader, RECORDS)
            for index, _, _ in body["records"]
        ]


def coordinate(
    world: World, costs: list[float], speeds: dict[int, float], pending: Any = None
) -> tuple[Any, list[int]]:
    """A coordinator, and the indices of the results that it keeps."""
    kept: list[int] = []
    coordinator = Coordinator(
        world,
        Lines(len(costs)),
        costs,
        range(len(costs)) if pending is None else pending,
        speeds,
        lambda result: kept.append(result["index"]),
        clock=lambda: world.now,
    )
    return coordinator, kept


def results(*indices: int) -> list[dict[str, Any]]:
    return [{"index": index, "output": {}} for index in indices]


@pytest.mark.parametrize("expected", [KNOWN, UNKNOWN], ids=["known", "unknown"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_slow_replica_does_not_hold_the_others_up(expected: dict[int, float], batch: int) -> None:
    costs = [1.0] * 400
    took_s, _ = makespan(costs, ONE_SLOW, expected, batch=batch)
    assert took_s < 1.1 * sum(costs) / sum(ONE_SLOW)
    assert sum(costs) / 4 / min(ONE_SLOW) > 2 * took_s  # an even split


def test_records_of_all_lengths_finish_together() -> None:
    random = Random(1)
    costs = [random.lognormvariate(0, 1) for _ in range(400)]
    took_s, _ = makespan(costs, ONE_SLOW, UNKNOWN)
    assert took_s < 1.03 * sum(costs) / sum(ONE_SLOW)


def test_what_a_stopped_replica_held_is_done_elsewhere() -> None:
    costs = [1.0] * 400
    took_s, _ = makespan(costs, [1.0] * 4, UNKNOWN, stops={2: 30.0})
    assert took_s < 1.1 * (30 + (400 - 4 * 30) / 3)


def test_a_replica_that_never_does_anything_is_found_out() -> None:
    took_s, _ = makespan([1.0] * 40, [1.0] * 4, UNKNOWN, stops={1: 0.001, 3: 0.001}, batches=6)
    assert took_s < 2 * 40 / 2


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_record_has_one_result_and_no_question_is_left_open(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 5), "ranks")
    costs = data.draw(st.lists(st.sampled_from([0.1, 0.2, 0.5, 1.0]), max_size=30), "costs")
    pending = data.draw(st.sets(st.sampled_from(range(len(costs)))) if costs else st.just(set()), "pending")
    speeds = [data.draw(st.sampled_from([0.3, 0.5, 1.0, 3.0])) for _ in range(ranks)]
    believed = {rank: data.draw(st.sampled_from([0.1, 1.0, 5.0])) for rank in range(ranks)}
    stops = {ranks - 1: data.draw(st.sampled_from([0.001, 0.7, 5.0, NEVER]), "stops")} if ranks > 1 else {}
    world = World(ranks)
    coordinator, kept = coordinate(world, costs, believed, pending)
    replicas = [
        VirtualReplica(
            world,
            rank,
            lambda index, speed=speed: costs[index] / speed * (1 + index % 3 / 2),  # not quite as expected
            batch=data.draw(st.integers(1, 4)),
            batches=data.draw(st.integers(1, 4)),
            stops=stops.get(rank, NEVER),
            refuses=lambda index: index % 7 == 3,
        )
        for rank, speed in enumerate(speeds)
    ]
    alive = [replica for rank, replica in enumerate(replicas) if stops.get(rank, NEVER) == NEVER]
    world.run(lambda: coordinator.complete and all(replica.over for replica in alive))
    assert Counter(kept) == Counter(pending)
    if len(alive) == ranks:
        world.run(lambda: coordinator.finished)


def test_long_records_are_first() -> None:
    world = Driven(2)
    coordinate(world, [1, 3, 2, 3, 1, 2], {0: 1, 1: 1})
    for rank in (0, 1, 0, 1, 0, 1):
        world.after(0, rank, WANT, 1)
    order = [index for _, kind, body in world.sent if kind == RECORDS for index, _, _ in body["records"]]
    assert order == [1, 3, 2, 5, 0, 4]


def test_shares_are_in_proportion_to_speed_and_grow_small() -> None:
    world = Driven(3)
    coordinate(world, [1.0] * 40, {0: 2, 1: 1, 2: 1})
    for rank in (0, 1):
        world.after(0, rank, WANT, 100)
    assert [len(world.given(rank)) for rank in (0, 1)] == [20, 10]
    sizes = []
    while len(world.given(0)) + len(world.given(1)) < 40:
        before = len(world.given(1))
        world.after(1.0, 1, WANT, 100)
        world.after(1.0, 1, RESULTS, results(*world.given(1)[sum(sizes) : before]))
        sizes.append(len(world.given(1)) - before)
    assert sizes == sorted(sizes, reverse=True)


def test_a_replica_that_is_slower_than_expected_gets_less() -> None:
    world = Driven(2)
    coordinate(world, [1.0] * 100, {0: 1, 1: 1})
    for rank in (0, 1):
        world.after(0, rank, WANT, 10)
    for _ in range(3):
        done = {rank: world.given(rank)[-10:] for rank in (0, 1)}
        world.after(10, 0, RESULTS, results(*done[0]))
        world.after(0, 0, WANT, 10)
    world.after(0, 1, RESULTS, results(*world.given(1)))  # 10 in the time of 30
    world.after(0.1, 1, WANT, 100)
    left = 100 - 30 - 10
    assert len(world.given(1)) - 10 == pytest.approx(left / 4, abs=3)


def test_the_first_result_wins_and_the_other_replica_is_told() -> None:
    world = Driven(2)
    coordinator, kept = coordinate(world, [1.0] * 4, {0: 1, 1: 1})
    for rank in (0, 1):
        world.after(0, rank, WANT, 2)
    world.after(1, 0, RESULTS, results(*world.given(0)))
    world.after(0.1, 0, WANT, 2)
    assert world.sent[-1] == (0, RECORDS, {"records": [], "more": True})
    held = world.given(1)
    world.now = 10.0
    coordinator.complete_finished()  # no message, but rank 1 is late
    assert world.given(0)[2:] == held[::-1]  # what it would do last comes first
    world.after(1, 0, RESULTS, results(held[1]))
    assert world.sent[-1] == (1, DROP, [held[1]])
    world.after(0, 1, RESULTS, results(*held))  # too late for one, in time for the other
    assert world.sent[-1] == (0, DROP, [held[0]])
    assert sorted(kept) == [0, 1, 2, 3]
    assert coordinator.complete
    assert not coordinator.finished
    world.after(0, 1, WANT, 2)
    assert world.sent[-1] == (1, RECORDS, {"records": [], "more": False})


def test_the_rank_of_a_replica_that_sends_results_need_not_be_its_leader() -> None:
    """Then both who had the record are told: one of them ignores it."""
    world = Driven(3)
    coordinator, kept = coordinate(world, [1.0] * 2, {0: 1, 1: 1})
    for rank in (0, 1):
        world.after(0, rank, WANT, 1)
    world.after(1, 0, RESULTS, results(*world.given(0)))
    world.after(0, 0, WANT, 1)
    world.now = 10.0
    coordinator.complete_finished()
    assert world.given(0) == [0, 1]
    told = len(world.sent)
    world.after(1, 2, RESULTS, results(1))
    assert {rank for rank, kind, body in world.sent[told:] if (kind, body) == (DROP, [1])} == {0, 1}
    assert kept == [0, 1]


def test_equal_replicas_on_time_get_no_copies() -> None:
    world = Driven(2)
    coordinate(world, [1.0] * 4, {0: 1, 1: 1})
    for rank in (0, 1):
        world.after(0, rank, WANT, 2)
    for rank in (0, 1):
        world.after(0.5, rank, RESULTS, results(world.given(rank)[0]))
    world.after(0.45, 0, RESULTS, results(world.given(0)[1]))
    world.after(0.05, 0, WANT, 2)
    assert len(world.given(0)) == 2


def test_a_pace_follows_what_a_replica_did_lately() -> None:
    replica = Replica(0, expected=1.0)
    now = 0.0
    for index, seconds in enumerate([1.0] * 10 + [3.0] * 20):
        replica.give(index, 1.0, now)
        now += seconds
        replica.finish(index, 1.0, now)
        now += 100  # without anything in hand: not its fault
        if index == 9:
            assert replica.pace == pytest.approx(1)
    assert 1 / 3 < replica.pace < 0.36  # all in all it was 30 in 70 s
    assert pace_of_speed([replica]) == replica.pace
    assert pace_of_speed([Replica(0, 1.0)]) == 0


def test_others_do_what_a_lost_replica_had_in_hand() -> None:
    world = Driven(3)
    coordinator, kept = coordinate(world, [1.0] * 9, dict.fromkeys(range(3), 1.0))
    for leader in range(3):
        world.after(0, leader, WANT, 2)
    world.after(1, 2, COMPUTED, [4])  # and never sent
    coordinator.lose(2, [2])
    world.after(0, 2, WANT, 2)  # its last words
    world.after(0, 2, COMPUTED, [5])
    for leader in (0, 1):
        world.after(0, leader, RESULTS, results(*world.given(leader)))
        world.after(0, leader, WANT, 9)
    assert sorted(world.given(0) + world.given(1)) == list(range(9)), "each once"
    for leader in (0, 1):
        world.after(0, leader, RESULTS, results(*world.given(leader)))
    assert coordinator.complete
    assert sorted(kept) == list(range(9))


def test_what_a_lost_replica_has_sent_counts() -> None:
    world = Driven(2)
    coordinator, kept = coordinate(world, [1.0] * 2, dict.fromkeys(range(2), 1.0))
    world.after(0, 1, WANT, 1)
    world.after(1, 1, COMPUTED, [0])
    coordinator.lose(1, [1])
    world.after(0, 1, RESULTS, results(0))  # was on its way
    world.after(0, 0, WANT, 2)
    world.after(1, 0, RESULTS, results(*world.given(0)))
    assert coordinator.complete
    assert sorted(kept) == [0, 1]


def test_a_run_without_replicas_ends() -> None:
    world = Driven(2)
    coordinator, _ = coordinate(world, [1.0] * 4, dict.fromkeys(range(2), 1.0))
    for leader in range(2):
        world.after(0, leader, WANT, 2)
    coordinator.lose(1, [1])
    with pytest.raises(WorldLostError, match="no replica to compute them"):
        coordinator.lose(0, [0])


def test_a_run_ends_when_those_left_have_been_dismissed() -> None:
    """Replica 0 has left its loop when the only results of a record die with replica 1."""
    world = Driven(2)
    coordinator, _ = coordinate(world, [1.0] * 2, dict.fromkeys(range(2), 1.0))
    for leader in range(2):
        world.after(0, leader, WANT, 1)
    world.after(1, 0, RESULTS, results(*world.given(0)))
    world.after(0, 1, COMPUTED, world.given(1))
    world.after(0, 0, WANT, 1)  # nothing left
    assert not coordinator.complete
    with pytest.raises(WorldLostError, match="no replica to compute them"):
        coordinator.lose(1, [1])


def test_static_shares_are_even_whatever_the_pace() -> None:
    world = World(4)
    computed: list[int] = []

    def seconds(rank: int) -> Any:
        return lambda index: computed.append(rank) or 1 / ONE_SLOW[rank]

    coordinator = Coordinator(
        world, Lines(42), [1.0] * 42, range(42), KNOWN, lambda result: None, clock=lambda: world.now, static=True
    )
    for rank in KNOWN:
        VirtualReplica(world, rank, seconds(rank))
    world.run(lambda: coordinator.finished)
    assert sorted(Counter(computed).values()) == [10, 10, 11, 11]  # and none of them twice
    assert world.now > 10 / min(ONE_SLOW)


def test_what_a_lost_replica_had_of_its_static_share_is_done_by_others() -> None:
    world = Driven(2)
    kept: list[int] = []
    coordinator = Coordinator(
        world, Lines(6), [1.0] * 6, range(6), {0: 1.0, 1: 1.0}, lambda r: kept.append(r["index"]), static=True
    )
    world.after(0.1, 0, WANT, 9)
    world.after(0.1, 1, WANT, 1)
    assert world.given(0) == [0, 1, 2]
    assert world.given(1) == [3]
    world.after(0.1, 0, RESULTS, results(0, 1, 2))
    world.after(0.1, 0, WANT, 9)
    assert world.given(0) == [0, 1, 2]
    coordinator.lose(1, [1])
    world.after(0.1, 0, WANT, 9)
    assert world.given(0) == [0, 1, 2, 3, 4, 5]
    world.after(0.1, 0, RESULTS, results(3, 4, 5))
    assert coordinator.complete
    assert sorted(kept) == list(range(6))
