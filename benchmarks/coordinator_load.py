"""What dispatch costs rank 0, and how well it balances: the real coordinator, replicas that compute in virtual time.

    .venv/bin/python benchmarks/coordinator_load.py

Without MPI and on one core. Messages are encoded and decoded as between ranks; the coordinator's seconds are those of
its own handlers, decoding and encoding included.
"""

import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from mpinfer.coordinator.dispatch import Coordinator
from mpinfer.records.journal import Journal
from mpinfer.transport.control import ACCOUNT, DROP, RECORDS, RESULTS, WANT

LATENCY_S = 1e-4  # of a message
PROGRESS_S = 0.02  # between the progress points of a rank 0 that gets no message


class Lines:
    """Records of about 200 bytes, made when they are handed out."""

    def __init__(self, records: int) -> None:
        self.ids = range(records)

    def line(self, index: int) -> bytes:
        return b'{"id": %d, "prompt": "%s"}' % (index, b"lorem ipsum " * 15)


class World:
    """Ranks in one process and in virtual time, each the leader of a replica. Rank 0's end of the control plane."""

    def __init__(self, size: int) -> None:
        self.size, self.now = size, 0.0
        self.lost: set[int] = set()
        self.messages = self.bytes = 0
        self.coordinator_s = 0.0  # of this machine's time
        self._handlers: dict[str, Callable[[int, Any], None]] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self._attached: list[Any] = []
        self.receive: dict[int, Callable[[str, Any], None]] = {}  # by rank: what its messages are for

    def at(self, moment: float, event: Callable[[], None]) -> None:
        heappush(self._events, (moment, next(self._number), event))

    def run(self, done: Callable[[], bool]) -> None:
        """Raises `IndexError` when nothing is left to happen."""
        self._progress()
        while not done():
            self.now, _, event = heappop(self._events)
            event()

    def tell_coordinator(self, source: int, kind: str, body: Any) -> None:
        encoded = self._encode(kind, body)

        def deliver() -> None:
            with self._timed():
                kind, body = json.loads(encoded)
                self._handlers[kind](source, body)

        self.at(self.now + LATENCY_S, deliver)

    # -- what the coordinator calls ------------------------------------------------------------------------------

    def send(self, destination: int, kind: str, body: Any) -> None:
        encoded = self._encode(kind, body)
        self.at(self.now + LATENCY_S, lambda: self.receive[destination](*json.loads(encoded)))

    def on(self, kind: str, handler: Callable[[int, Any], None]) -> None:
        self._handlers[kind] = handler

    def attach(self, channel: Any) -> None:
        self._attached.append(channel)

    def wait_until(self, done: Callable[[], bool]) -> None:
        self.run(done)

    def _progress(self) -> None:
        with self._timed():
            for channel in self._attached:
                channel.complete_finished()
        self.at(self.now + PROGRESS_S, self._progress)

    def _encode(self, kind: str, body: Any) -> bytes:
        encoded = json.dumps([kind, body]).encode()
        self.messages += 1
        self.bytes += len(encoded)
        return encoded

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.coordinator_s += time.perf_counter() - started


class VirtualReplica:
    """Computes batches of records one after the other, and asks for more while `batches` of them are in hand."""

    def __init__(
        self,
        world: World,
        rank: int,
        seconds: Callable[[int], float],
        batch: int = 1,
        batches: int = 3,
        stops: float = float("inf"),
        refuses: Callable[[int], bool] = lambda index: False,
    ) -> None:
        """`seconds` a record takes, by its index; from `stops` on nothing is heard of the replica any more; of records
        that it `refuses` it returns an error at once."""
        self._world, self._rank, self._seconds, self._batch = world, rank, seconds, batch
        self._refuses = refuses
        self._capacity, self._stops = batch * batches, stops
        self._queue: deque[int] = deque()
        self._computing: list[int] = []
        self._asked, self.over = False, False
        world.receive[rank] = self._receive
        self._go_on()

    def _receive(self, kind: str, body: Any) -> None:
        if kind == DROP:
            self._queue = deque(index for index in self._queue if index not in body)
        else:
            assert kind == RECORDS
            indices = [index for index, _, _ in body["records"]]
            if refused := [index for index in indices if self._refuses(index)]:
                self._tell(RESULTS, [{"index": index, "error": {"type": "RecordError"}} for index in refused])
            self._queue.extend(index for index in indices if not self._refuses(index))
            self._asked = body["more"] and not body["records"]
            self.over = not body["more"]
        self._go_on()

    def _go_on(self) -> None:
        if self._queue and not self._computing:
            self._computing = [self._queue.popleft() for _ in range(min(self._batch, len(self._queue)))]
            self._world.at(self._world.now + sum(map(self._seconds, self._computing)), self._finish)
        missing = self._capacity - len(self._queue) - len(self._computing)
        if self.over and not self._computing:
            self._tell(ACCOUNT, {})
        elif not self.over and not self._asked and missing >= self._batch:
            self._asked = True
            self._tell(WANT, missing)

    def _finish(self) -> None:
        done, self._computing = self._computing, []
        self._tell(RESULTS, [{"index": index, "output": {"text": "dolor sit amet " * 10}} for index in done])
        self._go_on()

    def _tell(self, kind: str, body: Any) -> None:
        if self._world.now < self._stops:
            self._world.tell_coordinator(self._rank, kind, body)


