"""The decode ring: what the first stage of a replica takes its steps from.

A step goes down the stages, what the last stage reads out of it comes straight back to the first, and the
group it belongs to takes its next step. With a group in flight for every stage, all stages compute.
"""

from collections import deque
from collections.abc import Sequence as Many
from typing import Any, Protocol

import torch

from mpinfer.generate.readout import Readout
from mpinfer.generate.scheduler import Scheduler, Sequence
from mpinfer.generate.stage import decode_header, encode_step
from mpinfer.generate.tasks import Task
from mpinfer.observe.account import Account
from mpinfer.transport.message import END, Inbox, Message


class Source(Protocol):
    """Where sequences come from and where finished ones go."""

    def refill(self, scheduler: Scheduler) -> bool:
        """Hand over what has arrived and ask for more; False once nothing will ever come."""

    def wait(self) -> None:
        """Wait until `refill` has something new to say."""

    def finish(self, sequences: list[Sequence]) -> None: ...


class Finish:
    """The first stage's last word on a step: its own share of the vocabulary, then the task's results."""

    def __init__(self, task: Task, readout: Readout, final_size: int, account: Account) -> None:
        self._task, self._readout, self._final_size, self._account = task, readout, final_size, account

    def results(self, message: Message, sequences: Many[Sequence]) -> list[Any]:
        """Of what came back from the last stage, one for every sample; `sequences`: of every sample. The first value is
        final hidden states with a share, if any; others are the shares of its other shards."""
        if not sequences:
            return []
        with self._account.phase("compute"), torch.inference_mode():
            first, *others = (value for value in message.values if isinstance(value, torch.Tensor))
            hidden, share = first[:, : self._final_size], first[:, self._final_size :]
            own = self._readout.reduce(hidden, decode_header(message.header).targets)
            # Small messages stay on the host, whatever computes.
            shares = [found.to(own.device) for found in (share, *others, own) if found.shape[1]]
            return self._task.results(hidden, shares, sequences)


class DecodeRing:
    """The inbox of a first stage. Not a channel: it makes the messages that the stage receives."""

    def __init__(self, scheduler: Scheduler, groups: int, source: Source, returned: Inbox, finish: Finish) -> None:
        self._scheduler, self._source, self._returned, self._finish = scheduler, source, returned, finish
        self._idle = deque(range(groups))
        self._in_flight: deque[int] = deque()  # groups, in the order in which their steps come back

    def take(self, micro_batch: int) -> Message:
        """The next step of whichever group can take one; `END` when there is nothing left to do."""
        while True:
            more = self._source.refill(self._scheduler)
            if (step := self._next_step()) is not None:
                return step
            if self._in_flight:
                self._commit(micro_batch)
            elif more:
                self._source.wait()
            else:
                return END

    def close(self) -> None:
        """Take the end of the stream, which comes back like any step."""
        self._returned.take(-1)
        self._returned.close()

    def _next_step(self) -> Message | None:
        for _ in range(len(self._idle)):
            group = self._idle.popleft()
            step = self._scheduler.next_step(group)
            if step is not None:
                self._in_flight.append(group)
                return encode_step(step)
            self._idle.append(group)
        return None

    def _commit(self, micro_batch: int) -> None:
        message = self._returned.take(micro_batch)
        group = self._in_flight.popleft()
        results = self._finish.results(message, self._scheduler.sampling(group))
        finished = self._scheduler.commit(group, results)
        if finished:
            self._source.finish(finished)
        self._idle.append(group)
