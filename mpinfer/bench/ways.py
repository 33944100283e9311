"""Ways to send messages from one rank to another: a channel as jobs use it, MPI's own, and torch's gloo."""

import socket
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI

from mpinfer.observe.account import Account
from mpinfer.pipeline.links import Links
from mpinfer.spec import TransportSpec
from mpinfer.transport.channel import MpiInbox
from mpinfer.transport.codec import padded
from mpinfer.transport.endpoint import Endpoint
from mpinfer.transport.message import ChannelPlan, Message

MESSAGES = 4  # on their way at once, at most; the depth of the channel
_CHANNEL_TAG, _TAG = 1, 2


class Way(Protocol):
    """Sends and receives messages of one size between the two ranks of a world."""

    name: str

    def resize(self, size: int) -> None:
        """From now on messages have `size` bytes. Both ranks do it at the same time."""

    def start(self, index: int) -> None:
        """Begin sending message `index` of those on their way at once."""

    def progress(self) -> None:
        """What the sender calls between two pieces of computing to keep messages moving."""

    def finish(self) -> None:
        """Wait until what was started may be changed."""

    def receive(self, indices: Sequence[int]) -> None:
        """Wait for the messages that were started with these."""

    def close(self) -> None:
        """Take back what was prepared. Both ranks do it at the same time."""


class Buffers:
    """What is sent and received, written once: its pages are there."""

    def __init__(self, largest: int) -> None:
        self.sent, self.received = ([np.ones(largest, dtype=np.uint8) for _ in range(MESSAGES)] for _ in range(2))


class Channel:
    """MpiOutbox to MpiInbox, planned for messages of this size."""

    name = "channel"

    def __init__(self, endpoint: Endpoint, buffers: Buffers) -> None:
        self._endpoint, self._buffers = endpoint, buffers
        self._links = Links(endpoint, Account(), TransportSpec())
        self._inbox: MpiInbox | None = None

    def resize(self, size: int) -> None:
        self.close()
        self._endpoint.data.Barrier()  # no message meets what the other end has not yet taken back
        here, peer = self._endpoint.rank, 1 - self._endpoint.rank
        self._inbox = self._links.inbox(ChannelPlan(peer, here, _CHANNEL_TAG, 1, 1, 1, padded(size), MESSAGES))
        self._outbox = self._links.outbox(ChannelPlan(here, peer, _CHANNEL_TAG, 1, 1, 1, padded(size), MESSAGES))
        header = np.zeros(1, dtype=np.int32)
        self._messages = [Message(header, (torch.from_numpy(buffer[:size]),)) for buffer in self._buffers.sent]

    def start(self, index: int) -> None:
        self._outbox.start(index, self._messages[index])

    def progress(self) -> None:
        self._endpoint.progress()

    def finish(self) -> None:
        """A channel waits for a slot when it needs one, and not before."""

    def receive(self, indices: Sequence[int]) -> None:
        assert self._inbox is not None
        for index in indices:
            self._inbox.take(index)

    def close(self) -> None:
        if self._inbox is not None:
            self._outbox.drain()
            self._endpoint.detach(self._outbox)
            self._inbox.close()


class Raw:
    """Isend and Irecv of mpi4py."""

    name = "raw"

    def __init__(self, endpoint: Endpoint, buffers: Buffers) -> None:
        self._comm, self._peer, self._buffers = endpoint.data, 1 - endpoint.rank, buffers
        self._sends: list[MPI.Request] = []

    def resize(self, size: int) -> None:
        self._sent = [buffer[:size] for buffer in self._buffers.sent]
        self._received = [buffer[:size] for buffer in self._buffers.received]

    def start(self, index: int) -> None:
        self._sends.append(self._comm.Isend(self._sent[index], self._peer, _TAG))

    def progress(self) -> None:
        MPI.Request.Testall(self._sends)

    def finish(self) -> None:
        MPI.Request.Waitall(self._sends)
        self._sends.clear()

    def receive(self, indices: Sequence[int]) -> None:
        MPI.Request.Waitall([self._comm.Irecv(self._received[index], self._peer, _TAG) for index in indices])

    def close(self) -> None:
        """Nothing was prepared."""


