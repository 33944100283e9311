"""Channels over MPI: planned links with preallocated slots.

A send is started and left; it is waited for only when its slot is needed again. A receive is posted in every free slot
before its message is needed. Heads (see `message.py`) go by persistent requests: a step then costs a start and a test.
Those of the first slot are sent synchronously: complete only once the receiver had a slot for them, and so for all
before them. A sender that is ahead waits, and nothing piles up inside MPI. The body of a message has its slot's own
tag, and so finds the receive that waits for it.

Between nodes a body of moderate size goes in pieces. MPI sends small messages at once; before a larger one it asks the
other end and waits for the answer, which takes twice the latency and, while both ends compute, until both call MPI.
Here that is for nothing, since the memory is known to wait.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain
from typing import cast

import torch
from mpi4py import MPI

from mpinfer.errors import TransportError
from mpinfer.transport.codec import ALIGNMENT_BYTES
from mpinfer.transport.endpoint import Endpoint
from mpinfer.transport.gpu import Event, Gpu
from mpinfer.transport.lost import is_loss
from mpinfer.transport.message import SAME_VERSIONS, TAGS, ChannelPlan, Message, ReceiveSlot, SendSlot, unused

Waiting = Callable[[str], AbstractContextManager[None]]
"""Accounts for time spent waiting: called with "send_wait" or "receive_wait"."""

Note = Callable[[int], None]
"""Called with a message's number when its send starts, or once it has been received."""


def _unnoted(number: int) -> None:
    """Nobody remembers messages."""


_UNIT = MPI.BYTE.Create_contiguous(ALIGNMENT_BYTES).Commit()  # MPI counts to 2**31: with bytes a message ended at 2 GiB


_PIECE_BYTES = 2**16 - 2**10  # Open MPI over TCP sends up to 64 KiB at once, its own header included
_MOST_PIECES = 16  # of the way of a larger body asking is a small part


