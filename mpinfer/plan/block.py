"""What the planner knows of a model: an ordered list of blocks with their costs. Owns no tensors."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """The smallest unit that a cut can separate."""

    name: str
    weights: tuple[tuple[str, int], ...]  # (tensor name, bytes in the job's dtype)
    flops_per_token: float  # for every token that enters the model
    flops_per_sample: float  # for every token that is sampled: the head sees only those

    @property
    def weight_bytes(self) -> int:
        return sum(size for _, size in self.weights)


@dataclass(frozen=True)
class ModelSummary:
    """A model as an ordered list of blocks."""

    blocks: tuple[Block, ...]

    @property
    def weight_bytes(self) -> int:
        return self.weight_bytes_of(0, len(self.blocks))

    def weight_bytes_of(self, start: int, stop: int) -> int:
        """Bytes that a rank holds for blocks [start, stop): a tensor that two of them share counts once."""
        return sum({name: size for block in self.blocks[start:stop] for name, size in block.weights}.values())


@dataclass(frozen=True)
class Workload:
    """How much there is to do, as far as it is known before the prompts are tokenized."""

    records: int
    prompt_tokens: float  # estimate, over all records
    new_tokens: float  # upper bound, over all records

    def part(self, fraction: float) -> "Workload":
        """A fraction of this workload's records."""
        return Workload(round(self.records * fraction), self.prompt_tokens * fraction, self.new_tokens * fraction)

    def cost(self, block: Block) -> float:
        """FLOPs that this workload asks of a block."""
        return block.flops_per_token * (self.prompt_tokens + self.new_tokens) + block.flops_per_sample * self.new_tokens


def costs(blocks: Sequence[Block], workload: Workload) -> list[float]:
    return [workload.cost(block) for block in blocks]
