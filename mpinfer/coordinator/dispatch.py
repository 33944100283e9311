"""Rank 0's books: which record goes to whom, what has come back, who is still at work.

Everything happens in handlers of control messages, at the progress points of rank 0's own computing, so the
coordinator costs no rank. Replicas pull: a slow one asks less often.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from mpinfer.transport.control import ACCOUNT, RECORDS, RESULTS, WANT, Control


class Records(Protocol):
    """Records by index."""

    @property
    def ids(self) -> Sequence[Any]: ...

    def line(self, index: int) -> bytes: ...


class Coordinator:
    """Hands out the records `pending`, of which each has an estimated cost, and takes in results and accounts."""

    def __init__(
        self,
        endpoint: Control,
        records: Records,
        costs: Sequence[float],
        pending: Iterable[int],
        replicas: int,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self._endpoint, self._records, self._costs = endpoint, records, costs
        self._replicas, self._keep = replicas, keep
        self._pending = list(pending)[::-1]  # the next record is the last entry
        self._pending_cost = sum(costs[index] for index in self._pending)
        self._held: dict[int, dict[int, float]] = defaultdict(dict)  # leader -> costs of the records it has, by index
        self._holders: dict[int, int] = {}  # leaders by record; results come from whichever rank of a replica has them
        self.accounts: dict[int, dict[str, Any]] = {}
        endpoint.on(WANT, self._hand_out)
        endpoint.on(RESULTS, self._take_in)
        endpoint.on(ACCOUNT, self._close_account)

    @property
    def finished(self) -> bool:
        """Every record has a result and every rank has sent its account."""
        return not self._pending and not any(self._held.values()) and len(self.accounts) == self._endpoint.size

    def _hand_out(self, leader: int, wanted: int) -> None:
        """What a leader asks for, but no more than its even share of all that is unfinished, by cost and to the nearest
        record: what it holds already counts, so that no replica hoards what another could do."""
        held = self._held[leader]
        unfinished = self._pending_cost + sum(sum(costs.values()) for costs in self._held.values())
        room = unfinished / self._replicas - sum(held.values())
        batch: list[int] = []
        while self._pending and len(batch) < wanted:
            if held and room < self._costs[self._pending[-1]] / 2:
                break
            index = self._pending.pop()
            batch.append(index)
            held[index] = self._costs[index]
            self._holders[index] = leader
            room -= self._costs[index]
            self._pending_cost -= self._costs[index]
        lines = [[index, self._records.ids[index], self._records.line(index).decode()] for index in batch]
        self._endpoint.send(leader, RECORDS, {"records": lines, "more": bool(self._pending)})

    def _take_in(self, source: int, results: list[dict[str, Any]]) -> None:
        for result in results:
            index = result["index"]
            self._keep({"index": index, "id": self._records.ids[index], **result})
            del self._held[self._holders.pop(index)][index]

    def _close_account(self, rank: int, account: dict[str, Any]) -> None:
        self.accounts[rank] = account
