"""This rank and its surroundings: where it is, in which world, on which cores."""

import os
import sys
import time
from dataclasses import dataclass

from mpinfer.cluster.binding import Binding, allowed_cores, apply_binding, choose_binding, cpu_quota, physical_cores
from mpinfer.cluster.context import LaunchContext, check_world, read_context
from mpinfer.errors import ExitCode, LaunchError
from mpinfer.transport.control import COORDINATOR
from mpinfer.transport.endpoint import Endpoint, everywhere, install_abort_hook

_TELLING_S = 2.0  # for rank 0 to say what is wrong: launchers may end everything with the first rank that leaves


@dataclass
class World:
    """This rank and its surroundings."""

    endpoint: Endpoint
    context: LaunchContext
    binding: Binding
    nodes: int
    local_rank: int
    local_size: int
    place: str = "at start-up"  # for messages; coordinates once there is a plan

    @property
    def is_coordinator(self) -> bool:
        return self.endpoint.rank == COORDINATOR

    @property
    def is_crowded(self) -> bool:
        """Whether ranks outnumber the cores that they share."""
        return self.local_size > len(self.binding.cores) > 1

    @property
    def cores_per_rank(self) -> float:
        """Below 1 where ranks share cores."""
        return len(self.binding.cores) / self.local_size if self.is_crowded else 1.0

    def say(self, text: str) -> None:
        """Log from rank 0."""
        if self.is_coordinator:
            print(f"mpinfer: {text}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return f"rank {self.endpoint.rank} node {self.context.node} {self.place}"


def join_world() -> World:
    """Find out where this rank is, check it against MPI, bind its threads.

    Raises `Agreed` when ranks cannot be bound, `LaunchError` when MPI's world is not the promised one.
    """
    context = read_context()
    endpoint = Endpoint()
    try:
        check_world(context, endpoint.rank, endpoint.size)
    except LaunchError:
        if context.rank != COORDINATOR:  # every rank finds the same; told once is enough
            time.sleep(_TELLING_S)
            sys.exit(ExitCode.BAD_INPUT)
        raise
    everyone = endpoint.all_gather([context.node, sorted(allowed_cores())])
    neighbours = [rank for rank, (node, _) in enumerate(everyone) if node == context.node]
    local_rank = neighbours.index(endpoint.rank)
    binding = everywhere(
        endpoint,
        lambda: choose_binding(
            [frozenset(everyone[rank][1]) for rank in neighbours],
            local_rank,
            os.environ,
            quota=cpu_quota(),
            physical=physical_cores(),
        ),
    )
    apply_binding(binding)
    world = World(endpoint, context, binding, len({node for node, _ in everyone}), local_rank, len(neighbours))
    endpoint.shares_cores = world.is_crowded
    install_abort_hook(endpoint, lambda: str(world))
    return world
