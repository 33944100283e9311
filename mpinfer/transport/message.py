"""What the rest of the program knows of communication: messages, inboxes and outboxes. No MPI here.

A message is a short header of int32 words and the values that cross a cut, tensors and numbers, sent as one. A channel
carries messages from one rank to another in order; it has a fixed number of slots of a fixed capacity, planned before
the loop starts.
"""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import torch

ALIGNMENT_BYTES = 64

Value = torch.Tensor | int


@dataclass(frozen=True)
class Message:
    """A header and values. Tensors of a received message are views of its slot: valid until the next `take`."""

    header: np.ndarray  # int32, [words]
    values: tuple[Value, ...] = ()

    @property
    def is_end(self) -> bool:
        return len(self.header) == 0

    @property
    def payload(self) -> torch.Tensor:
        """The one tensor of a message that has one."""
        (tensor,) = self.values
        assert isinstance(tensor, torch.Tensor)
        return tensor


END = Message(np.empty(0, dtype=np.int32))
"""Ends a stream: the only message without a header."""


@dataclass(frozen=True)
class ChannelPlan:
    """One planned link: what a slot must hold at most, and how many slots there are."""

    source: int
    destination: int
    tag: int
    header_words: int
    values: int
    dimensions: int  # of all values together
    payload_bytes: int  # of all values together, each padded to the alignment
    depth: int  # slots


class Inbox(Protocol):
    def take(self, micro_batch: int) -> Message:
        """The next message, waiting for it if need be."""

    def close(self) -> None:
        """Give up what is prepared for messages that will not come, once the stream has ended."""


class Outbox(Protocol):
    def start(self, micro_batch: int, message: Message) -> None:
        """Start sending; returns as soon as the message is copied into a free slot."""

    def drain(self) -> None:
        """Wait until everything that was started is complete."""


_WORDS_A_VALUE = 3  # kind, then dimensions and sizes, or the two halves of a number
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES, start=1)}
_NUMBER = 0  # the code of a value that is no tensor; a negative one is of a tensor whose channels lie innermost
_INNERMOST, _OUTERMOST = (0, 2, 3, 1), (0, 3, 1, 2)  # images, from channels first to last and back


class SlotLayout:
    """Where a message lies in a slot's bytes: [header words, values, header..., descriptions..., then each tensor at a
    multiple of 64]."""

    def __init__(self, plan: ChannelPlan) -> None:
        self.plan = plan
        words = 2 + plan.header_words + _WORDS_A_VALUE * plan.values + plan.dimensions
        self.payload_offset = padded(4 * words)
        self.capacity_bytes = self.payload_offset + plan.payload_bytes

    def allocate(self) -> torch.Tensor:
        return torch.zeros(self.capacity_bytes, dtype=torch.uint8)

    def encode(self, slot: torch.Tensor, message: Message) -> int:
        """Copy a message into a slot; returns the bytes to send. Raises `ValueError` beyond the capacity."""
        head = slot[: self.payload_offset].numpy().view(np.int32)
        words = [len(message.header), len(message.values), *message.header.tolist()]
        offset = self.payload_offset
        tensors = []
        for value in message.values:
            if isinstance(value, int):
                words += [_NUMBER, value & 0x7FFFFFFF, value >> 31]
                continue
            if _is_channels_last(value):
                words += [-_CODES[value.dtype], value.dim(), *value.shape]
                value = value.permute(_INNERMOST)
            else:
                words += [_CODES[value.dtype], value.dim(), *value.shape]
            tensors.append((offset, value))
            offset += padded(value.nbytes)
        if len(words) > len(head) or offset > self.capacity_bytes:
            raise ValueError(
                f"message of {len(words)} words and {offset - self.payload_offset} bytes: the channel was planned for "
                f"{len(head)} words and {self.plan.payload_bytes} bytes"
            )
        head[: len(words)] = words
        for start, tensor in tensors:
            _view(slot, start, tensor.dtype, tuple(tensor.shape)).copy_(tensor)
        return offset

    def decode(self, slot: torch.Tensor) -> Message:
        head = slot[: self.payload_offset].numpy().view(np.int32)
        header_words, count = head[:2].tolist()
        descriptions = iter(head[2 + header_words :].tolist())
        offset = self.payload_offset
        values: list[Value] = []
        for _ in range(count):
            code, first = next(descriptions), next(descriptions)
            if code == _NUMBER:
                values.append(first | next(descriptions) << 31)
                continue
            shape = tuple(next(descriptions) for _ in range(first))
            dtype = _DTYPES[abs(code) - 1]
            if code > 0:
                values.append(_view(slot, offset, dtype, shape))
            else:
                inner = tuple(shape[axis] for axis in _INNERMOST)
                values.append(_view(slot, offset, dtype, inner).permute(_OUTERMOST))
            offset += padded(prod(shape) * dtype.itemsize)
        return Message(head[2 : 2 + header_words], tuple(values))


def padded(size_bytes: int) -> int:
    """What a tensor of so many bytes takes in a slot."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return (
        tensor.dim() == len(_INNERMOST)
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    )


def _view(slot: torch.Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return slot[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
