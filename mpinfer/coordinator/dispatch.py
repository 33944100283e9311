"""Rank 0's books: which record goes to whom, what has come back, who is still at work.

Everything happens in handlers of control messages, at the progress points of rank 0's own computing, so the
coordinator costs no rank. Replicas pull: a slow one asks less often.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from mpinfer.transport.control import ACCOUNT, RECORDS, RESULTS, WANT, Control


class Records(Protocol):
    """Records by index."""

    @property
    def ids(self) -> list[Any]: ...

    @property
    def lengths(self) -> Sequence[int]: ...

    def line(self, index: int) -> bytes: ...


class Coordinator:
    """Hands out the records `pending` and takes in results and accounts."""

    def __init__(
        self,
        endpoint: Control,
        records: Records,
        pending: Iterable[int],
        replicas: int,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self._endpoint, self._records, self._replicas, self._keep = endpoint, records, replicas, keep
        self._pending = list(pending)[::-1]  # the next record is the last entry
        self._pending_bytes = sum(records.lengths[index] for index in self._pending)
        self._outstanding = 0
        self.accounts: dict[int, dict[str, Any]] = {}
        endpoint.on(WANT, self._hand_out)
        endpoint.on(RESULTS, self._take_in)
        endpoint.on(ACCOUNT, self._close_account)

    @property
    def finished(self) -> bool:
        """Every record has a result and every rank has sent its account."""
        return not self._pending and not self._outstanding and len(self.accounts) == self._endpoint.size

    def _hand_out(self, leader: int, wanted: int) -> None:
        """At most an even share of what is left, by length: near the end no replica hoards what another could do."""
        share_bytes = self._pending_bytes / self._replicas
        batch: list[int] = []
        while self._pending and len(batch) < wanted and share_bytes > 0:
            index = self._pending.pop()
            batch.append(index)
            share_bytes -= self._records.lengths[index]
            self._pending_bytes -= self._records.lengths[index]
        self._outstanding += len(batch)
        lines = [[index, self._records.ids[index], self._records.line(index).decode()] for index in batch]
        self._endpoint.send(leader, RECORDS, {"records": lines, "more": bool(self._pending)})

    def _take_in(self, leader: int, results: list[dict[str, Any]]) -> None:
        for result in results:
            self._keep(result)
        self._outstanding -= len(results)

    def _close_account(self, rank: int, account: dict[str, Any]) -> None:
        self.accounts[rank] = account
