"""What the rest of the program knows of communication: messages, inboxes and outboxes. No MPI here.

A message is a short header of int32 words and the values that cross a cut, tensors and numbers. A channel carries
messages from one rank to another in order; it has a fixed number of slots of a fixed capacity, planned before the loop
starts.

On its way a message is a **head**: fixed words (`_EPOCH` .. `_VALUES`), a description of each value, the header, and
the tensors, each at a multiple of 64 bytes. Tensors of more than `INLINE_BYTES` follow as a **body** of their own: then
a tensor that fills its memory is sent from where it is. Both have a planned capacity. Tensors beyond it are no error:
they follow as a body that the head announces, and the receiver makes room for this one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, cast

import numpy as np
import torch

from mpinfer.errors import TransportError
from mpinfer.spec import Wire
from mpinfer.transport.codec import ALIGNMENT_BYTES, ENCODINGS, Encoded, Plain, Shape, encoding_of, padded

INLINE_BYTES = 2**13
"""Up to here copying tensors into the head costs less than a second message."""

_SMALL_SLOTS = 16  # of a channel without bodies: 128 KB

TAGS = 64
"""Tags of channels are below, and above 0, with which clocks are compared; those from here on are of bodies."""

Value = torch.Tensor | int


@dataclass(frozen=True)
class Message:
    """A header and values. Tensors of a received message may lie in its slot: valid until the next `take`. Tensors that
    are sent must not change any more: they may be sent from where they are."""

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
    depth: int  # slots, at least
    wire: Wire = "none"  # how tensors of floats are encoded

    def __post_init__(self) -> None:
        if not 0 < self.tag < TAGS:
            raise ValueError(f"tag {self.tag} of a channel: must be from 1 to {TAGS - 1}")

    def __str__(self) -> str:
        return f"channel from rank {self.source} to rank {self.destination}, tag {self.tag}"

    @property
    def slots(self) -> int:
        """More than asked for where they take little memory: the receiver answers once in every round of them."""
        return self.depth if self.body_bytes else max(self.depth, _SMALL_SLOTS)

    @property
    def words(self) -> int:
        """Of a head, at most."""
        return _FIXED + self.header_words + _WORDS_A_VALUE * self.values + self.dimensions

    @property
    def head_bytes(self) -> int:
        """Of a head, at most."""
        return padded(4 * self.words) + self.inline_bytes

    @property
    def inline_bytes(self) -> int:
        """Of the tensors in a head, at most."""
        return min(self.payload_bytes, INLINE_BYTES)

    @property
    def body_bytes(self) -> int:
        """Of a body, as planned; 0 where none is expected."""
        return self.payload_bytes if self.payload_bytes > INLINE_BYTES else 0


class Inbox(Protocol):
    def take(self, micro_batch: int) -> Message:
        """The next message, waiting for it if need be."""

    def close(self) -> None:
        """Give up what is prepared for messages that will not come, once the stream has ended."""


class Outbox(Protocol):
    def start(self, micro_batch: int, message: Message) -> None:
        """Start sending; returns as soon as a free slot holds the message."""

    def drain(self) -> None:
        """Wait until everything that was started is complete."""


_SEQUENCE, _EPOCH, _TAG, _UNITS, _HEADER, _VALUES, _FIXED = range(7)
"""Words of every head: the message's number in its channel (31 bits), the run, the channel, 64-byte units of the head,
words of the header, values."""

_NUMBER_BITS = 2**31 - 1
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
_ENCODING_BITS = 4  # of a code, the lowest; the dtype's are above
_INNERMOST, _OUTERMOST = (0, 2, 3, 1), (0, 3, 1, 2)  # images, from channels first to last and back

SAME_VERSIONS = "all ranks must run one version of mpinfer and of one MPI library"


@dataclass(frozen=True)
class _Item:
    """A tensor of a message: how it lies in memory."""

    encoding: type[Encoded]
    dtype: torch.dtype
    shape: Shape  # with the channels innermost, if they are
    innermost: bool

    @classmethod
    def of(cls, value: torch.Tensor, wire: Wire) -> "_Item":
        innermost = _is_channels_last(value)
        shape = tuple((value.permute(_INNERMOST) if innermost else value).shape)
        return cls(encoding_of(wire, value.dtype, shape), value.dtype, shape, innermost)

    @classmethod
    def described(cls, code: int, shape: Shape) -> "_Item":
        dtype, encoding = divmod(abs(code), 2**_ENCODING_BITS)
        return cls(ENCODINGS[encoding], _DTYPES[dtype - 1], shape, code < 0)

    def describe(self) -> list[int]:
        code = _CODES[self.dtype] << _ENCODING_BITS | ENCODINGS.index(self.encoding)
        return [-code if self.innermost else code, len(self.shape), *self.shape]

    @property
    def plain(self) -> bool:
        """Whether the message has the tensor's own bytes."""
        return self.encoding is Plain

    @property
    def size_bytes(self) -> int:
        return self.encoding.size_bytes(self.dtype, self.shape)

    def bind(self, space: torch.Tensor, offset: int) -> Encoded:
        return self.encoding(space[offset : offset + self.size_bytes], self.dtype, self.shape)


