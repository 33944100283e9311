"""A replica's side of the dispatch: ask rank 0 for records ahead of need, send results back."""

from collections import deque
from typing import Any

from mpinfer.errors import RecordError
from mpinfer.generate.scheduler import Scheduler, Sequence
from mpinfer.generate.tasks import Task
from mpinfer.observe.account import Account
from mpinfer.transport.control import COORDINATOR, DROP, FINISH, RECORDS, RESULTS, WANT, Control

_STEPS_AHEAD = 2  # of prompts, asked for at a time
_FIRST = 4  # records asked for while nothing is known of them


class RecordFeed:
    """Keeps the scheduler of a replica stocked: every slot filled and `ahead` sequences waiting.

    Not at one go: who asks for no more than what it will soon read leaves the others as much of the long and of the
    short records. `step_tokens` are what it reads in a step.
    """

    def __init__(self, endpoint: Control, task: Task, ahead: int, step_tokens: int, account: Account) -> None:
        self._endpoint, self._task, self._ahead, self._account = endpoint, task, ahead, account
        self._step_tokens = step_tokens
        self._records_seen = self._tokens_seen = 0
        self._arrived: deque[tuple[int, str | int, str]] = deque()
        self._unfinished: dict[int, list[Sequence]] = {}  # of every record at work, all its sequences, in order
        self._dropped: set[int] = set()  # records that another replica was first with, until the scheduler knows
        self._asked = False
        self._more = True
        self._stopped = False
        self.tokens = {"prompt_tokens": 0, "new_tokens": 0}  # of finished sequences
        endpoint.on(RECORDS, self._receive)
        endpoint.on(DROP, self._drop)
        endpoint.on(FINISH, self._stop)

    def refill(self, scheduler: Scheduler) -> bool:
        """Hand over what has arrived and ask for what is missing; False once nothing will ever come."""
        if self._stopped:
            self._arrived.clear()
            begun = {index for index, own in self._unfinished.items() if any(sequence.slot >= 0 for sequence in own)}
            self._dropped.update(self._unfinished.keys() - begun)
        while self._arrived:
            index, id, line = self._arrived.popleft()
            try:
                sequences = self._task.sequences(index, id, line)
            except RecordError as error:
                self._send([{"index": index, "error": {"type": "RecordError", "message": str(error)}}])
                continue
            self._unfinished[index] = sequences
            self._records_seen += 1
            self._tokens_seen += sum(len(sequence.prompt) for sequence in sequences)
            for sequence in sequences:
                scheduler.add(sequence)
        if self._dropped:
            scheduler.drop(self._dropped)
            for index in self._dropped:
                self._unfinished.pop(index, None)
            self._dropped.clear()
        missing = scheduler.slots + self._ahead - scheduler.unfinished
        if self._more and not self._asked and missing > 0:
            self._endpoint.send(COORDINATOR, WANT, min(missing, self._soon()))
            self._asked = True
        return self._more or bool(self._arrived)

    def _soon(self) -> int:
        """Records whose prompts fill the next steps."""
        per_record = self._tokens_seen / max(1, self._records_seen)
        return max(_FIRST, int(_STEPS_AHEAD * self._step_tokens / per_record)) if per_record else _FIRST

    def wait(self) -> None:
        with self._account.phase("idle"):
            self._endpoint.wait_until(lambda: bool(self._arrived) or not self._asked)

    def finish(self, sequences: list[Sequence]) -> None:
        """Take in finished sequences; a record is sent when all of its own are."""
        complete = []
        for sequence in sequences:
            sequence.finished = True
            own = self._unfinished.get(sequence.index)
            if own is None:  # dropped
                continue
            self.tokens["prompt_tokens"] += len(sequence.prompt)
            self.tokens["new_tokens"] += len(sequence.new_tokens)
            if all(each.finished for each in own):
                complete.append(own)
                del self._unfinished[sequence.index]
        if complete:
            self._send([{"index": own[0].index, "output": self._task.output(own)} for own in complete])

    def _receive(self, source: int, body: dict[str, Any]) -> None:
        self._arrived.extend((index, id, line) for index, id, line in body["records"])
        self._more = body["more"] and not self._stopped
        self._asked = self._more and not body["records"]  # then the answer is yet to come

    def _drop(self, source: int, indices: list[int]) -> None:
        self._dropped.update(indices)

    def _stop(self, source: int, body: None) -> None:
        """Finish what has begun, and nothing else."""
        self._stopped, self._more, self._asked = True, False, False

    def _send(self, results: list[dict[str, Any]]) -> None:
        self._endpoint.send(COORDINATOR, RESULTS, results)
