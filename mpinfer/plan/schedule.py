"""What a stage does, in order: the one source that the worker executes and the tests read.

A schedule is an iterator of instructions (after DeepSpeed's pipeline instructions). Every stage of a
pipeline runs the same one: micro-batches pass in the order in which the first stage admits them, so no
stage has to be told more than "the next".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class Receive:
    micro_batch: int


@dataclass(frozen=True)
class Forward:
    micro_batch: int


@dataclass(frozen=True)
class Send:
    micro_batch: int


Instruction = Receive | Forward | Send


def stream(micro_batches: int | None = None) -> Iterator[Instruction]:
    """Instructions for a stream of micro-batches; endless when `micro_batches` is None (the first stage then
    ends the stream by what it sends). A send is only started here: its wait belongs to the channel's next
    use of the same slot, so a stage computes micro-batch i+1 while i is on its way."""
    for micro_batch in count() if micro_batches is None else range(micro_batches):
        yield Receive(micro_batch)
        yield Forward(micro_batch)
        yield Send(micro_batch)