def _memory(tensor: torch.Tensor, size_bytes: int, start: int = 0) -> list[object]:
    """Some bytes of a tensor's memory, for MPI. The tensor is to be held until MPI is done with it."""
    return [MPI.buffer.fromaddress(tensor.data_ptr() + start, size_bytes), size_bytes // ALIGNMENT_BYTES, _UNIT]


def _body_tag(plan: ChannelPlan, slot: int, piece: int = 0) -> int:
    """Of a piece of bodies into that slot; of those that fit none, `slot` is their number."""
    return plan.tag + TAGS * (1 + slot + piece * (1 + plan.slots))


def _piece_bytes(endpoint: Endpoint, plan: ChannelPlan) -> int:
    """Of bodies within the plan, all but the last piece of each."""
    near = endpoint.neighbours.issuperset((plan.source, plan.destination))
    return plan.body_bytes if near or plan.body_bytes > _MOST_PIECES * _PIECE_BYTES else _PIECE_BYTES


class MpiInbox:
    """The receiving end: one receive is posted in every slot before its message is needed."""

    def __init__(
        self, endpoint: Endpoint, plan: ChannelPlan, waiting: Waiting, note: Note = _unnoted, gpu: Gpu | None = None
    ) -> None:
        self._endpoint, self._plan, self._waiting, self._note, self._gpu = endpoint, plan, waiting, note, gpu
        data = endpoint.data
        self._empty = unused if gpu is None else gpu.empty
        self._slots = [ReceiveSlot(plan, endpoint.epoch, self._empty) for _ in range(plan.slots)]
        self._heads = [data.Recv_init(_memory(s.head, plan.head_bytes), plan.source, plan.tag) for s in self._slots]
        self._piece_bytes = _piece_bytes(endpoint, plan)
        starts = range(0, plan.body_bytes, self._piece_bytes or 1)
        sizes = [min(self._piece_bytes, plan.body_bytes - start) for start in starts]
        self._bodies = [
            [
                data.Recv_init(_memory(s.body, size, start), plan.source, _body_tag(plan, n, piece))
                for piece, (start, size) in enumerate(zip(starts, sizes, strict=True))
            ]
            for n, s in enumerate(self._slots)
        ]
        MPI.Prequest.Startall([*self._heads, *chain(*self._bodies)])
        self._status = MPI.Status()
        self._used: list[MPI.Prequest] = []  # by the message that was taken last
        self._fetched: tuple[Event, torch.Tensor] | None = None  # its body, to a GPU
        self._number = 0
        self.bytes_received = 0

    def take(self, micro_batch: int) -> Message:
        """The next message; its slot is given back to the channel at the following call.

        Raises `TransportError` when what comes is not the next message, not whole, or longer than planned.
        """
        self._give_back()
        index = self._number % len(self._slots)
        slot = self._slots[index]
        self._used.append(self._heads[index])
        body_bytes = slot.check_head(self._complete(self._heads[index]), self._number)
        body = self._take_body(index, body_bytes) if body_bytes else None
        self._note(self._number)
        self._number += 1
        return slot.message(body)

    def _take_body(self, index: int, body_bytes: int) -> torch.Tensor | None:
        """Wait for the body; returns where it is, if not in the slot."""
        slot, beyond = self._slots[index], None
        if body_bytes > self._plan.body_bytes:
            beyond = self._empty(body_bytes)
            tag = _body_tag(self._plan, len(self._slots))
            request = self._endpoint.data.Irecv(_memory(beyond, body_bytes), self._plan.source, tag)
            slot.check_body(self._complete(request), self._number)
        else:
            pieces = self._bodies[index][: -(-body_bytes // self._piece_bytes)]
            self._used += pieces
            slot.check_body(sum(map(self._complete, pieces)), self._number)
        if self._gpu is not None:
            received = (slot.body if beyond is None else beyond)[:body_bytes]
            beyond, copied = self._gpu.fetch(received)
            self._fetched = copied, received
        return beyond

    def close(self) -> None:
        """Cancel the receives that no message will ever match."""
        for request in (*self._heads, *chain(*self._bodies)):
            if request not in self._used:
                request.Cancel()
                request.Wait()
            request.Free()

    def _give_back(self) -> None:
        if self._fetched is not None:
            self._fetched[0].synchronize()
            self._fetched = None
        for request in self._used:
            request.Start()
        self._used.clear()

    def _complete(self, request: MPI.Request) -> int:
        """Wait for a receive; returns its bytes."""
        try:
            if not self._endpoint.spin(lambda: request.Test(self._status)):
                with self._waiting("receive_wait"):
                    self._endpoint.wait_until(lambda: request.Test(self._status), self._plan)
        except MPI.Exception as error:
            if is_loss(error):
                raise
            raise TransportError(
                f"{self._plan}: message {self._number} could not be received, or is longer than planned "
                f"({error.Get_error_string()}); {SAME_VERSIONS}"
            ) from None
        size_bytes = self._status.Get_elements(MPI.BYTE)
        self.bytes_received += size_bytes
        return size_bytes


class _Sending:
    """A slot of an outbox and its requests."""

    def __init__(self, endpoint: Endpoint, plan: ChannelPlan, index: int, gpu: Gpu | None) -> None:
        self._endpoint, self._plan, self._index, self._gpu = endpoint, plan, index, gpu
        self._slot = SendSlot(plan, endpoint.epoch, unused if gpu is None else gpu.empty)
        self._piece_bytes = _piece_bytes(endpoint, plan)
        self._head: MPI.Prequest | None = None
        self._head_bytes = 0  # that it was made for: steps of a form have heads of one size
        self._requests: list[MPI.Request] = []
        self._written: Event | None = None  # by the GPU that the message comes from
        self.started_s = 0.0

    def write(self, message: Message, number: int) -> int:
        """Put a message into the slot, or have the GPU do so; returns its bytes."""
        self._slot.write(message, number)
        self._written = None if self._gpu is None else self._gpu.mark()
        return self._slot.head_bytes + self._slot.body_bytes

    def start(self) -> bool:
        """Start sending what was written, once it is there; whether that is so."""
        if self._written is not None and not self._written.query():
            return False
        slot, plan = self._slot, self._plan
        if slot.head_bytes != self._head_bytes:
            self.free()
            memory = _memory(slot.head, slot.head_bytes)
            data = self._endpoint.data
            make = data.Send_init if self._index else data.Ssend_init
            self._head = cast(MPI.Prequest, make(memory, plan.destination, plan.tag))
            self._head_bytes = slot.head_bytes
        assert self._head is not None
        self._head.Start()
        self._requests.append(self._head)
        if slot.body is not None:
            fits = slot.body_bytes <= plan.body_bytes
            index, most = (self._index, self._piece_bytes) if fits else (plan.slots, slot.body_bytes)
            for piece, start in enumerate(range(0, slot.body_bytes, most)):
                memory = _memory(slot.body, min(most, slot.body_bytes - start), start)
                tag = _body_tag(plan, index, piece)
                self._requests.append(self._endpoint.data.Isend(memory, plan.destination, tag))
        self.started_s = time.perf_counter()
        return True

    def completed(self) -> bool:
        while self._requests:
            if not self._requests[-1].Test():
                return False
            self._requests.pop()
        self._slot.body = None
        return True

    def free(self) -> None:
        if self._head is not None:
            self._head.Free()
        self._head, self._head_bytes = None, 0


class MpiOutbox:
    """The sending end: a send is waited for only when its slot is needed again."""

    def __init__(
        self,
        endpoint: Endpoint,
        plan: ChannelPlan,
        waiting: Waiting,
        blocking: bool,
        note: Note = _unnoted,
        gpu: Gpu | None = None,
    ) -> None:
        self._endpoint, self._plan, self._waiting, self._note = endpoint, plan, waiting, note
        self._blocking = blocking
        self._slots = [_Sending(endpoint, plan, index, gpu) for index in range(plan.slots)]
        self._written: deque[_Sending] = deque()  # in order; on their way once all is there
        self._in_flight: deque[_Sending] = deque()  # after these
        self._number = 0
        self.bytes_sent = 0
        self.in_flight_s = 0.0  # summed over messages, from start to the poll that found them complete
        endpoint.attach(self)

    def start(self, micro_batch: int, message: Message) -> None:
        """Start sending, as soon as a GPU has computed it. Raises `TransportError` when the message has more words than
        planned."""
        if len(self._written) + len(self._in_flight) == len(self._slots):
            self._wait_for(len(self._slots) - 1)
        slot = self._slots[self._number % len(self._slots)]
        self._note(self._number)
        self.bytes_sent += slot.write(message, self._number)
        self._number += 1
        if not self._written and slot.start():
            self._in_flight.append(slot)
        else:
            self._written.append(slot)
        if self._blocking:
            self._wait_for(0)

    def drain(self) -> None:
        self._wait_for(0)
        for slot in self._slots:
            slot.free()

    def complete_finished(self) -> None:
        self._start_written()
        while self._in_flight and self._in_flight[0].completed():
            self.in_flight_s += time.perf_counter() - self._in_flight.popleft().started_s

    def _wait_for(self, most: int) -> None:
        """Until at most so many messages are in flight."""
        if not self._at_most(most):
            with self._waiting("send_wait"):
                self._endpoint.wait_until(lambda: self._at_most(most), self._plan)

    def _at_most(self, most: int) -> bool:
        self.complete_finished()
        return len(self._written) + len(self._in_flight) <= most

    def _start_written(self) -> None:
        while self._written and self._written[0].start():
            self._in_flight.append(self._written.popleft())
