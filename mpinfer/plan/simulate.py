"""A pipeline in virtual time: the steps that its first stage would make, on stages that take as long as they cost.

Steps pass the stages in the order in which the first one makes them, so each can be followed to its end at once.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mpinfer.plan.cost import Demand, StageCost
from mpinfer.plan.machine import Link


class Source(Protocol):
    """What the first stage of a replica does, in virtual time."""

    def next(self) -> Demand | None:
        """The next step, or None when it has to wait for one that comes back, or for nothing any more."""

    def commit(self) -> None:
        """The oldest step in flight has come back."""


@dataclass(frozen=True)
class Simulated:
    wall_s: float
    busy_s: tuple[float, ...]  # of each stage
    steps: int

    @property
    def bubble(self) -> float:
        """The share of the stages' time that they wait."""
        return max(0.0, 1 - sum(self.busy_s) / (self.wall_s * len(self.busy_s))) if self.wall_s else 0.0

    def on_cores(self, cores: float, shards: int) -> "Simulated":
        """The same where the ranks of all stages share so many cores: no faster than these can work."""
        least_s = sum(self.busy_s) * shards / cores
        return self if least_s <= self.wall_s else Simulated(least_s, self.busy_s, self.steps)


def simulate(source: Source, stages: Sequence[StageCost], hops: Sequence[Link], row_bytes: float) -> Simulated:
    """Run `source` to its end. `hops`: the links between stages, and from the last one back to the first.

    Sends cost the stages nothing here: they are on their way while the next step is computed.
    """
    free_s = [0.0] * len(stages)  # when each stage has done what it was given
    busy_s = [0.0] * len(stages)
    returning: deque[float] = deque()
    steps, end_s = 0, 0.0
    while True:
        demand = source.next()
        if demand is None:
            if not returning:
                return Simulated(end_s, tuple(busy_s), steps)
            free_s[0] = max(free_s[0], returning.popleft())
            source.commit()
            continue
        steps += 1
        ready_s = free_s[0]
        for stage, (cost, hop) in enumerate(zip(stages, hops, strict=True)):
            seconds = cost.seconds(demand)
            busy_s[stage] += seconds
            free_s[stage] = max(ready_s, free_s[stage]) + seconds
            ready_s = free_s[stage] + hop.seconds(demand.rows * row_bytes) * (len(stages) > 1)
        end_s = max(end_s, ready_s)
        returning.append(ready_s)
