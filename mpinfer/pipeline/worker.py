"""The loop of a rank: execute a schedule between an inbox and an outbox.

What a rank is (first stage, last, in between, alone) was decided when its inbox, stage and outbox were
built; the loop does not ask.
"""

from collections.abc import Iterable
from typing import Protocol

from mpinfer.observe.account import Account
from mpinfer.plan.schedule import Forward, Instruction, Receive, Send
from mpinfer.transport.message import END, Inbox, Message, Outbox


class Stage(Protocol):
    """A slice of the model and its forward."""

    def forward(self, message: Message) -> Message: ...


class Worker:
    def __init__(self, inbox: Inbox, stage: Stage, outbox: Outbox, account: Account) -> None:
        self._inbox, self._stage, self._outbox, self._account = inbox, stage, outbox, account

    def run(self, schedule: Iterable[Instruction]) -> None:
        """Execute `schedule` until it is over or the stream ends, then pass the end on and drain."""
        x = y = END
        for instruction in schedule:
            match instruction:
                case Receive(micro_batch):
                    self._account.recorder.step = micro_batch
                    x = self._inbox.take(micro_batch)
                    if x.is_end:
                        break
                case Forward():
                    with self._account.phase("compute"):
                        y = self._stage.forward(x)
                case Send(micro_batch):
                    self._outbox.start(micro_batch, y)
        self._outbox.start(-1, END)
        self._outbox.drain()
