"""The decode ring: what the first stage of a replica takes its steps from.

A step goes down the stages, its tokens come back from the last stage straight to the first, and the group
it belongs to takes its next step. With a group in flight for every stage, all stages compute.
"""

from collections import deque
from typing import Protocol

from mpinfer.generate.scheduler import Scheduler, Sequence
from mpinfer.generate.stage import encode_step
from mpinfer.transport.message import END, Inbox, Message


class Source(Protocol):
    """Where sequences come from and where finished ones go."""

    def refill(self, scheduler: Scheduler) -> bool:
        """Hand over what has arrived and ask for more; False once nothing will ever come."""

    def wait(self) -> None:
        """Wait until `refill` has something new to say."""

    def finish(self, sequences: list[Sequence]) -> None: ...


class DecodeRing:
    """The inbox of a first stage. Not a channel: it makes the messages that the stage receives."""

    def __init__(self, scheduler: Scheduler, groups: int, source: Source, tokens: Inbox) -> None:
        self._scheduler, self._source, self._tokens = scheduler, source, tokens
        self._idle = deque(range(groups))
        self._in_flight: deque[int] = deque()  # groups, in the order in which their tokens come back

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
        self._tokens.take(-1)
        self._tokens.close()

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
        message = self._tokens.take(micro_batch)
        group = self._in_flight.popleft()
        tokens = message.payload[:, 0].tolist() if message.payload is not None else []
        finished = self._scheduler.commit(group, tokens)
        if finished:
            self._source.finish(finished)
        self._idle.append(group)
