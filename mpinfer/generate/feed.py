"""A replica's side of the dispatch: ask rank 0 for records ahead of need, send results back."""

from collections import deque
from typing import Any, Protocol

from mpinfer.errors import RecordError
from mpinfer.generate.scheduler import Scheduler, Sequence
from mpinfer.observe.account import Account
from mpinfer.transport.control import COORDINATOR, RECORDS, RESULTS, WANT, Control


class Preparation(Protocol):
    """Turns records into work and finished work into outputs."""

    def sequence(self, index: int, id: str | int, line: str) -> Sequence: ...

    def output(self, sequence: Sequence) -> dict[str, Any]: ...


class RecordFeed:
    """Keeps the scheduler of a replica stocked: every slot filled and `ahead` sequences waiting."""

    def __init__(self, endpoint: Control, preparation: Preparation, ahead: int, account: Account) -> None:
        self._endpoint, self._preparation, self._ahead, self._account = endpoint, preparation, ahead, account
        self._arrived: deque[tuple[int, str | int, str]] = deque()
        self._asked = False
        self._more = True
        self.tokens = {"prompt_tokens": 0, "new_tokens": 0}  # of finished sequences
        endpoint.on(RECORDS, self._receive)

    def refill(self, scheduler: Scheduler) -> bool:
        """Hand over what has arrived and ask for what is missing; False once nothing will ever come."""
        while self._arrived:
            index, id, line = self._arrived.popleft()
            try:
                scheduler.add(self._preparation.sequence(index, id, line))
            except RecordError as error:
                self._send([{"index": index, "id": id, "error": {"type": "RecordError", "message": str(error)}}])
        missing = scheduler.slots + self._ahead - scheduler.unfinished
        if self._more and not self._asked and missing > 0:
            self._endpoint.send(COORDINATOR, WANT, missing)
            self._asked = True
        return self._more or bool(self._arrived)

    def wait(self) -> None:
        with self._account.phase("idle"):
            self._endpoint.wait_until(lambda: bool(self._arrived) or not self._asked)

    def finish(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.tokens["prompt_tokens"] += len(sequence.prompt)
            self.tokens["new_tokens"] += len(sequence.new_tokens)
        self._send([{"index": s.index, "id": s.id, "output": self._preparation.output(s)} for s in sequences])

    def _receive(self, source: int, body: dict[str, Any]) -> None:
        self._arrived.extend((index, id, line) for index, id, line in body["records"])
        self._more = body["more"]
        self._asked = False

    def _send(self, results: list[dict[str, Any]]) -> None:
        self._endpoint.send(COORDINATOR, RESULTS, results)
