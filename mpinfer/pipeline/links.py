"""The channels of one rank, several of them taken as one, and what went over them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from mpinfer.models.tensor_parallel import Shard
from mpinfer.observe.account import Account
from mpinfer.plan.layout import Coordinates, Replica
from mpinfer.spec import TransportSpec
from mpinfer.transport.channel import MpiInbox, MpiOutbox
from mpinfer.transport.collective import ShardGroup
from mpinfer.transport.endpoint import Endpoint
from mpinfer.transport.gpu import find_gpu
from mpinfer.transport.message import END, ChannelPlan, Inbox, Message, Outbox
from mpinfer.transport.progress import check_progress, progressing


class Links:
    """Makes the ends of this rank's channels; waiting at them goes to the account."""

    def __init__(self, endpoint: Endpoint, account: Account, transport: TransportSpec, device: str = "cpu") -> None:
        """`device` computes what is sent. Raises `SpecError` when this MPI cannot make progress as asked."""
        check_progress(transport.progress)
        self._gpu = find_gpu(device)
        self._endpoint, self._account, self._transport = endpoint, account, transport
        self._inboxes: list[MpiInbox] = []
        self._outboxes: list[MpiOutbox] = []
        self._groups: list[ShardGroup] = []

    def inbox(self, plan: ChannelPlan) -> MpiInbox:
        note = self._note(plan, sent=False)
        self._inboxes.append(MpiInbox(self._endpoint, plan, self.waiting, note, self._gpu))
        return self._inboxes[-1]

    def outbox(self, plan: ChannelPlan) -> MpiOutbox:
        blocking, note = self._transport.blocking, self._note(plan, sent=True)
        self._outboxes.append(MpiOutbox(self._endpoint, plan, self.waiting, blocking, note, self._gpu))
        return self._outboxes[-1]

    def join_shards(self, layout: Replica, coordinates: Coordinates) -> tuple[Shard | None, Callable[[bool], bool]]:
        """This rank among those that hold its stage with it (None where it holds the stage alone), and whether any of
        them says so; all of them join at the same time, and close their links together."""
        if layout.shards == 1:
            return None, bool
        group = ShardGroup(self._endpoint, layout.stage_ranks(coordinates.stage), self.waiting)
        self._groups.append(group)
        return Shard(coordinates.shard, layout.shards, group.all_reduce, group.memory()), group.any

    def restart(self) -> None:
        """Forget what was summed: the loop begins now."""
        for group in self._groups:
            group.restart()

    def close(self) -> None:
        """Once no shard has anything left to sum; all of a group call it."""
        for group in self._groups:
            group.free()

    def abandon(self) -> None:
        """A rank at the other end has died: messages that are on their way stay there."""
        for outbox in self._outboxes:
            self._endpoint.detach(outbox)

    def progressing(self) -> AbstractContextManager[None]:
        """Messages move while this lasts, as `transport.progress` says."""
        return progressing(self._endpoint, self._transport.progress)

    def figures(self) -> dict[str, Any]:
        """Bytes over channels, of sums and in control messages, and how long sends were on their way."""
        summed = sum(group.bytes_summed for group in self._groups)
        control_sent, control_received = self._endpoint.control_bytes_sent, self._endpoint.control_bytes_received
        return {
            "in_flight_s": sum(outbox.in_flight_s for outbox in self._outboxes),
            "bytes_sent": sum(outbox.bytes_sent for outbox in self._outboxes) + summed + control_sent,
            "bytes_received": sum(inbox.bytes_received for inbox in self._inboxes) + summed + control_received,
        }

    def waiting(self, phase: Any) -> AbstractContextManager[None]:
        """Counts what happens inside for a phase of the account."""
        return self._account.phase(phase)

    def _note(self, plan: ChannelPlan, sent: bool) -> Callable[[int], None]:
        """Remembers when messages pass this end."""
        return self._account.recorder.messages(plan.source, plan.destination, plan.tag, sent)


class Gathered:
    """An inbox of several that tell of the same steps: a message has the values of all, and the first one's header."""

    def __init__(self, inboxes: Sequence[Inbox]) -> None:
        self._inboxes = inboxes

    def take(self, micro_batch: int) -> Message:
        messages = [inbox.take(micro_batch) for inbox in self._inboxes]
        if messages[0].is_end:
            return END
        return Message(messages[0].header, tuple(value for message in messages for value in message.values))

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.close()


class Copied:
    """An inbox of which others get a copy of every message as it is taken."""

    def __init__(self, inbox: Inbox, copies: Sequence[Outbox]) -> None:
        self._inbox, self._copies = inbox, copies

    def take(self, micro_batch: int) -> Message:
        message = self._inbox.take(micro_batch)
        for copy in self._copies:
            copy.start(micro_batch, message)
        return message

    def close(self) -> None:
        self._inbox.close()
        for copy in self._copies:
            copy.drain()
