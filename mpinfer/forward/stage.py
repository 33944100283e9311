"""A pipeline stage of a model of any kind: what crosses into it in, what crosses out of it out."""

from mpinfer.models.graph import GraphPart, WholePart
from mpinfer.transport.message import Message


class ForwardStage:
    """Keeps no books: the header, which says what records a batch is of, passes through."""

    def __init__(self, part: GraphPart | WholePart) -> None:
        self._part = part

    def forward(self, message: Message) -> Message:
        return Message(message.header, tuple(self._part.forward(message.values)))
