"""Rank 0's books: which record goes to whom, what has come back, who is still at work.

Everything happens at the progress points of rank 0's own computing, so the coordinator costs no rank.

Replicas pull. Each may hold its share, by speed, of the cost of all that is unfinished: plenty at first, less and less
toward the end (guided self-scheduling: Polychronopoulos and Kuck, 1987), the costliest records first (Graham, 1969).
When all are handed out, those who have nothing left get copies of what others are expected to finish much later
(backup tasks: Dean and Ghemawat, 2004); the first result wins.

Or, for comparison, each replica has its even share of the records from the start, whatever its pace.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from typing import Any, Protocol

from mpinfer.coordinator.replica import Replica, pace_of_speed
from mpinfer.errors import WorldLostError
from mpinfer.observe.latency import Latency
from mpinfer.plan.cost import EvenCosts
from mpinfer.transport.control import ACCOUNT, COMPUTED, DROP, FINISH, RECORDS, RESULTS, WANT, Control

_LOOK_EVERY_S = 0.05
_CLEARLY = 2.0  # times as long as a copy takes must the record still take where it is


class Records(Protocol):
    """Records by index."""

    @property
    def ids(self) -> Sequence[Any]: ...

    def line(self, index: int) -> bytes: ...


@dataclass
class _Backlog:
    """Records that one replica alone has in hand, in the order in which they were handed out."""

    holder: int
    indices: list[int]
    left_s: float  # until the last of them is expected
    s_per_cost: float  # how much earlier the others are, if the last is not among them


def costliest_first(costs: Sequence[float], pending: Collection[int]) -> Iterator[int]:
    """The records in the order in which they are handed out; as they come where one is like the other."""
    if isinstance(costs, EvenCosts):
        return iter(pending)
    import numpy as np

    indices = np.fromiter(pending, np.uint32, len(pending))
    own = np.fromiter((costs[index] for index in pending), np.float64, len(pending))
    return map(int, indices[np.argsort(-own, kind="stable")])


def even_shares(records: int, leaders: Collection[int]) -> dict[int, range]:
    """As many records for each leader as for any other, one more or less, in their order."""
    cuts = [records * number // len(leaders) for number in range(len(leaders) + 1)]
    return {leader: range(*cut) for leader, cut in zip(leaders, pairwise(cuts), strict=True)}


class Coordinator:
    """Hands out the records `pending`, of which each has an estimated cost, and takes in results and accounts.

    `speeds` are those of the replicas, by leader, relative to each other and as expected; `keep` gets one result for
    each record; `clock` is in seconds; `static`: each replica computes its even share, and nobody gets copies.
    """

    def __init__(
        self,
        endpoint: Control,
        records: Records,
        costs: Sequence[float],
        pending: Sequence[int],
        speeds: Mapping[int, float],
        keep: Callable[[dict[str, Any]], None],
        clock: Callable[[], float] = time.monotonic,
        static: bool = False,
    ) -> None:
        self._endpoint, self._records, self._costs = endpoint, records, costs
        self._keep, self._clock = keep, clock
        self._has_result = bytearray(b"\1") * len(costs)
        self._missing = 0  # results
        self._unfinished_cost = 0.0
        for index in pending:
            self._has_result[index] = False
            self._missing += 1
            self._unfinished_cost += costs[index]
        self._static = static
        self._pending = pending
        self._own = even_shares(len(pending), speeds) if static else {}  # by leader: places in it, for nobody else
        self._order = iter(()) if static else costliest_first(costs, pending)
        self._next = next(self._order, None)  # record to hand out to anybody; None when all are
        self._replicas = {leader: Replica(leader, speed) for leader, speed in speeds.items()}
        self._speed = sum(speeds.values())  # of all together
        self._scale = 0.0  # cost per second of a replica of speed 1; 0 before anything is finished
        self._guess = len(speeds) / self._speed  # until then: costs are meant to be seconds of a typical replica
        self._holders: dict[int, list[int]] = {}  # leaders by record; results come from any rank of a replica
        self._announced: dict[int, int] = {}  # ranks by record that they have computed and not yet sent
        self._lost: set[int] = set()  # ranks of replicas that are no more
        self._dismissed: set[int] = set()  # leaders that were told that there is nothing left to do
        self._everyone = set(range(endpoint.size))
        self._look_next = clock()
        self.stopped = False  # told to: records without a result are left for another run
        self.latency = Latency()  # of records, from hand-out to result
        self.accounts: dict[int, dict[str, Any]] = {}
        endpoint.on(WANT, self._ask)
        endpoint.on(RESULTS, self._take_in)
        endpoint.on(COMPUTED, self._announce)
        endpoint.on(ACCOUNT, self._close_account)
        endpoint.attach(self)

    def stop(self) -> None:
        """Hand out no more; every replica is to finish what it has begun."""
        if not self.stopped:
            self.stopped = True
            for leader in self._replicas:
                self._endpoint.send(leader, FINISH, None)

    def lose(self, leader: int, ranks: Collection[int]) -> None:
        """A replica of these ranks is no more: the others do what it had in hand. Raises `WorldLostError` when it had
        something, and nobody is left to do it."""
        replica = self._replicas.pop(leader, None)
        if replica is None:
            return
        self._lost.update(ranks)
        self._speed -= replica.expected
        for index in replica.held:
            self._holders[index].remove(leader)
        again = [index for index in replica.held if not self._holders[index]]
        for index in again:
            del self._holders[index]
        unsent = [index for index, rank in self._announced.items() if rank in self._lost]
        for index in unsent:
            del self._announced[index]
            self._unfinished_cost += self._costs[index]
        own = [self._pending[place] for place in self._own.pop(leader, ())]
        again = sorted([*again, *unsent, *own], key=lambda index: -self._costs[index])
        rest = [] if self._next is None else [self._next]
        if (again or rest) and not self._replicas.keys() - self._dismissed:
            raise WorldLostError(f"{len(again) + len(rest)} or more records are left, and no replica to compute them")
        self._order = chain(again, rest, self._order)
        self._next = next(self._order, None)
        self._answer_waiting(self._replicas.values())

    @property
    def done(self) -> dict[int, int]:
        """Records that each replica has computed, by leader."""
        return {leader: replica.done for leader, replica in list(self._replicas.items())}

    @property
    def complete(self) -> bool:
        """Every record has a result."""
        return not self._missing

    @property
    def finished(self) -> bool:
        """Every record has a result, or those that had begun when told to stop, and every rank has sent its account."""
        return (self.complete or self.stopped) and not self.silent

    @property
    def silent(self) -> set[int]:
        """Ranks that have neither sent their account nor died."""
        return self._everyone - self.accounts.keys() - self._endpoint.lost

    def complete_finished(self) -> None:
        """At every progress point: what is late is found out though no message comes."""
        self.reconsider()

    def reconsider(self) -> None:
        """Look again at the speeds, and at who waits for what others are late with. Cheap: does so now and then."""
        now = self._clock()
        if now < self._look_next or self.stopped:
            return
        self._look_next = now + _LOOK_EVERY_S
        self._scale = pace_of_speed(self._replicas.values())
        if self._next is None and not self._static:
            self._copy(now)

    def _ask(self, leader: int, wanted: int) -> None:
        """Answer now, if only that the answer will come later: when there is something, or nothing left to do."""
        self.reconsider()
        replica = self._replicas.get(leader)
        if replica is None:
            return  # it was lost
        replica.wanted = wanted
        if not self._answer(replica):
            self._endpoint.send(leader, RECORDS, {"records": [], "more": True})

    def _take_in(self, source: int, results: list[dict[str, Any]]) -> None:
        for result in results:
            index = result["index"]
            if not self._has_result[index]:  # else it is the second one
                self._has_result[index] = True
                self._missing -= 1
                self._announced.pop(index, None)
                self._keep({"index": index, "id": self._records.ids[index], **result})
        # An error says nothing of how fast its replica is.
        self._settle(source, [result["index"] for result in results if "error" not in result])
        self._settle(source, [result["index"] for result in results if "error" in result], computed=False)

    def _close_account(self, rank: int, account: dict[str, Any]) -> None:
        self.accounts[rank] = account

    def _announce(self, source: int, indices: list[int]) -> None:
        """A rank has computed these, and will send them."""
        if source not in self._lost:
            self._announced.update((index, source) for index in indices if not self._has_result[index])
            self._settle(source, indices)

    def _settle(self, source: int, indices: list[int], computed: bool = True) -> None:
        """Nobody need compute these any more: a rank of one of their holders has, or has found that it cannot."""
        now = self._clock()
        drops: dict[int, list[int]] = defaultdict(list)
        concerned: dict[int, Replica] = {}
        for index in indices:
            holders = self._holders.pop(index, [])
            self._unfinished_cost -= self._costs[index] if holders else 0.0
            for leader in holders:
                replica = concerned[leader] = self._replicas[leader]
                if computed and (leader == source or len(holders) == 1):
                    self.latency.add(replica.finish(index, self._costs[index], now))
                else:
                    replica.lose(index, self._costs[index], now, self._rate(replica))
                if leader != source and len(holders) > 1:
                    drops[leader].append(index)
        for leader, dropped in drops.items():
            self._endpoint.send(leader, DROP, dropped)
        self._answer_waiting(self._replicas.values() if self._all_settled else concerned.values())
        self.reconsider()

    def _answer_waiting(self, replicas: Iterable[Replica]) -> None:
        for replica in replicas:
            if replica.wanted:
                self._answer(replica)

    def _answer(self, replica: Replica) -> bool:
        """Give a leader what it has asked for, as far as there is anything for it; whether there was an answer."""
        if self.stopped:
            return True  # it was told
        if self._all_settled:
            self._give(replica, [])
        elif batch := self._share(replica):
            self._give(replica, batch)
        else:
            return False
        return True

    @property
    def _all_settled(self) -> bool:
        """There is nothing to hand out, and nobody has anything in hand."""
        return self._next is None and not self._holders and not any(self._own.values())

    def _share(self, replica: Replica) -> list[int]:
        """The next pending records, but no more than make up the replica's share of all that is unfinished, to the
        nearest record: what it holds already counts, so that none hoards what another could do."""
        if own := self._own.get(replica.leader):
            self._own[replica.leader] = own[replica.wanted :]
            return [self._pending[place] for place in own[: replica.wanted]]
        room = self._unfinished_cost * replica.speed(self._scale) / self._speed - replica.held_cost
        batch: list[int] = []
        while self._next is not None and len(batch) < replica.wanted:
            cost = self._costs[self._next]
            if (batch or replica.held) and room < cost / 2:
                break
            batch.append(self._next)
            self._next = next(self._order, None)
            room -= cost
        return batch

    def _copy(self, now: float) -> None:
        """Give those who wait for records, the fastest first, copies of what would be finished last: from the end of
        what its holder has in hand, as far as a copy will be there clearly earlier. No record has two copies."""
        waiting = [replica for replica in self._replicas.values() if replica.wanted]
        if not waiting:
            return
        backlogs = [self._backlog(replica, now) for replica in self._replicas.values() if replica.held]
        last = [(-backlog.left_s, backlog.holder, backlog) for backlog in backlogs if backlog.indices]
        heapify(last)
        for replica in sorted(waiting, key=self._rate, reverse=True):
            if last and last[0][1] != replica.leader:
                _, holder, backlog = heappop(last)
                if batch := self._copies(replica, backlog, now):
                    self._give(replica, batch)
                if backlog.indices:
                    heappush(last, (-backlog.left_s, holder, backlog))

    def _backlog(self, replica: Replica, now: float) -> "_Backlog":
        """What nobody but a replica has in hand."""
        rate = self._rate(replica)
        alone = [index for index in replica.held if len(self._holders[index]) == 1]
        left_s = replica.left_s(now, rate)
        if replica.is_late(now, rate):
            return _Backlog(replica.leader, alone, left_s, 0.0)  # a copy less to compute says nothing
        left_s -= (replica.held_cost - sum(self._costs[index] for index in alone)) / rate  # copies are from the end
        if alone:
            left_s = max(left_s, replica.held[alone[-1]] - now + replica.quickest_s * self._costs[alone[-1]])
        return _Backlog(replica.leader, alone, left_s, 1 / rate)

    def _copies(self, replica: Replica, backlog: "_Backlog", now: float) -> list[int]:
        """What to copy, taken off the backlog."""
        rate = self._rate(replica)
        ready_s = replica.left_s(now, rate)
        batch: list[int] = []
        while backlog.indices and len(batch) < replica.wanted:
            cost = self._costs[backlog.indices[-1]]
            ready_s += cost / rate
            if backlog.left_s < max(_CLEARLY * ready_s, replica.quickest_s * cost):
                break
            batch.append(backlog.indices.pop())
            backlog.left_s -= cost * backlog.s_per_cost
        return batch

    def _give(self, replica: Replica, batch: list[int]) -> None:
        """The answer to a leader's question; nothing in it says that there is nothing left to do."""
        now = self._clock()
        replica.wanted = 0
        if not batch:
            self._dismissed.add(replica.leader)
        for index in batch:
            replica.give(index, self._costs[index], now)
            self._holders.setdefault(index, []).append(replica.leader)
        lines = [[index, self._records.ids[index], self._records.line(index).decode()] for index in batch]
        self._endpoint.send(replica.leader, RECORDS, {"records": lines, "more": bool(batch)})

    def _rate(self, replica: Replica) -> float:
        """Cost per second."""
        return (self._scale or self._guess) * replica.speed(self._scale)
