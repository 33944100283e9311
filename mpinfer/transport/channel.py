"""Channels over MPI: planned links with preallocated slots.

A send is started and left; it is waited for only when its slot is needed again. A receive is posted in
every free slot before its message is needed.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from mpi4py import MPI

from mpinfer.transport.endpoint import Endpoint
from mpinfer.transport.message import ChannelPlan, Message, SlotLayout

Waiting = Callable[[str], AbstractContextManager[None]]
"""Accounts for time spent waiting: called with "send_wait" or "receive_wait"."""


class MpiInbox:
    """The receiving end: one receive is posted in every slot before its message is needed."""

    def __init__(self, endpoint: Endpoint, plan: ChannelPlan, waiting: Waiting) -> None:
        self._endpoint, self._plan, self._waiting = endpoint, plan, waiting
        self._layout = SlotLayout(plan)
        self._slots = [self._layout.allocate() for _ in range(plan.depth)]
        self._requests = [self._post(slot) for slot in self._slots]
        self._next = 0
        self._taken: int | None = None
        self.bytes_received = 0

    def take(self, micro_batch: int) -> Message:
        """The next message; its slot is given back to the channel at the following call."""
        if self._taken is not None:
            self._requests[self._taken] = self._post(self._slots[self._taken])
            self._taken = None
        index, request, status = self._next, self._requests[self._next], MPI.Status()
        if not request.Test(status):
            with self._waiting("receive_wait"):
                self._endpoint.wait_until(lambda: request.Test(status))
        self.bytes_received += status.Get_count(MPI.BYTE)
        self._next = (index + 1) % self._plan.depth
        self._taken = index
        return self._layout.decode(self._slots[index])

    def close(self) -> None:
        """Cancel the receives that no message will ever match."""
        for index, request in enumerate(self._requests):
            if index != self._taken:
                request.Cancel()
                request.Wait()

    def _post(self, slot: torch.Tensor) -> MPI.Request:
        return self._endpoint.data.Irecv([slot.numpy(), MPI.BYTE], source=self._plan.source, tag=self._plan.tag)


class MpiOutbox:
    """The sending end: a send is waited for only when its slot is needed again."""

    def __init__(self, endpoint: Endpoint, plan: ChannelPlan, waiting: Waiting, blocking: bool) -> None:
        self._endpoint, self._plan, self._waiting = endpoint, plan, waiting
        self._blocking = blocking
        self._layout = SlotLayout(plan)
        self._slots = [self._layout.allocate() for _ in range(plan.depth)]
        self._requests: list[MPI.Request | None] = [None] * plan.depth
        self._started = [0.0] * plan.depth
        self._next = 0
        self.bytes_sent = 0
        self.in_flight_s = 0.0  # summed over messages, from start to the poll that found them complete
        endpoint.attach(self)

    def start(self, micro_batch: int, message: Message) -> None:
        index = self._next
        self._await(index)
        slot = self._slots[index]
        size = self._layout.encode(slot, message)
        self._started[index] = time.perf_counter()
        self._requests[index] = self._endpoint.data.Isend(
            [slot.numpy(), size, MPI.BYTE], dest=self._plan.destination, tag=self._plan.tag
        )
        self.bytes_sent += size
        self._next = (index + 1) % self._plan.depth
        if self._blocking:
            self._await(index)

    def drain(self) -> None:
        for index in range(self._plan.depth):
            self._await(index)

    def complete_finished(self) -> None:
        for index in range(self._plan.depth):
            self._completed(index)

    def _await(self, index: int) -> None:
        if not self._completed(index):
            with self._waiting("send_wait"):
                self._endpoint.wait_until(lambda: self._completed(index))

    def _completed(self, index: int) -> bool:
        request = self._requests[index]
        if request is None:
            return True
        if not request.Test():
            return False
        self._requests[index] = None
        self.in_flight_s += time.perf_counter() - self._started[index]
        return True
