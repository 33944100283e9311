"""A pipeline stage of a decoder: blocks, their KV cache, and the messages that pass between stages."""

from typing import NamedTuple

import numpy as np
import torch

from mpinfer.errors import OutOfMemoryError
from mpinfer.generate.cache import KVCache, PackedStep
from mpinfer.generate.readout import Readout
from mpinfer.generate.scheduler import Segment, Step
from mpinfer.models.decoder import DecoderPart
from mpinfer.models.halving import Halving
from mpinfer.transport.message import Message

_COUNTS, _SEGMENT_WORDS = 2, 4


def header_words(slots: int, segments: int, targets: int) -> int:
    """Most words of the header of a step with that many segments and targets, of a replica with `slots` slots."""
    return _COUNTS + _SEGMENT_WORDS * segments + slots + targets


class Header(NamedTuple):
    """What every stage must know of a step."""

    segments: list[Segment]
    released: list[int]
    targets: list[int]


def encode_step(step: Step) -> Message:
    """The message that enters the first stage: segments in the header, token ids [tokens, 1] as payload."""
    counts = [len(step.segments), len(step.released)]
    segments = [word for segment in step.segments for word in segment]
    header = np.array([*counts, *segments, *step.released, *step.targets], dtype=np.int32)
    return Message(header, (torch.tensor(step.tokens, dtype=torch.int64)[:, None],))


def decode_header(header: np.ndarray) -> Header:
    segments, released = header[:_COUNTS].tolist()
    end = _COUNTS + _SEGMENT_WORDS * segments
    rows = header[_COUNTS:end].reshape(segments, _SEGMENT_WORDS).tolist()
    rest = header[end:].tolist()
    return Header([Segment(*row) for row in rows], rest[:released], rest[released:])


class DecodeStage:
    """Keeps no books: all that a step needs travels in its header.

    `with_hidden`: a last stage sends final hidden states along with what it reads out of them.
    """

    def __init__(
        self, part: DecoderPart, cache: KVCache, readout: Readout, halving: Halving, with_hidden: bool = True
    ) -> None:
        self._part, self._cache, self._readout, self._with_hidden = part, cache, readout, with_hidden
        self._halving = halving

    def forward(self, message: Message) -> Message:
        """Token ids [tokens, 1] or activations [tokens, hidden] in, activations out; of the last stage what it reads
        out of the final hidden states of the step's samples."""
        segments, released, targets = decode_header(message.header)
        for slot in released:
            self._cache.release(slot)
        self._cache.grow(segments)
        whole = _Piece(segments, message.payload, targets)
        found = []
        for piece, y in self._halving.run(self._compute, whole, _halves):
            if y is None:
                raise OutOfMemoryError(
                    f"out of memory for one token behind {piece.segments[0].start} others, alone in its step; lower "
                    f"generate.max_length, or give each rank more memory, and --resume"
                )
            found.append(y)
        return Message(message.header, (found[0] if len(found) == 1 else torch.cat(found),))

    def _compute(self, piece: "_Piece") -> torch.Tensor:
        step = PackedStep(self._cache, piece.segments, self._part.kernels)
        x = piece.x.to(self._cache.device)
        y = self._part(x[:, 0] if self._part.first else x, step.positions, step)
        if not self._part.last:
            return y
        samples = step.sampled(y)
        found = self._readout.reduce(samples, piece.targets)
        return torch.cat([samples.float(), found], dim=1) if self._with_hidden else found


class _Piece(NamedTuple):
    """Of a step: segments, what enters the stage for their tokens, the tokens to be scored."""

    segments: list[Segment]
    x: torch.Tensor
    targets: list[int]


def _halves(piece: _Piece) -> tuple[_Piece, _Piece] | None:
    """By segments; one alone by its tokens, the first of which the others look at."""
    segments, x, targets = piece
    if len(segments) > 1:
        middle = len(segments) // 2
        first, second = segments[:middle], segments[middle:]
    else:
        (whole,) = segments
        early = whole.length // 2
        if not early:
            return None
        sampled = max(0, whole.samples - (whole.length - early))
        first = [Segment(whole.slot, whole.start, early, sampled)]
        second = [Segment(whole.slot, whole.start + early, whole.length - early, whole.samples - sampled)]
    tokens, samples = sum(s.length for s in first), sum(s.samples for s in first)
    return _Piece(first, x[:tokens], targets[:samples]), _Piece(second, x[tokens:], targets[samples:])
