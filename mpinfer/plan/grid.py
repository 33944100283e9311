"""Where a rank stands: replica x stage x shard. Owns no tensors and knows no MPI."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Coordinates:
    replica: int
    stage: int
    shard: int

    def __str__(self) -> str:
        return f"replica {self.replica} stage {self.stage} shard {self.shard}"


@dataclass(frozen=True)
class Grid:
    """Ranks in row-major order, shards fastest: launchers fill a node with neighbouring ranks, so the chatty
    dimension stays inside a node and replicas, which never talk to each other, lie farthest apart."""

    replicas: int
    stages: int
    shards: int = 1

    @property
    def size(self) -> int:
        return self.replicas * self.stages * self.shards

    def coordinates(self, rank: int) -> Coordinates:
        rest, shard = divmod(rank, self.shards)
        replica, stage = divmod(rest, self.stages)
        return Coordinates(replica, stage, shard)

    def rank(self, replica: int, stage: int, shard: int = 0) -> int:
        return (replica * self.stages + stage) * self.shards + shard

    def __str__(self) -> str:
        return f"{self.replicas} replicas x {self.stages} stages x {self.shards} shards"
