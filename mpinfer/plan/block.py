"""What the planner knows of a model: an ordered list of blocks with their costs. Owns no tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Block:
    """The smallest unit that a cut can separate."""

    name: str
    weights: tuple[tuple[str, int], ...]  # (tensor name, bytes in the job's dtype)
    cost_per_token: (
        float  # for every token (or record) that enters the model: FLOPs, or seconds where they are measured
    )
    cost_per_sample: float  # for every token that is sampled: the head sees only those
    kv_bytes_per_token: int = 0  # of keys and values

    @property
    def weight_bytes(self) -> int:
        return sum(size for _, size in self.weights)


@dataclass(frozen=True)
class ModelSummary:
    """A model as an ordered list of blocks.

    `ends`: first and last block of a pipeline of several stages, when its ends share the output embedding.
    """

    blocks: tuple[Block, ...]
    ends: tuple[Block, Block] | None = None
    micro_batch: int = 64  # most sequences or records in a group; decoders gain little from larger ones
    micro_batch_is_fixed: bool = False  # the model takes no larger ones
    problem: str = ""  # why the model cannot be cut, if it cannot

    @property
    def decodes(self) -> bool:
        """Whether sequences go round with a KV cache; else records pass once."""
        return any(block.kv_bytes_per_token for block in self.blocks)

    def for_stages(self, stages: int) -> "ModelSummary":
        """The blocks as a pipeline of so many stages holds them."""
        if stages == 1 or self.ends is None:
            return replace(self, ends=None)
        return replace(self, blocks=(self.ends[0], *self.blocks[1:-1], self.ends[1]), ends=None)

    @property
    def weight_bytes(self) -> int:
        return self.weight_bytes_of(0, len(self.blocks))

    def weight_bytes_of(self, start: int, stop: int) -> int:
        """Bytes that a rank holds for blocks [start, stop): a tensor that two of them share counts once."""
        return sum({name: size for block in self.blocks[start:stop] for name, size in block.weights}.values())

    def kv_bytes_per_token_of(self, start: int, stop: int) -> int:
        return sum(block.kv_bytes_per_token for block in self.blocks[start:stop])


def vocabulary_share(vocabulary: int, stage: int, stages: int) -> range:
    """The tokens whose logits a stage computes: its ends share the vocabulary of a pipeline."""
    half = vocabulary // 2
    if stages == 1:
        return range(vocabulary)
    if stage == stages - 1:
        return range(half)
    return range(half, vocabulary) if stage == 0 else range(0)


@dataclass(frozen=True)
class Workload:
    """How much there is to do, as far as it is known before the prompts are tokenized."""

    records: int
    prompt_tokens: float  # estimate, over all records
    new_tokens: float  # upper bound, over all records
    samples: float  # tokens whose logits are computed, over all records

    def part(self, fraction: float) -> "Workload":
        """A fraction of this workload's records."""
        totals = (self.prompt_tokens, self.new_tokens, self.samples)
        return Workload(round(self.records * fraction), *(total * fraction for total in totals))

    def cost(self, block: Block) -> float:
        """What this workload asks of a block."""
        return block.cost_per_token * (self.prompt_tokens + self.new_tokens) + block.cost_per_sample * self.samples


def costs(blocks: Sequence[Block], workload: Workload) -> list[float]:
    return [workload.cost(block) for block in blocks]