class Persistent(Raw):
    """Requests that are made once and started for each message."""

    name = "persistent"

    def __init__(self, endpoint: Endpoint, buffers: Buffers) -> None:
        super().__init__(endpoint, buffers)
        self._to_send: list[MPI.Prequest] = []
        self._to_receive: list[MPI.Prequest] = []

    def resize(self, size: int) -> None:
        self.close()
        super().resize(size)
        self._to_send = [self._comm.Send_init(buffer, self._peer, _TAG) for buffer in self._sent]
        self._to_receive = [self._comm.Recv_init(buffer, self._peer, _TAG) for buffer in self._received]

    def start(self, index: int) -> None:
        self._to_send[index].Start()
        self._sends.append(self._to_send[index])

    def receive(self, indices: Sequence[int]) -> None:
        requests = [self._to_receive[index] for index in indices]
        MPI.Prequest.Startall(requests)
        MPI.Request.Waitall(requests)

    def close(self) -> None:
        for request in (*self._to_send, *self._to_receive):
            request.Free()
        self._to_send, self._to_receive = [], []


class Blocking(Raw):
    """Send and Recv: one message after the other."""

    name = "blocking"

    def start(self, index: int) -> None:
        self._comm.Send(self._sent[index], self._peer, _TAG)

    def receive(self, indices: Sequence[int]) -> None:
        for index in indices:
            self._comm.Recv(self._received[index], self._peer, _TAG)


class Gloo:
    """torch.distributed over TCP. The ranks meet at a port of rank 0's, of which MPI tells."""

    name = "gloo"

    def __init__(self, endpoint: Endpoint, buffers: Buffers, host: str) -> None:
        """`host`: where rank 1 finds rank 0; rank 0's counts."""
        self._peer, self._buffers = 1 - endpoint.rank, buffers
        if endpoint.rank == 0:
            store = dist.TCPStore(host, 0, 2, is_master=True, wait_for_workers=False)
            endpoint.broadcast([host, store.port])
        else:
            host, port = endpoint.broadcast(None)
            store = dist.TCPStore(host, port, 2, is_master=False)
        dist.init_process_group("gloo", store=store, rank=endpoint.rank, world_size=2)
        self._sends: list[dist.Work | None] = []

    def resize(self, size: int) -> None:
        self._sent = [torch.from_numpy(buffer[:size]) for buffer in self._buffers.sent]
        self._received = [torch.from_numpy(buffer[:size]) for buffer in self._buffers.received]

    def start(self, index: int) -> None:
        self._sends.append(dist.isend(self._sent[index], self._peer))

    def progress(self) -> None:
        """It has a thread of its own."""

    def finish(self) -> None:
        _wait(self._sends)
        self._sends.clear()

    def receive(self, indices: Sequence[int]) -> None:
        _wait([dist.irecv(self._received[index], self._peer) for index in indices])

    def close(self) -> None:
        dist.destroy_process_group()


def _wait(works: "list[dist.Work | None]") -> None:
    for work in works:
        assert work is not None, "None only for ranks outside of the group"
        work.wait()


def all_ways(endpoint: Endpoint, nodes: int, largest: int) -> dict[str, Way]:
    """Every way between the two ranks of a world on so many nodes, by name, for messages of at most `largest` bytes.

    Collective. On one node gloo goes over the loopback interface: a node may not know its own name.
    """
    buffers = Buffers(largest)
    host = "127.0.0.1" if nodes == 1 else socket.gethostname()
    ways: list[Way] = [kind(endpoint, buffers) for kind in (Channel, Raw, Persistent, Blocking)]
    ways.append(Gloo(endpoint, buffers, host))
    return {way.name: way for way in ways}
