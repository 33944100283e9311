"""This rank and its surroundings: where it is, in which world, on which cores."""

import atexit
import os
import platform
import signal
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mpinfer.cluster.binding import Binding, allowed_cores, apply_binding, choose_binding, cpu_quota, physical_cores
from mpinfer.cluster.context import LaunchContext, check_world, read_context
from mpinfer.cluster.copies import check_copies, digest, model_files
from mpinfer.cluster.doctor import mixed_versions, overlapping_bindings
from mpinfer.errors import ExitCode, LaunchError
from mpinfer.transport.control import COORDINATOR
from mpinfer.transport.endpoint import Agreed, Endpoint, everywhere, install_abort_hook, library_version
from mpinfer.version import VERSION

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
    laps: dict[str, float] = field(default_factory=dict)  # seconds of each part of the start, in order

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

    def lap(self, part: str) -> None:
        """A part of the start is over: it began with the end of the one before, the first with the process."""
        self.laps[part] = _process_age_s() - sum(self.laps.values())

    def say(self, text: str) -> None:
        """Log from rank 0."""
        if self.is_coordinator:
            print(f"mpinfer: {text}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return f"rank {self.endpoint.rank} node {self.context.node} {self.place}"


def join_world(refuse_mixed: bool = True) -> World:
    """Find out where this rank is, check it against MPI, bind its threads.

    Raises `LaunchError` when MPI's world is not the promised one, `Agreed` when ranks cannot be bound or, with
    `refuse_mixed`, run different software.
    """
    context = read_context()
    endpoint = Endpoint()
    # Launchers end the others with the first rank that leaves in error: those at their own end keep their exit code.
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    try:
        check_world(context, endpoint.rank, endpoint.size)
    except LaunchError:
        if context.rank != COORDINATOR:  # every rank finds the same; told once is enough
            time.sleep(_TELLING_S)
            sys.exit(ExitCode.BAD_INPUT)
        raise
    everyone = endpoint.all_gather([context.node, sorted(allowed_cores()), versions()])
    nodes, cores, software = ([facts[column] for facts in everyone] for column in range(3))
    if refuse_mixed and (mixed := mixed_versions(nodes, software)):
        raise Agreed(mixed[0], ExitCode.BAD_INPUT, endpoint.rank)
    neighbours = [rank for rank, node in enumerate(nodes) if node == context.node]
    local_rank = neighbours.index(endpoint.rank)
    binding = everywhere(
        endpoint,
        lambda: choose_binding(
            [frozenset(cores[rank]) for rank in neighbours],
            local_rank,
            os.environ,
            quota=cpu_quota(),
            physical=physical_cores(),
        ),
    )
    apply_binding(binding)
    world = World(endpoint, context, binding, len(set(nodes)), local_rank, len(neighbours))
    for text in overlapping_bindings(nodes, cores):
        world.say(f"warning: {text}")
    endpoint.neighbours = frozenset(neighbours)
    endpoint.shares_cores = world.is_crowded
    install_abort_hook(endpoint, lambda: str(world))
    world.lap("mpi")
    return world


def check_model_copies(world: World, path: str) -> None:
    """Have one rank of each node look at the model's files. Raises `Agreed` where nodes see different ones."""
    endpoint = world.endpoint
    files = model_files(path) if world.local_rank == 0 else None
    told = endpoint.all_gather(None if files is None else [world.context.node, digest(files)])
    if len({node[1] for node in told if node is not None}) > 1:
        listed = endpoint.all_gather(None if files is None else [world.context.node, files])  # long; needed only now
        everywhere(endpoint, lambda: check_copies(path, dict(node for node in listed if node is not None)))


def _process_age_s() -> float:
    """Seconds since the kernel started this process: imports and MPI's start included."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - started_ticks / os.sysconf("SC_CLK_TCK")


def versions() -> dict[str, str]:
    """What runs: of every package that decides results, its version."""
    packages = {name: _version(name) for name in ("torch", "transformers", "numpy", "mpi4py")}
    return {"mpinfer": VERSION, "python": platform.python_version(), "mpi": library_version(), **packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
