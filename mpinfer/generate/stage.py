"""A pipeline stage of a decoder: blocks, their KV cache, and the messages that pass between stages."""

import numpy as np
import torch

from mpinfer.generate.cache import KVCache, PackedStep
from mpinfer.generate.scheduler import Segment, Step
from mpinfer.models.decoder import DecoderPart
from mpinfer.transport.message import Message

SEGMENT_WORDS = 4


def header_words(segments: int) -> int:
    """Words of the header of a step with that many segments."""
    return 1 + SEGMENT_WORDS * segments


def encode_step(step: Step) -> Message:
    """The message that enters the first stage: segments in the header, token ids [tokens, 1] as payload."""
    header = np.empty(header_words(len(step.segments)), dtype=np.int32)
    header[0] = len(step.segments)
    header[1:] = np.array(step.segments, dtype=np.int32).reshape(-1)
    return Message(header, torch.tensor(step.tokens, dtype=torch.int64)[:, None])


def decode_segments(header: np.ndarray) -> list[Segment]:
    rows = header[1:].reshape(int(header[0]), SEGMENT_WORDS).tolist()
    return [Segment(slot, start, length, bool(sample)) for slot, start, length, sample in rows]


class DecodeStage:
    """Keeps no books: all that a step needs travels in its header."""

    def __init__(self, part: DecoderPart, cache: KVCache) -> None:
        self._part, self._cache = part, cache

    def forward(self, message: Message) -> Message:
        """Token ids or activations in; activations, or of the last stage sampled token ids [samples, 1], out."""
        assert message.payload is not None
        step = PackedStep(self._cache, decode_segments(message.header))
        x = message.payload.to(self._cache.device)
        y = self._part(x[:, 0] if self._part.first else x, step.positions, step, step.sampled)
        return Message(message.header, y.argmax(-1, keepdim=True) if self._part.last else y)
