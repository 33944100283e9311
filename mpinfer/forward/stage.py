"""A pipeline stage of a model of any kind: what crosses into it in, what crosses out of it out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpinfer.models.graph import GraphPart, WholePart
from mpinfer.models.halving import Halving
from mpinfer.transport.message import Message


def failed(index: int) -> int:
    """How the header of a batch names a record that has left it, for want of memory. Its own inverse."""
    return ~index


class ForwardStage:
    """Keeps no books: the header, which says what records a batch is of, passes through. Only records that even alone
    need more memory than there is leave their batch: a header names them behind the others."""

    def __init__(self, part: GraphPart | WholePart, halving: Halving) -> None:
        self._part, self._halving = part, halving

    def forward(self, message: Message) -> Message:
        if not message.values:  # every record has failed
            return message
        present = message.header[message.header >= 0]
        batch = range(len(present))
        pieces = self._halving.run(lambda piece: self._compute(message.values, piece, batch), batch, _halves)
        if len(pieces) == 1 and pieces[0][1] is not None:
            return Message(message.header, tuple(pieces[0][1]))
        found = [(piece, values) for piece, values in pieces if values is not None]
        done = [record for piece, _ in found for record in piece]
        lost = [failed(present[record]) for piece, values in pieces if values is None for record in piece]
        header = np.array([*present[done], *lost, *message.header[message.header < 0]], dtype=np.int32)
        values = self._part.join([values for _, values in found], [len(piece) for piece, _ in found]) if found else ()
        return Message(header, tuple(values))

    def _compute(self, values: Sequence[Any], piece: range, batch: range) -> Sequence[Any]:
        """Of a whole batch all rows: behind its records there may be some that fill it up."""
        return self._part.forward(values if piece == batch else self._part.take(values, piece.start, piece.stop))


def _halves(piece: range) -> tuple[range, range] | None:
    middle = len(piece) // 2
    return (piece[:middle], piece[middle:]) if middle else None
