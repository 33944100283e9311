"""What the rest of the program knows of communication: messages, inboxes and outboxes. No MPI here.

A message is a short header of int32 words and an optional tensor, sent as one. A channel carries messages
from one rank to another in order; it has a fixed number of slots of a fixed capacity, planned before the
loop starts.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Message:
    """A header and a payload. A received message is a view of its slot: it is valid until the next `take`."""

    header: np.ndarray  # int32, [words]
    payload: torch.Tensor | None = None  # [rows, width]

    @property
    def is_end(self) -> bool:
        return len(self.header) == 0


END = Message(np.empty(0, dtype=np.int32))
"""Ends a stream: the only message without a header."""


@dataclass(frozen=True)
class ChannelPlan:
    """One planned link: what a slot must hold, and how many slots there are."""

    source: int
    destination: int
    tag: int
    header_words: int  # capacity
    rows: int  # capacity
    width: int
    dtype: torch.dtype
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


class SlotLayout:
    """Where header and payload lie in a slot's bytes: [words, rows, header..., pad to 64, payload...]."""

    def __init__(self, plan: ChannelPlan) -> None:
        self.plan = plan
        self.payload_offset = _aligned(4 * (2 + plan.header_words))
        self.capacity_bytes = self.payload_offset + plan.rows * plan.width * plan.dtype.itemsize

    def allocate(self) -> torch.Tensor:
        return torch.zeros(self.capacity_bytes, dtype=torch.uint8)

    def encode(self, slot: torch.Tensor, message: Message) -> int:
        """Copy a message into a slot; returns the bytes to send. Raises `ValueError` beyond the capacity."""
        words = len(message.header)
        rows = 0 if message.payload is None else message.payload.shape[0]
        if words > self.plan.header_words or rows > self.plan.rows:
            raise ValueError(
                f"message of {words} header words and {rows} rows: the channel was planned for "
                f"{self.plan.header_words} words and {self.plan.rows} rows"
            )
        head = slot[: self.payload_offset].numpy().view(np.int32)
        head[0], head[1] = words, rows
        head[2 : 2 + words] = message.header
        if message.payload is not None and rows:
            self._payload(slot, rows).copy_(message.payload)
        return self.payload_offset + rows * self.plan.width * self.plan.dtype.itemsize

    def decode(self, slot: torch.Tensor) -> Message:
        head = slot[: self.payload_offset].numpy().view(np.int32)
        words, rows = int(head[0]), int(head[1])
        return Message(head[2 : 2 + words], self._payload(slot, rows) if rows else None)

    def _payload(self, slot: torch.Tensor, rows: int) -> torch.Tensor:
        end = self.payload_offset + rows * self.plan.width * self.plan.dtype.itemsize
        return slot[self.payload_offset : end].view(self.plan.dtype).view(rows, self.plan.width)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
