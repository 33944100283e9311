"""The channels of one rank, and what went over them."""

from contextlib import AbstractContextManager
from typing import Any

from mpinfer.observe.account import Account
from mpinfer.transport.channel import MpiInbox, MpiOutbox
from mpinfer.transport.endpoint import Endpoint
from mpinfer.transport.message import ChannelPlan


class Links:
    """Makes the ends of this rank's channels; waiting at them goes to the account."""

    def __init__(self, endpoint: Endpoint, account: Account, blocking: bool) -> None:
        self._endpoint, self._account, self._blocking = endpoint, account, blocking
        self._inboxes: list[MpiInbox] = []
        self._outboxes: list[MpiOutbox] = []

    def inbox(self, plan: ChannelPlan) -> MpiInbox:
        self._inboxes.append(MpiInbox(self._endpoint, plan, self._waiting))
        return self._inboxes[-1]

    def outbox(self, plan: ChannelPlan) -> MpiOutbox:
        self._outboxes.append(MpiOutbox(self._endpoint, plan, self._waiting, self._blocking))
        return self._outboxes[-1]

    def figures(self) -> dict[str, Any]:
        """Bytes over channels and in control messages, and how long sends were on their way."""
        control_sent, control_received = self._endpoint.control_bytes_sent, self._endpoint.control_bytes_received
        return {
            "in_flight_s": sum(outbox.in_flight_s for outbox in self._outboxes),
            "bytes_sent": sum(outbox.bytes_sent for outbox in self._outboxes) + control_sent,
            "bytes_received": sum(inbox.bytes_received for inbox in self._inboxes) + control_received,
        }

    def _waiting(self, phase: Any) -> AbstractContextManager[None]:
        return self._account.phase(phase)
