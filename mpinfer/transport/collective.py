"""Sums over the shards of a stage.

They come twice a layer and are small when few tokens are decoded, so latency is what counts. Shards of one node sum in
memory that they share. Large sums, and those of several nodes, have more than one way; each way is timed when the group
is made, and the fastest for a size is taken.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import cast

import numpy as np
import torch
from mpi4py import MPI

from mpinfer.transport.channel import Waiting
from mpinfer.transport.endpoint import Endpoint
from mpinfer.transport.shared_memory import SUMMED, SharedSlots

Way = Callable[[np.ndarray], None]
"""Puts the sum over all shards in the place of this one's numbers, float32 in one dimension."""

_CAPACITY = 1 << 16  # numbers of a slot: two slots of all shards still fit a cache
_SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 18)  # that ways are timed with: the largest of its class, and of the rest any
_REPEATS = 4
_NUMBER_BYTES = 4
_KERNEL_SPINS = 1000  # some ten microseconds
_KERNEL_MOST = 1 << 14  # numbers; with more, another way may save what coming here from a kernel costs


@dataclass
class KernelSums:
    """What `SumMemory` of models/tensor_parallel.py describes."""

    place: int
    counters: list[int]
    slots: list[list[int]]
    state: np.ndarray
    most: int
    spins: int
    wait: Callable[[], None]


class ShardGroup:
    """Some ranks of the world that compute one stage together; each of them makes one, at the same time."""

    def __init__(self, endpoint: Endpoint, ranks: Sequence[int], waiting: Waiting) -> None:
        self._endpoint, self._waiting = endpoint, waiting
        self._others = f"the other shards of ranks {', '.join(map(str, ranks))}"
        world = endpoint.data
        with endpoint.blocking(self._others):
            self._comm = world.Create_group(world.group.Incl(list(ranks)))
            node = _of_this_node(self._comm)
            self._place, self._slots = node.rank, SharedSlots(node, _CAPACITY)
            self._leaders = self._comm.Split(0 if node.rank == 0 else MPI.UNDEFINED)  # first shards of their nodes
            self._alone = node.size == self._comm.size
            ways = (self._all_add, self._share_out) if self._alone else (self._by_leaders,)
            self._ways = self._fastest(*ways, self._by_mpi)
        self._bytes_summed = 0

    @property
    def bytes_summed(self) -> int:
        """Of this shard's tensors, since the last `restart`; it gets as many back."""
        return self._bytes_summed + _NUMBER_BYTES * int(self._slots.state[SUMMED])

    def restart(self) -> None:
        """Forget what was summed."""
        self._bytes_summed = self._slots.state[SUMMED] = 0

    def memory(self) -> KernelSums | None:
        """For kernels that sum in this memory themselves; None where shards are on several nodes."""
        if not self._alone:
            return None
        slots = self._slots
        spins = 0 if self._endpoint.shares_cores else _KERNEL_SPINS
        wait = partial(self._wait, slots.all_said)
        return KernelSums(self._place, slots.counters, slots.slots, slots.state, _KERNEL_MOST, spins, wait)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all shards, in `tensor` itself. All call it in the same order, with equal shapes.

        Sums are float32 whatever the dtype, and the same on all shards of a node to the last bit.
        """
        values = tensor.to("cpu", torch.float32).contiguous()
        numbers = values.numpy().reshape(-1)
        self._ways[bisect_left(_SIZES, len(numbers), hi=len(_SIZES) - 1)](numbers)
        self._bytes_summed += numbers.nbytes
        return tensor if values is tensor else tensor.copy_(values)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any of the shards."""
        return self.all_reduce(torch.tensor([float(flag)])).item() > 0

    def free(self) -> None:
        """Once, when no shard has anything left to sum; all call it."""
        self._wait(self._comm.Ibarrier().Test)  # here, where others are served meanwhile; not in MPI
        with self._endpoint.blocking(self._others):
            self._slots.free()

    # -- ways ----------------------------------------------------------------------------------------------------

    def _all_add(self, numbers: np.ndarray) -> None:
        """Every shard adds up everything."""
        for part in _parts(numbers):
            _add(self._exchange(part), part)

    def _share_out(self, numbers: np.ndarray) -> None:
        """Every shard adds up a part, and gets the others' sums (reduce-scatter and all-gather)."""
        for part in _parts(numbers):
            slots = self._exchange(part)
            edges = [len(part) * place // len(slots) for place in range(len(slots) + 1)]
            shares = [slice(*ends) for ends in pairwise(edges)]
            own = shares[self._place]
            _add([slot[own] for slot in slots], part[own])
            slots[self._place][own] = part[own]
            self._say()
            for slot, share in zip(slots, shares, strict=True):
                part[share] = slot[share]

    def _by_leaders(self, numbers: np.ndarray) -> None:
        """A shard of each node adds up the node's, then they the nodes'."""
        for part in _parts(numbers):
            slots = self._exchange(part)
            if self._place == 0:
                _add(slots, part)
                self._sum_by(self._leaders, part)
                slots[0][:] = part
            self._say()
            part[:] = slots[0]

    def _by_mpi(self, numbers: np.ndarray) -> None:
        self._sum_by(self._comm, numbers)

    # -- what they are made of -----------------------------------------------------------------------------------

    def _exchange(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Everybody's numbers on this node, by shard."""
        slots = [slot[: len(numbers)] for slot in self._slots.take_turn()]
        slots[self._place][:] = numbers
        self._say()
        return slots

    def _say(self) -> None:
        self._slots.say()
        self._wait(self._slots.all_said)

    def _sum_by(self, comm: MPI.Comm, numbers: np.ndarray) -> None:
        self._wait(comm.Iallreduce(MPI.IN_PLACE, [numbers, MPI.FLOAT]).Test)

    def _wait(self, done: Callable[[], bool]) -> None:
        if not self._endpoint.spin(done):
            with self._waiting("receive_wait"):
                self._endpoint.wait_until(done, self._others)

    def _fastest(self, *ways: Way) -> list[Way]:
        """For each size, as timed now: the same on all shards."""
        seconds = np.array([[self._time(way, size) for way in ways] for size in _SIZES])
        self._comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
        return [ways[best] for best in seconds.argmin(axis=1)]

    def _time(self, way: Way, size: int) -> float:
        numbers = np.zeros(size, np.float32)
        times = [perf_counter()]
        for _ in range(_REPEATS):
            way(numbers)
            times.append(perf_counter())
        return min(end - start for start, end in pairwise(times))


def _of_this_node(comm: MPI.Intracomm) -> MPI.Intracomm:
    return cast(MPI.Intracomm, comm.Split_type(MPI.COMM_TYPE_SHARED))


def _parts(numbers: np.ndarray) -> list[np.ndarray]:
    """As many at a time as a slot takes."""
    return [numbers[start : start + _CAPACITY] for start in range(0, len(numbers), _CAPACITY)]


def _add(parts: Sequence[np.ndarray], out: np.ndarray) -> None:
    """In order, so that all shards get the same. `out` is one of the parts, or a copy of it."""
    total = parts[0]
    for part in parts[1:]:
        total = np.add(total, part, out=out)