class _Layout:
    """Where the parts of one message lie, by what is in it."""

    def __init__(self, items: Sequence[_Item], described: int, header_words: int, inline_bytes: int) -> None:
        self.items = items
        start = _FIXED + described
        self.descriptions, self.header = slice(_FIXED, start), slice(start, start + header_words)
        self.words = start + header_words
        ends = list(accumulate((item.size_bytes for item in items), initial=0))
        self.body_bytes = ends[-1] if ends[-1] > inline_bytes else 0
        first = 0 if self.body_bytes else padded(4 * self.words)
        self.offsets = [first + end for end in ends[:-1]]
        self.head_bytes = padded(4 * self.words) + ends[-1] - self.body_bytes

    def bind(self, head: torch.Tensor, body: torch.Tensor) -> list[Encoded]:
        space = body if self.body_bytes else head
        return [item.bind(space, offset) for item, offset in zip(self.items, self.offsets, strict=True)]


def unused(size_bytes: int) -> torch.Tensor:
    """Memory for a body on the host: takes none before it is used, and then large pages, for which numpy asks where
    torch does not."""
    return torch.from_numpy(np.empty(size_bytes, dtype=np.uint8))


Empty = Callable[[int], torch.Tensor]
"""Makes memory of so many bytes."""


class SendSlot:
    """One slot at the sending end. What follows from the form of a message is kept for the next of the same form."""

    def __init__(self, plan: ChannelPlan, epoch: int, empty: Empty = unused) -> None:
        self._plan, self._empty = plan, empty
        self.head = torch.zeros(plan.head_bytes, dtype=torch.uint8)
        self.head_bytes = 0  # of it, in the message that was written last
        self.body: torch.Tensor | None = None  # what follows, if anything; to be held until it is sent
        self.body_bytes = 0
        self._words = self.head[: padded(4 * plan.words)].numpy().view(np.int32)
        self._words[[_EPOCH, _TAG]] = epoch, plan.tag
        self._own_body = empty(plan.body_bytes)
        self._form: tuple[object, ...] | None = None

    def write(self, message: Message, number: int) -> None:
        """Put the message with that number in its channel into the slot. Raises `TransportError` beyond the plan."""
        form = (len(message.header), *map(_form, message.values))
        if form != self._form:
            self._lay_out(message)
            self._form = form
        self._words[_SEQUENCE] = number & _NUMBER_BITS
        self._header[:] = message.header
        if self._direct and self._fills_its_memory(sole := message.payload):
            self.body = sole
            return
        for place, innermost, put in self._puts:
            value = cast(torch.Tensor, message.values[place])
            put(value.permute(_INNERMOST) if innermost else value)
        self.body = self._body

    def _lay_out(self, message: Message) -> None:
        items: list[_Item] = []
        descriptions: list[int] = []
        for value in message.values:
            if isinstance(value, int):
                descriptions += [_NUMBER, value & 0x7FFFFFFF, value >> 31]
            else:
                items.append(_Item.of(value, self._plan.wire))
                descriptions += items[-1].describe()
        self._layout = layout = _Layout(items, len(descriptions), len(message.header), self._plan.inline_bytes)
        if layout.words > self._plan.words:
            raise TransportError(
                f"{self._plan}: a message of {layout.words} words, planned for at most {self._plan.words}; this is a "
                "defect of mpinfer, please report it with the job file"
            )
        self._words[_UNITS : _VALUES + 1] = (
            layout.head_bytes // ALIGNMENT_BYTES,
            len(message.header),
            len(message.values),
        )
        self._words[layout.descriptions] = descriptions
        self._header = self._words[layout.header]
        self.head_bytes, self.body_bytes = layout.head_bytes, layout.body_bytes
        fits = self.body_bytes <= self._plan.body_bytes
        self._body = None if not self.body_bytes else self._own_body if fits else self._empty(self.body_bytes)
        encoded = layout.bind(self.head, self._own_body if self._body is None else self._body)
        places = [place for place, value in enumerate(message.values) if not isinstance(value, int)]
        self._puts = [
            (place, item.innermost, _put(space, cast(torch.Tensor, message.values[place])))
            for place, item, space in zip(places, items, encoded, strict=True)
        ]
        # From where it is, if nothing has to be done to it and no padding would follow.
        self._direct = bool(self.body_bytes) and len(message.values) == 1 and self._sendable(message.payload)

    def _sendable(self, tensor: torch.Tensor) -> bool:
        dense = tensor.is_contiguous() or _is_channels_last(tensor)
        plain = self._layout.items[0].plain and tensor.nbytes == self.body_bytes
        return plain and dense and not tensor.is_complex()  # which may be yet to be conjugated

    def _fills_its_memory(self, tensor: torch.Tensor) -> bool:
        """Whether it is no part of something else, as a slot of an inbox, which may be overwritten; where MPI reads."""
        return tensor.device.type == self._own_body.device.type and tensor.untyped_storage().nbytes() == tensor.nbytes


