"""A channel inside one process: the ring of a one-stage replica, and pipelines in tests without MPI."""

from collections import deque

from mpinfer.transport.message import Message


class LocalChannel:
    """Both ends of a channel that never leaves the process."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()

    def start(self, micro_batch: int, message: Message) -> None:
        self._messages.append(message)

    def take(self, micro_batch: int) -> Message:
        return self._messages.popleft()

    def drain(self) -> None:
        """Nothing is ever on its way."""
