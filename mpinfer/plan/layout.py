"""Who does what: replicas x stages x shards over the ranks of a world. Owns no tensors and knows no MPI."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Coordinates:
    replica: int
    stage: int
    shard: int

    def __str__(self) -> str:
        return f"replica {self.replica} stage {self.stage} shard {self.shard}"


@dataclass(frozen=True)
class Replica:
    """One copy of the model: a pipeline of stages, each a group of shards.

    `ranks`: stage by stage, shards fastest: launchers fill a node with neighbouring ranks, so what talks most stays
    inside a node. `cuts` are block indices: stage s holds blocks [cuts[s], cuts[s+1]).
    """

    ranks: tuple[int, ...]
    stages: int
    shards: int
    cuts: tuple[int, ...]
    micro_batch: int  # sequences or records in a group
    in_flight: int  # groups
    kv_tokens: int  # of all sequences at work, that every stage's KV cache has room for
    share: float  # of all records that it is expected to do

    @property
    def leader(self) -> int:
        """The rank that asks for records."""
        return self.ranks[0]

    def rank(self, stage: int, shard: int = 0) -> int:
        return self.ranks[stage * self.shards + shard]

    def stage_ranks(self, stage: int) -> tuple[int, ...]:
        return self.ranks[stage * self.shards : (stage + 1) * self.shards]

    def blocks_of(self, stage: int) -> tuple[int, int]:
        return self.cuts[stage], self.cuts[stage + 1]

    @property
    def shape(self) -> str:
        return f"{self.stages} stage{'s' * (self.stages > 1)} x {self.shards} shard{'s' * (self.shards > 1)}"


@dataclass(frozen=True)
class Plan:
    """The layout of a job."""

    replicas: tuple[Replica, ...]
    reasons: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return sum(len(replica.ranks) for replica in self.replicas)

    @cached_property
    def _places(self) -> dict[int, Coordinates]:
        return dict(self._each())

    def _each(self) -> Iterator[tuple[int, Coordinates]]:
        for number, replica in enumerate(self.replicas):
            for place, rank in enumerate(replica.ranks):
                yield rank, Coordinates(number, *divmod(place, replica.shards))

    def coordinates(self, rank: int) -> Coordinates:
        return self._places[rank]

    def replica_of(self, rank: int) -> Replica:
        return self.replicas[self._places[rank].replica]

    def __str__(self) -> str:
        shapes = list(dict.fromkeys((r.stages, r.shards) for r in self.replicas))
        counts = [sum((r.stages, r.shards) == shape for r in self.replicas) for shape in shapes]
        return " + ".join(
            f"{count} replicas x {stages} stages x {shards} shards"
            for count, (stages, shards) in zip(counts, shapes, strict=True)
        )

    def summary(self) -> dict[str, Any]:
        """For people and scripts: the numbers of the first replica, and all of them beside, as they may be unequal."""
        keys = ("stages", "shards", "cuts", "micro_batch", "in_flight")
        layouts = [{key: getattr(r, key) for key in (*keys, "ranks", "share")} for r in self.replicas]
        return {"replicas": len(layouts), **{key: layouts[0][key] for key in keys}, "layouts": layouts}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Plan":
        replicas = tuple(
            Replica(**{**entry, "ranks": tuple(entry["ranks"]), "cuts": tuple(entry["cuts"])})
            for entry in tree["replicas"]
        )
        return cls(replicas, tuple(tree["reasons"]))
