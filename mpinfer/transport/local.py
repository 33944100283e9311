"""A channel inside one process: the ring of a one-stage replica, and pipelines in tests without MPI."""

from queue import SimpleQueue

from mpinfer.transport.message import Message


class LocalChannel:
    """Both ends of a channel that never leaves the process. The ends may be in different threads."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[Message] = SimpleQueue()

    def start(self, micro_batch: int, message: Message) -> None:
        self._messages.put(message)

    def take(self, micro_batch: int) -> Message:
        return self._messages.get()

    def close(self) -> None:
        """Nothing was prepared."""

    def drain(self) -> None:
        """Nothing is ever on its way."""