class ReceiveSlot:
    """One slot at the receiving end: memory for a head and a body, and the message that lies in them."""

    def __init__(self, plan: ChannelPlan, epoch: int, empty: Empty = unused) -> None:
        self._plan, self._epoch = plan, epoch
        self.head = torch.zeros(plan.head_bytes, dtype=torch.uint8)
        # Larger than any tensor in it: none fills its memory, and one that is passed on is copied.
        self.body = empty(plan.body_bytes + ALIGNMENT_BYTES)
        self._words = self.head[: padded(4 * plan.words)].numpy().view(np.int32)
        self._bytes = self.head.numpy().data
        self._known: bytes | None = None  # all but the number, of the head that was read last, and how far it goes
        self._end = self._head_bytes = self._body_bytes = 0
        self._message: Message | None = None  # in this slot, as the head that was read last has it

    def check_head(self, received_bytes: int, number: int) -> int:
        """Check a head that has come; returns the bytes of the body that follows.

        Raises `TransportError` when it is not the message with that number, or not whole.
        """
        known = self._bytes[4 * _EPOCH : self._end] == self._known and received_bytes == self._head_bytes
        if known and self._words.item(_SEQUENCE) == number & _NUMBER_BITS:
            return self._body_bytes
        sequence, epoch, tag, units, *_ = self._words[:_FIXED].tolist()
        if received_bytes < 4 * _FIXED or received_bytes != units * ALIGNMENT_BYTES:
            raise _cut_short(self._plan, number, received_bytes, units * ALIGNMENT_BYTES)
        if epoch != self._epoch:
            raise _stale(self._plan, f"a message of run {epoch:x} came in run {self._epoch:x}")
        if tag != self._plan.tag:
            raise _stale(self._plan, f"a message of stream {tag} came")
        if sequence != number & _NUMBER_BITS:
            raise _stale(self._plan, f"message {sequence} came where message {number} was due")
        self._lay_out()
        self._head_bytes, self._body_bytes = received_bytes, self._layout.body_bytes
        return self._body_bytes

    def message(self, body: torch.Tensor | None = None) -> Message:
        """The message of the head that was checked last; `body`: where its body is, if not in the slot."""
        if body is not None:
            return self._bind(body)
        if self._message is None:
            message = self._bind(self.body)
            if all(item.plain for item in self._layout.items):  # then its tensors are the slot's memory
                self._message = message
            return message
        return self._message

    def check_body(self, received_bytes: int, number: int) -> None:
        """Check the body. Raises `TransportError` when it is not whole."""
        if received_bytes != self._layout.body_bytes:
            raise _cut_short(self._plan, number, received_bytes, self._layout.body_bytes)

    def _lay_out(self) -> None:
        header_words, count = self._words[_HEADER : _VALUES + 1].tolist()
        words = iter(self._words[_FIXED:].tolist())
        self._values: list[_Item | int] = []  # as the message has them
        described = 0
        for _ in range(count):
            code, first = next(words), next(words)
            if code == _NUMBER:
                self._values.append(first | next(words) << 31)
                described += _WORDS_A_VALUE
            else:
                self._values.append(_Item.described(code, tuple(next(words) for _ in range(first))))
                described += 2 + first
        items = [value for value in self._values if isinstance(value, _Item)]
        self._layout = _Layout(items, described, header_words, self._plan.inline_bytes)
        self._end = 4 * (_FIXED + described)
        self._known = bytes(self._bytes[4 * _EPOCH : self._end])
        self._message = None

    def _bind(self, body: torch.Tensor) -> Message:
        encoded = iter(self._layout.bind(self.head, body))
        values: list[Value] = []
        for value in self._values:
            if isinstance(value, int):
                values.append(value)
            else:
                tensor = next(encoded).get()
                values.append(tensor.permute(_OUTERMOST) if value.innermost else tensor)
        return Message(self._words[self._layout.header], tuple(values))


def _form(value: Value) -> object:
    """What decides how a value lies in a message."""
    return value if isinstance(value, int) else (value.dtype, value.shape, value.stride(), value.is_cpu)


def _put(encoded: Encoded, value: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """What puts tensors of the same form as this one into a message."""
    if not isinstance(encoded, Plain) or not encoded.get().is_cpu or not value.is_cpu:
        return encoded.put
    # A complex tensor may be yet to be conjugated.
    return encoded.put_dense if value.is_contiguous() and not value.is_complex() else encoded.put


def _cut_short(plan: ChannelPlan, number: int, received_bytes: int, expected_bytes: int) -> TransportError:
    return TransportError(
        f"{plan}: message {number} was cut short, {received_bytes} of {expected_bytes} bytes came; {SAME_VERSIONS}"
    )


def _stale(plan: ChannelPlan, what: str) -> TransportError:
    return TransportError(f"{plan}: {what}; {SAME_VERSIONS}")


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return (
        tensor.dim() == len(_INNERMOST)
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    )
