"""Channels between two ranks: what is sent comes, nobody is flooded, and what is wrong ends the world by its name."""

import pytest
from harness import Mpi, mpirun

PREAMBLE = """
import sys, time
from contextlib import nullcontext
import numpy as np, torch
from mpi4py import MPI
from mpinfer.errors import SpecError
from mpinfer.transport.channel import MpiInbox, MpiOutbox
from mpinfer.transport.endpoint import Endpoint, install_abort_hook
from mpinfer.transport.message import END, INLINE_BYTES, ChannelPlan, Message, SendSlot
from mpinfer.transport.progress import check_progress, progressing

endpoint = Endpoint()
install_abort_hook(endpoint, lambda: f"rank {endpoint.rank}")

def plan(payload_bytes, tag, depth=3):
    return ChannelPlan(0, 1, tag, header_words=4, values=4, dimensions=8, payload_bytes=payload_bytes, depth=depth)

def outbox(plan, blocking=False):
    return MpiOutbox(endpoint, plan, lambda phase: nullcontext(), blocking)

def inbox(plan):
    return MpiInbox(endpoint, plan, lambda phase: nullcontext())

def header(*words):
    return np.array(words, dtype=np.int32)
"""

CARRY = (
    PREAMBLE
    + """
def message(number):
    kind, generator = number % 5, torch.Generator().manual_seed(number)
    # The last is beyond most plans here.
    rows = (3, INLINE_BYTES // 64, INLINE_BYTES // 16, 5, INLINE_BYTES // 4)[kind]
    large = torch.randn(rows, 16, generator=generator)
    return Message(header(number, kind), (large, number, large[:2].bool()) if kind > 2 else (large,))

def same(message, other):
    pairs = zip(message.values, other.values, strict=True)
    equal = (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
    return message.header.tolist() == other.header.tolist() and all(equal)

def carry(tag, blocking, payload_bytes=4 * INLINE_BYTES + 64):
    mine, delays = plan(payload_bytes, tag), np.random.default_rng(endpoint.rank)
    end = outbox(mine, blocking=blocking) if endpoint.rank == 0 else inbox(mine)
    for number in range(40):
        if delays.random() < 0.2:
            time.sleep(0.005)
        if endpoint.rank == 0:
            end.start(0, message(number))
        else:
            assert same(end.take(0), message(number)), number
    if endpoint.rank == 0:
        end.start(-1, END)
        end.drain()
        return end.bytes_sent
    assert end.take(-1).is_end
    end.close()
    return end.bytes_received

for tag, blocking, progress in ((1, False, "points"), (2, True, "points"), (3, False, "thread")):
    with progressing(endpoint, progress):
        sent, received = endpoint.all_gather(carry(tag, blocking))
    assert sent == received > 40 * 1024

# Between nodes bodies are in pieces: here of one to three, or, beyond the plan, still in one message.
endpoint.neighbours = frozenset([endpoint.rank])
for tag, payload_bytes in ((5, 16 * INLINE_BYTES + 64), (6, 10 * INLINE_BYTES + 64)):
    assert len(set(endpoint.all_gather(carry(tag, False, payload_bytes)))) == 1
endpoint.neighbours = frozenset([0, 1])

# A sender that is ahead is stopped by the slots. The receiver begins when told, some time after.
class Later:
    def __init__(self):
        self.begun, self.started, self.told = time.monotonic(), 0, []

    def complete_finished(self):  # at progress points
        if not self.told and time.monotonic() > self.begun + 0.2:
            self.told.append(self.started)
            endpoint.send(1, "go", None)

heard = []
endpoint.on("go", lambda source, body: heard.append(source))

def run_ahead(plan, message):
    if endpoint.rank == 0:
        endpoint.attach(later := Later())
        ahead = outbox(plan)
        for later.started in range(99):
            ahead.start(0, message(later.started))
        endpoint.wait_until(lambda: bool(later.told))
        ahead.drain()
        assert later.told[0] <= 2 * plan.depth, later.told
        endpoint.flush()
    else:
        heard.clear()
        behind = inbox(plan)
        endpoint.wait_until(lambda: bool(heard))
        for number in range(99):
            assert behind.take(0).header.tolist() == [number]
        behind.close()

run_ahead(plan(64, 4, depth=16), lambda number: Message(header(number)))
run_ahead(plan(4 * INLINE_BYTES, 7, depth=3), lambda number: Message(header(number), (torch.zeros(INLINE_BYTES),)))

try:
    check_progress("library")
except SpecError as error:
    print(error, file=sys.stderr)
"""
)

