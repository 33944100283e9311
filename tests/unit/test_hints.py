"""Hints at the end of a run: what deserves one, and what does not."""

from typing import Any

import pytest

from mpinfer.observe.hints import hints


def rank(number: int, **changes: Any) -> dict[str, Any]:
    """One of two stages, as in a run in order."""
    return {
        "rank": number,
        "host": "node1",
        "coordinates": {"replica": 0, "stage": number, "shard": 0},
        "cores": [number],
        "threads": 1,
        "compute_s": 27.4,
        "send_wait_s": 0.1,
        "receive_wait_s": 1.6,
        "idle_s": 0.3,
        "overhead_s": 0.6,
        "halved_batches": 0,
    } | changes


def timing(first: dict[str, Any], second: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "wall_s": 30.0,
        "predicted_wall_s": 28.1,
        "bubble": 0.07,
        "lost_ranks": [],
        "ranks": [first, second],
    } | changes


def test_a_run_in_order_gets_none() -> None:
    assert hints(timing(rank(0), rank(1))) == []


@pytest.mark.parametrize(
    ("account", "said"),
    [
        (timing(rank(0), rank(1, cores=[0])), ["2 ranks of node1 run 2 threads on 1 cores", "--bind-to"]),
        (
            timing(rank(0), rank(1, compute_s=0.2, coordinates={"replica": 1, "stage": 0, "shard": 0})),
            ["rank 1 computed next to nothing", "start 1 fewer"],
        ),
        (timing(rank(0), rank(1, receive_wait_s=12.0), bubble=0.21), ["bubble of 21%", "receive wait", "in_flight"]),
        (timing(rank(0), rank(1, send_wait_s=12.0), bubble=0.24), ["send wait", "transport.wire"]),
        (timing(rank(0), rank(1, idle_s=12.0), bubble=0.24), ["most of it idle", "fewer ranks"]),
        (timing(rank(0, compute_s=8.0), rank(1, compute_s=28.0)), ["rank 1 on node1 (stage 1)", "parallel.stages"]),
        (timing(rank(0), rank(1, halved_batches=3)), ["rank 1 on node1 ran out of memory 3 times", "micro_batch"]),
        (
            timing(
                *(rank(number, kernels_problem="there is no C compiler 'cc'; install one") for number in range(2)),
                wall_s=3.0,
            ),
            ["rank 0, 1 computed with torch's kernels", "there is no C compiler 'cc'; install", "model.kernels: torch"],
        ),
        (timing(rank(0), rank(1), predicted_wall_s=15.0), ["30.0 s where 15.0 s were predicted", "--exclusive"]),
        (timing(rank(0), rank(1), predicted_wall_s=60.0), ["30.0 s where 60.0 s were predicted"]),
    ],
)
def test_each_trouble_gets_one_line_with_a_setting(account: dict[str, Any], said: list[str]) -> None:
    (line,) = hints(account)
    assert "\n" not in line
    for words in said:
        assert words in line


def test_same_core_numbers_on_other_hosts_are_other_cores() -> None:
    assert hints(timing(rank(0, cores=[0]), rank(1, cores=[0], host="node2"))) == []


def test_a_replica_that_computes_more_than_another_is_no_straggler() -> None:
    other = {"replica": 1, "stage": 0, "shard": 0}
    assert hints(timing(rank(0, compute_s=8.0), rank(1, coordinates=other))) == []


def test_a_short_run_says_nothing_of_waits() -> None:
    assert hints(timing(rank(0), rank(1), wall_s=2.0, bubble=0.5)) == []


def test_who_waits_for_the_dead_gets_no_blame() -> None:
    assert hints(timing(rank(0), rank(1, compute_s=0.2), bubble=0.5, lost_ranks=[2])) == []
