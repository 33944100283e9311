"""Messages, their slots and their encodings, without MPI."""

import numpy as np
import pytest
import torch

from mpinfer.errors import ExitCode, TransportError
from mpinfer.transport.codec import Plain, ScaledRows, encoded_bytes, encoding_of
from mpinfer.transport.message import END, INLINE_BYTES, ChannelPlan, Message, ReceiveSlot, SendSlot

EPOCH = 77


def plan_of(payload_bytes, header_words=4, values=1, dimensions=4, wire="none", tag=7):
    return ChannelPlan(0, 1, tag, header_words, values, dimensions, payload_bytes, depth=2, wire=wire)


def header(*words):
    return np.array(words, dtype=np.int32)


def carry(sending, receiving, message, number=0):
    """What MPI does: the bytes of head and body from one slot into the other, then both checked."""
    sending.write(message, number)
    receiving.head[: sending.head_bytes] = sending.head[: sending.head_bytes]
    body_bytes = receiving.check_head(sending.head_bytes, number)
    assert body_bytes == sending.body_bytes
    if not body_bytes:
        assert sending.body is None
        return receiving.message()
    content = torch.empty(0, dtype=torch.uint8).set_(sending.body.untyped_storage())[:body_bytes]
    receiving.check_body(body_bytes, number)
    if body_bytes > receiving.body.nbytes:
        return receiving.message(content.clone())
    receiving.body[:body_bytes] = content
    return receiving.message()


def through(plan, *messages):
    """Messages as they come out of one slot, one after the other; views of it are copied."""
    sending, receiving = SendSlot(plan, EPOCH), ReceiveSlot(plan, EPOCH)
    came = []
    for number, message in enumerate(messages):
        received = carry(sending, receiving, message, number)
        values = tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in received.values)
        came.append(Message(received.header.copy(), values))
    return came


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("rows", [2, 5000])
def test_a_message_survives_its_slot(dtype, rows):
    payload = torch.arange(3 * rows).view(rows, 3).to(dtype)
    plan = plan_of(payload.nbytes + 64)
    sent = [Message(header(5, 6), (payload,)), Message(header(7, 8), (payload + 1,)), END]
    for message, received in zip(sent[:2], through(plan, *sent), strict=False):
        assert received.header.tolist() == message.header.tolist()
        assert received.payload.dtype == dtype
        assert torch.equal(received.payload, message.payload)
    assert through(plan, *sent)[2].is_end


def test_every_value_that_crosses_a_cut_survives_its_slot():
    """Inside the head, and in a body."""
    few = (
        torch.arange(6.0).view(2, 3).T,
        5,
        -(2**40),
        torch.tensor([True, False]),
        torch.zeros(0, 4),
        torch.tensor(7),
    )
    many = (*few[:5], torch.arange(INLINE_BYTES))
    plan = plan_of(4 * 64 + 8 * INLINE_BYTES, values=6, dimensions=6)
    sent = [Message(header(1), values) for values in (few, many, few, (*few[:1], 6, *few[2:]))]
    for message, received in zip(sent, through(plan, *sent), strict=True):
        for value, came in zip(message.values, received.values, strict=True):
            assert type(value) is type(came)
            if isinstance(value, torch.Tensor):
                assert value.dtype == came.dtype
                assert torch.equal(value, came)
            else:
                assert value == came


@pytest.mark.parametrize("side", [4, 64])
@pytest.mark.parametrize("wire", ["none", "bf16"])
def test_images_keep_their_channels_innermost(side, wire):
    """What a packed convolution gives is sent as it lies in memory, and taken up as it is."""
    image = torch.arange(2.0 * 8 * side * side).remainder(128).view(2, 8, side, side)
    image = image.contiguous(memory_format=torch.channels_last)
    plan = plan_of(image.nbytes, wire=wire)
    received = carry(SendSlot(plan, EPOCH), ReceiveSlot(plan, EPOCH), Message(header(1), (image,))).payload
    assert torch.equal(received, image)
    assert received.stride() == image.stride()


def test_a_large_tensor_is_sent_from_where_it_is():
    large = torch.ones(INLINE_BYTES)
    plan = plan_of(large.nbytes)
    slot = SendSlot(plan, EPOCH)
    slot.write(Message(header(1), (large,)), 0)
    assert slot.body is large
    slot.write(Message(header(1), (torch.ones(2 * INLINE_BYTES)[:INLINE_BYTES],)), 1)  # a part of something else
    assert slot.body.data_ptr() != large.data_ptr()
    slot.write(Message(header(1), (torch.ones(INLINE_BYTES - 1),)), 2)  # padding would follow
    assert slot.body.untyped_storage().nbytes() == plan.body_bytes


@pytest.mark.parametrize("numbers", [8, INLINE_BYTES])
def test_what_is_yet_to_be_conjugated_is(numbers):
    conjugated = torch.randn(numbers, dtype=torch.complex64).conj()
    plan = plan_of(conjugated.nbytes)
    received = carry(SendSlot(plan, EPOCH), ReceiveSlot(plan, EPOCH), Message(header(1), (conjugated,))).payload
    assert torch.equal(received, conjugated)


def test_a_received_tensor_that_is_passed_on_is_copied():
    """Its slot may be overwritten before it is sent."""
    large = torch.ones(INLINE_BYTES)
    plan = plan_of(large.nbytes)
    received = carry(SendSlot(plan, EPOCH), ReceiveSlot(plan, EPOCH), Message(header(1), (large,)))
    onward = SendSlot(plan, EPOCH)
    onward.write(received, 0)
    assert onward.body.data_ptr() != received.payload.data_ptr()


