"""What a job can run on: ranks with their speed and memory, and the links between them. Owns no tensors."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What a message costs on its way from one rank to another."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, size_bytes: float) -> float:
        return self.latency_s + size_bytes / self.bytes_per_s


# Where nothing was measured or said. Inside a node: what `transport/probe.py` finds on a small machine with other work
# (1 to 2 us and 4 to 12 GB/s). Between nodes: the line rate of a network of 100 Gbit/s, and a latency usual there.
TYPICAL_INSIDE = Link(latency_s=1e-6, bytes_per_s=5e9)
TYPICAL_BETWEEN = Link(latency_s=2e-6, bytes_per_s=12.5e9)


@dataclass(frozen=True)
class Seat:
    """A rank as the planner sees it."""

    node: int  # number of its node, from 0
    memory_bytes: int  # that the rank may plan with
    speed: float = 1.0  # relative to what the costs of blocks were measured on, while it has its cores for itself
    cores: float = 1.0  # below 1 where ranks share cores: its share of one


@dataclass(frozen=True)
class Hardware:
    """What a rank of speed 1 computes and reads, where that is described instead of measured."""

    flops_per_s: float  # float32, of all its cores together
    bytes_per_s: float  # from its memory


@dataclass(frozen=True)
class Machine:
    """The ranks of a world, in order, and the links inside a node and between nodes."""

    seats: tuple[Seat, ...]
    inside: Link
    between: Link
    hardware: Hardware | None = None  # None: costs are measured

    @property
    def nodes(self) -> int:
        return len({seat.node for seat in self.seats})

    def link(self, a: int, b: int) -> Link:
        """Between two ranks."""
        return self.inside if self.seats[a].node == self.seats[b].node else self.between

    def slowest_link(self, ranks: Sequence[int]) -> Link:
        """Of a group of ranks that talk to each other."""
        return self.inside if len({self.seats[rank].node for rank in ranks}) == 1 else self.between
