"""What the first stage of a model of any kind takes its batches from."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mpinfer.errors import RecordError
from mpinfer.forward.batches import BatchSource
from mpinfer.forward.prepare_common import EqualShapes, Sample
from mpinfer.observe.account import Account
from mpinfer.transport.control import DROP, FINISH, RECORDS, RESULTS, WANT


class Coordinator:
    """The other end of the control plane: answers requests while somebody waits."""

    size = 1

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self.records, self.given = records, 0
        self.asked: list[int] = []
        self.results: list[dict[str, Any]] = []
        self.handlers: dict[str, Any] = {}
        self._wanted: list[int] = []

    def on(self, kind: str, handler: Any) -> None:
        self.handlers[kind] = handler

    def send(self, destination: int, kind: str, body: Any) -> None:
        if kind == RESULTS:
            self.results += body
        else:
            assert kind == WANT
            self.asked.append(body)
            self._wanted.append(body)

    def wait_until(self, done: Any) -> None:
        for _ in range(100_000):
            if self._wanted:
                start, self.given = self.given, min(self.given + self._wanted.pop(), len(self.records))
                lines = [[i, f"r{i}", json.dumps(self.records[i])] for i in range(start, self.given)]
                self.handlers[RECORDS](0, {"records": lines, "more": self.given < len(self.records)})
            if done():
                return
        raise AssertionError("waited for nothing")


class Lists(EqualShapes):
    """A field `x`, a list of numbers. Those that are empty are refused."""

    def __init__(self, longest: int | None = None) -> None:
        self.longest = {} if longest is None else {"x": longest}

    def sample(self, fields: dict[str, Any]) -> Sample:
        if not fields["x"]:
            raise RecordError("x: is empty; give numbers")
        return {"x": torch.tensor(fields["x"], dtype=torch.float32)}


def batches(coordinator: Coordinator, preparer: Any, micro_batch: int, rows: Any = lambda n: n) -> list[Any]:
    """Indices and tensor of every batch, to the end of the stream."""

    def sample(line: str) -> Sample:
        return preparer.sample(json.loads(line))

    source = BatchSource(
        coordinator, sample, preparer, lambda s: None, lambda b: [b["x"]], micro_batch, rows, Account()
    )
    found = []
    while not (message := source.take(0)).is_end:
        found.append((message.header.tolist(), message.payload))
    source.close()
    return found


def test_every_record_is_in_one_batch_and_bad_ones_are_results() -> None:
    coordinator = Coordinator([{"x": [n, n + 1] if n % 5 else []} for n in range(23)])
    found = batches(coordinator, Lists(), micro_batch=4)
    assert sorted(index for indices, _ in found for index in indices) == [n for n in range(23) if n % 5]
    assert all(tensor[:, 0].tolist() == indices for indices, tensor in found)
    assert [result["index"] for result in coordinator.results] == [0, 5, 10, 15, 20]
    assert coordinator.results[0]["error"] == {"type": "RecordError", "message": "x: is empty; give numbers"}
    assert max(coordinator.asked) <= 12  # a batch to send, and two ahead


def test_records_of_one_shape_share_a_batch() -> None:
    coordinator = Coordinator([{"x": [0.0] * (1 + n % 2)} for n in range(20)])
    found = batches(coordinator, Lists(), micro_batch=4)
    assert all(len({index % 2 for index in indices}) == 1 for indices, _ in found)
    assert [len(indices) for indices, _ in found].count(4) >= 4


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_many_shapes_do_not_stop_the_stream(micro_batch: int) -> None:
    coordinator = Coordinator([{"x": [0.0] * (1 + n)} for n in range(50)])
    found = batches(coordinator, Lists(longest=60), micro_batch)
    assert sorted(index for indices, _ in found for index in indices) == list(range(50))


def test_a_batch_is_filled_up_with_its_last_record() -> None:
    found = batches(Coordinator([{"x": [n]} for n in range(5)]), Lists(), micro_batch=4, rows=lambda n: max(n, 2))
    assert [(len(indices), len(tensor)) for indices, tensor in found] == [(4, 4), (1, 2)]
    indices, tensor = found[-1]
    assert tensor[:, 0].tolist() == indices * 2


class Reluctant(Coordinator):
    """Gives all records, of which two are then done elsewhere; puts off the next question until all is `over`."""

    over = False

    def wait_until(self, done: Any) -> None:
        for _ in range(100_000):
            if self._wanted:
                self._wanted.pop()
                lines = [[i, f"r{i}", json.dumps(record)] for i, record in enumerate(self.records)]
                self.handlers[RECORDS](0, {"records": lines[self.given :], "more": True})
                self.given = len(lines)
                self.handlers[DROP](0, [1, 3])
            elif self.over:
                self.handlers[RECORDS](0, {"records": [], "more": False})
            if done():
                return
        raise AssertionError("waited for nothing")


def test_a_source_that_is_put_off_goes_on_with_what_it_has_and_drops_what_is_done() -> None:
    coordinator, preparer = Reluctant([{"x": [n]} for n in range(5)]), Lists()
    source = BatchSource(
        coordinator,
        lambda line: preparer.sample(json.loads(line)),
        preparer,
        lambda sample: None,
        lambda batch: [batch["x"]],
        2,
        lambda rows: rows,
        Account(),
    )
    found = [source.take(0).header.tolist() for _ in range(2)]
    assert sorted(index for indices in found for index in indices) == [0, 2, 4]
    assert len(coordinator.asked) == 2  # the second question is still open
    coordinator.over = True
    assert source.take(0).is_end
    source.close()


def test_a_source_that_is_told_to_finish_begins_no_batch() -> None:
    coordinator, preparer = Coordinator([{"x": [n]} for n in range(50)]), Lists()
    source = BatchSource(
        coordinator,
        lambda line: preparer.sample(json.loads(line)),
        preparer,
        lambda sample: None,
        lambda batch: [batch["x"]],
        2,
        lambda rows: rows,
        Account(),
    )
    assert not source.take(0).is_end
    coordinator.handlers[FINISH](0, None)
    assert source.take(0).is_end
    source.close()
    assert coordinator.given < 50