@pytest.mark.parametrize("payload_bytes", [64, INLINE_BYTES + 64])
def test_tensors_beyond_the_plan_are_announced(payload_bytes):
    plan = plan_of(payload_bytes)
    values = torch.arange(payload_bytes)
    fits, beyond = Message(header(1), (values[:8],)), Message(header(2), (values,))
    for message, received in zip((fits, beyond, fits), through(plan, fits, beyond, fits), strict=True):
        assert torch.equal(received.payload, message.payload)


def test_words_beyond_the_plan_are_refused():
    with pytest.raises(TransportError, match="rank 0 to rank 1, tag 7: a message of 21 words, planned for at most 17"):
        SendSlot(plan_of(64), EPOCH).write(Message(np.zeros(15, dtype=np.int32)), 0)


@pytest.mark.parametrize("tag", [0, 64])
def test_a_tag_of_the_transport_is_refused(tag):
    with pytest.raises(ValueError, match=f"tag {tag} of a channel: must be from 1 to 63"):
        plan_of(64, tag=tag)


@pytest.mark.parametrize(
    ("sender", "number", "lost_bytes", "problem"),
    [
        ((plan_of(64), EPOCH + 1), 3, 0, "a message of run 4e came in run 4d"),
        ((plan_of(64, tag=8), EPOCH), 3, 0, "a message of stream 8 came"),
        ((plan_of(64), EPOCH), 2, 0, "message 2 came where message 3 was due"),
        ((plan_of(64), EPOCH), 3, 64, "message 3 was cut short, 64 of 128 bytes came"),
        ((plan_of(64), EPOCH), 3, 128, "message 3 was cut short, 0 of 128 bytes came"),
    ],
)
def test_what_is_not_the_next_message_is_named(sender, number, lost_bytes, problem):
    sending, receiving = SendSlot(*sender), ReceiveSlot(plan_of(64), EPOCH)
    sending.write(Message(header(1), (torch.ones(4),)), number)
    receiving.head[: sending.head_bytes] = sending.head[: sending.head_bytes]
    with pytest.raises(TransportError, match=f"rank 0 to rank 1, tag 7: {problem}; all ranks must") as caught:
        receiving.check_head(sending.head_bytes - lost_bytes, 3)
    assert caught.value.exit_code == ExitCode.FAULT


def test_a_body_that_is_cut_short_is_named():
    plan = plan_of(8 * INLINE_BYTES)
    sending, receiving = SendSlot(plan, EPOCH), ReceiveSlot(plan, EPOCH)
    sending.write(Message(header(1), (torch.ones(INLINE_BYTES),)), 0)
    receiving.head[: sending.head_bytes] = sending.head[: sending.head_bytes]
    receiving.check_head(sending.head_bytes, 0)
    with pytest.raises(TransportError, match=f"message 0 was cut short, 64 of {4 * INLINE_BYTES} bytes came"):
        receiving.check_body(64, 0)


def test_numbers_of_messages_begin_again():
    plan = plan_of(64)
    received = carry(SendSlot(plan, EPOCH), ReceiveSlot(plan, EPOCH), Message(header(1)), 2**31 + 5)
    assert received.header.tolist() == [1]


def activations(scale, rows=40, width=96):
    """With rows of very different size, as some tokens' are, and a row of zeros."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(rows, width, generator=generator) * scale * torch.logspace(-3, 1, rows)[:, None]
    rows[7] = 0
    return rows


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    ("wire", "bound"),
    [
        ("none", lambda x: torch.zeros_like(x)),
        ("bf16", lambda x: x.abs() / 2**8),
        ("fp16", lambda x: (x.abs() / 2**11).clamp(min=2**-25)),
        ("int8", lambda x: (x.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).expand_as(x)),
    ],
)
def test_what_is_lost_on_the_wire_is_within_the_bound(wire, bound, scale):
    x = activations(scale)
    (received,) = through(plan_of(x.nbytes, wire=wire), Message(header(1), (x,)))
    assert received.payload.dtype == x.dtype
    assert ((x - received.payload).abs() <= bound(x)).all()


@pytest.mark.parametrize(("wire", "share"), [("none", 1.0), ("bf16", 0.5), ("fp16", 0.5), ("int8", 0.25)])
@pytest.mark.parametrize("rows", [20, 256])
def test_an_encoded_message_is_smaller(wire, share, rows):
    x = torch.randn(rows, 576)
    slot = SendSlot(plan_of(x.nbytes, wire=wire), EPOCH)
    slot.write(Message(header(1), (x,)), 0)
    assert share <= (slot.head_bytes + slot.body_bytes - 64) / x.nbytes <= share + 0.01
    assert rows * encoded_bytes(wire, 576 * 4) == pytest.approx(slot.head_bytes + slot.body_bytes, rel=0.02)


def test_only_floats_are_encoded_and_only_where_it_makes_them_smaller():
    assert encoding_of("int8", torch.float32, (4, 576)) is ScaledRows
    assert encoding_of("int8", torch.bfloat16, (4, 576)) is ScaledRows
    for dtype, shape in ((torch.int64, (4, 576)), (torch.float32, (400, 1)), (torch.float32, ()), (torch.bool, (9,))):
        assert encoding_of("int8", dtype, shape) is Plain
    assert encoding_of("bf16", torch.bfloat16, (4, 576)) is Plain


def test_a_row_that_is_not_finite_does_not_pass_for_numbers():
    x = activations(1.0)
    x[3, 5], x[4, 6] = float("inf"), float("nan")
    (received,) = through(plan_of(x.nbytes, wire="int8"), Message(header(1), (x,)))
    finite = received.payload.isfinite().all(1)
    assert finite.logical_not().nonzero().flatten().tolist() == [3, 4]
    assert received.payload[[3, 4]].isnan().all()