def makespan(
    costs: Sequence[float], speeds: Sequence[float], expected: Mapping[int, float], **replica: Any
) -> tuple[float, World]:
    """Virtual seconds until every record has its result, and the world in which that happened.

    `stops`, by rank, and whatever else replicas take.
    """
    world = World(len(speeds))
    kept: list[int] = []
    stops = replica.pop("stops", {})
    coordinator = Coordinator(
        world,
        Lines(len(costs)),
        costs,
        range(len(costs)),
        expected,
        lambda result: kept.append(result["index"]),
        clock=lambda: world.now,
    )
    for rank, speed in enumerate(speeds):
        stop = stops.get(rank, float("inf"))
        VirtualReplica(world, rank, lambda index, speed=speed: costs[index] / speed, stops=stop, **replica)
    world.run(lambda: coordinator.complete)
    assert sorted(kept) == list(range(len(costs)))
    return world.now, world


def gather(replicas: int, batch: int, lines: Lines, keep: Callable[[dict[str, Any]], None]) -> World:
    """The world in which all records were computed, by replicas that take little time for them."""
    world = World(replicas)
    speeds = dict.fromkeys(range(replicas), 1.0)
    indices = range(len(lines.ids))
    coordinator = Coordinator(world, lines, [1.0] * len(indices), indices, speeds, keep, clock=lambda: world.now)
    for rank in range(replicas):
        VirtualReplica(world, rank, lambda index: 0.02, batch=batch)
    world.run(lambda: coordinator.finished)
    return world


def print_throughput(replicas: int = 512, records: int = 100_000) -> None:
    lines = Lines(records)
    print(f"{replicas} replicas, {records} records: dispatched and gathered by one core")
    for batch in (1, 8):
        for keeper in ("nothing", "a journal"):
            with tempfile.TemporaryDirectory() as directory:
                journal = Journal.open(Path(directory, "run"), {}, "", lines.ids, resume=False)
                world = gather(replicas, batch, lines, journal.append if keeper == "a journal" else lambda result: None)
                journal.close()
            rate, each_us = records / world.coordinator_s, 1e6 * world.coordinator_s / world.messages
            print(
                f"  batches of {batch}, results to {keeper:<9} {rate:7.0f} records/s, "
                f"{world.messages} messages, {each_us:.0f} us a message"
            )


def print_large_run(replicas: int = 256, records: int = 1_000_000) -> None:
    random = Random(0)
    costs = [0.05 * random.lognormvariate(-0.5, 1) for _ in range(records)]
    speeds = [random.uniform(0.3, 1.7) for _ in range(replicas)]
    started = time.perf_counter()
    wall_s, world = makespan(costs, speeds, dict.fromkeys(range(replicas), 1.0), batch=8)
    took_s = time.perf_counter() - started
    ideal_s = sum(costs) / sum(speeds)
    print(f"{replicas} replicas of unknown speeds, {records} records of all lengths: simulated in {took_s:.0f} s")
    print(f"  makespan {wall_s:.2f} s, ideal {ideal_s:.2f} s, ratio {wall_s / ideal_s:.4f}")
    print(
        f"  {world.messages} messages, {world.bytes / 1e6:.0f} MB, "
        f"coordinator busy {world.coordinator_s:.1f} s: {world.coordinator_s / wall_s:.1%} of a core"
    )


def print_balance(records: int = 400) -> None:
    speeds = [1.0, 1.0, 1.0, 1 / 3]
    known = dict(enumerate(speeds))
    unknown = dict.fromkeys(known, 1.0)
    alive = [1.0, 1.0, 1.0]
    random = Random(0)
    lengths = {
        "equal": [1.0] * records,
        "mixed": [random.lognormvariate(-0.5, 1) for _ in range(records)],
    }
    print(f"4 replicas, one 3x slower, {records} records: makespan over ideal")
    columns = ("lengths", "even split", "known", "unknown", "batches of 8", "one stops")
    print("  " + " ".join(f"{column:>12}" for column in columns))
    for name, costs in lengths.items():
        ideal_s = sum(costs) / sum(speeds)
        static_s = max(sum(costs[rank::4]) / speed for rank, speed in enumerate(speeds))
        ratios = [
            static_s / ideal_s,
            makespan(costs, speeds, known)[0] / ideal_s,
            makespan(costs, speeds, unknown)[0] / ideal_s,
            makespan(costs, speeds, unknown, batch=8)[0] / ideal_s,
        ]
        # Of four equal ones, one stops for ever after a quarter of the time; what it computed is not lost.
        quarter_s = sum(costs) / 4 / 4
        ideal_s = quarter_s + (sum(costs) - 4 * quarter_s) / sum(alive)
        stopped_s, _ = makespan(costs, [1.0] * 4, unknown, stops={3: quarter_s})
        print(f"  {name:>12} " + " ".join(f"{ratio:12.3f}" for ratio in [*ratios, stopped_s / ideal_s]))


def main() -> None:
    print_throughput()
    print_large_run()
    print_balance()


if __name__ == "__main__":
    main()