GPU = (
    PREAMBLE
    + """
import ctypes
from mpinfer.transport.gpu import find_gpu, takes_gpu_memory
assert find_gpu("cpu") is None
assert hasattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support")  # the library can be asked
assert torch.cuda.is_available() or not takes_gpu_memory()

class Late:
    # Something that is done when it has been asked for three times, or waited for.
    def __init__(self, act):
        self.act, self.asked = act, 0

    def query(self):
        self.asked += 1
        if self.asked == 3:
            self.act()
        return self.asked >= 3

    def synchronize(self):
        while not self.query():
            pass

class SlowGpu:
    # What is written into its memory is there only when the event that marks it has come; so is what is fetched.
    def __init__(self):
        self.memories = []

    def empty(self, size):
        self.memories.append([torch.zeros(size, dtype=torch.uint8), torch.empty(0)])  # and as it was seen last
        return self.memories[-1][0]

    def mark(self):
        late = []
        for entry in self.memories:
            memory, seen = entry
            if not torch.equal(memory, seen):
                late.append((memory, memory.clone()))
                entry[1] = memory.fill_(255).clone()

        def come():
            for memory, written in late:
                memory.copy_(written)
                next(entry for entry in self.memories if entry[0] is memory)[1] = written

        return Late(come)

    def fetch(self, received):
        copy = torch.zeros_like(received)
        return copy, Late(lambda: copy.copy_(received))

def message(number):
    rows = INLINE_BYTES // (4 if number % 7 == 3 else 16)  # some are beyond the plan
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(number))

for tag, blocking in ((1, False), (2, True)):
    mine = plan(4 * INLINE_BYTES + 64, tag, depth=2)
    if endpoint.rank == 0:
        end = MpiOutbox(endpoint, mine, lambda phase: nullcontext(), blocking, gpu=SlowGpu())
        for number in range(30):
            end.start(0, Message(header(number), (message(number), number)))
        end.start(-1, END)
        end.drain()
        continue
    end = MpiInbox(endpoint, mine, lambda phase: nullcontext(), gpu=SlowGpu())
    tensors = []
    for number in range(30):
        taken = end.take(0)
        assert taken.header.tolist() == [number]
        tensors.append(taken.values[0])
    assert end.take(-1).is_end
    for number, tensor in enumerate(tensors):
        assert torch.equal(tensor, message(number)), number
    end.close()
"""
)

LARGE = (
    PREAMBLE
    + """
rows = 2**31 // 4096 + 1  # of 4096 bytes: 2 GiB and a little
mine = plan(rows * 4096, 1, depth=1)
if endpoint.rank == 0:
    large = torch.zeros(rows, 4096, dtype=torch.uint8)
    large[:, 7] = torch.arange(rows).remainder(251)
    end = outbox(mine)
    end.start(0, Message(header(1), (large,)))
    end.drain()
    assert end.bytes_sent > 2**31
else:
    end = inbox(mine)
    large = end.take(0).payload
    assert end.bytes_received > 2**31
    assert torch.equal(large[:, 7], torch.arange(rows).remainder(251).to(torch.uint8))
    assert large.sum(dtype=torch.int64) == torch.arange(rows).remainder(251).sum()
    end.close()
"""
)

FAULT = (
    PREAMBLE
    + """
mine = plan(64, 1)
if endpoint.rank == 0:
    slot = SendSlot(plan(1024 if sys.argv[1] == "long" else 64, 1), endpoint.epoch)
    slot.write(Message(header(1), (torch.ones(256 if sys.argv[1] == "long" else 16),)), 0)
    size = slot.head_bytes - 64 * (sys.argv[1] == "short")
    endpoint.data.Send([slot.head.numpy(), size, MPI.BYTE], 1, 1)
    time.sleep(60)  # until the world ends
else:
    inbox(mine).take(0)
"""
)

LIBRARY_VARIABLES = {"openmpi": "OMPI_MCA_btl_tcp_progress_thread", "mpich": "MPIR_CVAR_ASYNC_PROGRESS"}


def test_what_is_sent_comes(mpi: Mpi) -> None:
    """Of all sizes, in all ways of sending; a receiver that is behind holds up its sender."""
    run = mpirun(mpi, 2, ["python", "-c", CARRY])
    assert run.returncode == 0, run.stderr
    assert run.stderr.count(f"{LIBRARY_VARIABLES[mpi.name]} is not set, and MPI has started") == 2


def test_bodies_wait_for_a_gpu_and_their_slots_too(mpi: Mpi) -> None:
    """With one that is slow to do what it was asked for, and memory that shows it."""
    run = mpirun(mpi, 2, ["python", "-c", GPU])
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_a_message_of_more_than_2_gib(mpi: Mpi) -> None:
    run = mpirun(mpi, 2, ["python", "-c", LARGE])
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("long", "message 0 could not be received, or is longer than planned"),
        ("short", "message 0 was cut short, 64 of 128 bytes came"),
    ],
    ids=["long", "short"],
)
def test_a_wrong_message_ends_the_world_by_its_name(mpi: Mpi, fault: str, problem: str) -> None:
    run = mpirun(mpi, 2, ["python", "-c", FAULT, fault], timeout_s=30)
    assert run.returncode == 3, run.stderr
    assert f"fatal on rank 1: channel from rank 0 to rank 1, tag 1: {problem}" in run.stderr
