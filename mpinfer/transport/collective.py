"""Sums over the shards of a stage.

They come twice a layer and are small when few tokens are decoded, so latency is what counts.
"""

import os
import time
from collections.abc import Sequence

import torch
from mpi4py import MPI

from mpinfer.transport.channel import Waiting
from mpinfer.transport.endpoint import Endpoint

_SPIN_S = 1e-3  # poll for this long before sleeping: shards that compute the same wait less for each other


class ShardGroup:
    """Some ranks of the world that compute one stage together; each of them makes one, at the same time."""

    def __init__(self, endpoint: Endpoint, ranks: Sequence[int], waiting: Waiting) -> None:
        self._endpoint, self._waiting = endpoint, waiting
        world = endpoint.data
        self._comm = world.Create_group(world.group.Incl(list(ranks)))

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all shards, in `tensor` itself. All call it in the same order, with equal shapes.

        Sums are float32 whatever the dtype. Rounding may differ from shard to shard in the last place.
        """
        values = tensor.to("cpu", torch.float32).contiguous()
        request = self._comm.Iallreduce(MPI.IN_PLACE, [values.numpy(), MPI.FLOAT])
        if not request.Test():
            with self._waiting("receive_wait"):
                self._wait(request)
        return tensor if values.data_ptr() == tensor.data_ptr() else tensor.copy_(values)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any of the shards."""
        return self.all_reduce(torch.tensor([float(flag)])).item() > 0

    def _wait(self, request: MPI.Request) -> None:
        """Without sleeping at first, but leaving the core to whoever else needs it."""
        until = time.perf_counter() + _SPIN_S
        while not request.Test():
            if time.perf_counter() > until:
                self._endpoint.wait_until(request.Test)
                return
            os.sched_yield()
