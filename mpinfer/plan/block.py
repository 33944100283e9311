"""What the planner knows of a model: an ordered list of blocks with their costs. Owns no tensors."""

from dataclasses import dataclass, replace

from mpinfer.plan.shards import split


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
    reductions: int = 0  # all-reduces of a row's activations, where shards divide it
    whole: frozenset[str] = frozenset()  # weights that every shard holds
    whole_cost: float = 0.0  # of the cost per token, what every shard does for itself

    @property
    def weight_bytes(self) -> int:
        return sum(size for _, size in self.weights)

    def divided(self, shards: int) -> "Block":
        """With weights and costs of so many shards together."""
        weights = tuple((name, size * shards if name in self.whole else size) for name, size in self.weights)
        return replace(self, weights=weights, cost_per_token=self.cost_per_token + (shards - 1) * self.whole_cost)


@dataclass(frozen=True)
class ModelSummary:
    """A model as an ordered list of blocks.

    `ends`: first and last block of a pipeline of several stages, when its ends share the output embedding.
    `divisible`: the blocks between which stages of several shards may be cut, if not all.
    """

    blocks: tuple[Block, ...]
    ends: tuple[Block, Block] | None = None
    micro_batch: int = 64  # most sequences or records in a group; decoders gain little from larger ones
    micro_batch_is_fixed: bool = False  # the model takes no larger ones
    problem: str = ""  # why the model cannot be cut, if it cannot
    most_shards: int = 1
    shards_problem: str = ""  # why not more
    row_bytes: float = 0.0  # of the activations of a token or record between blocks
    divisible: tuple[Block, ...] = ()

    @property
    def decodes(self) -> bool:
        """Whether sequences go round with a KV cache; else records pass once."""
        return any(block.kv_bytes_per_token for block in self.blocks)

    def for_stages(self, stages: int, shards: int) -> "ModelSummary":
        """The blocks as a pipeline of so many stages holds them. Shards of a last stage share the output embedding
        among themselves."""
        if shards > 1:
            return replace(self, blocks=tuple(b.divided(shards) for b in self.divisible or self.blocks), ends=None)
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


def vocabulary_share(vocabulary: int, stage: int, stages: int, shard: int = 0, shards: int = 1) -> range:
    """The tokens whose logits a rank computes: the ends of a pipeline share the vocabulary, or the shards of its last
    stage do. A last stage takes more, since the first one also makes the steps."""
    if shards > 1:
        return split(vocabulary, [1] * shards)[shard] if stage == stages - 1 else range(0)
    most = vocabulary * 9 // 16
    if stages == 1:
        return range(vocabulary)
    if stage == stages - 1:
        return range(most)
    return range(most, vocabulary) if stage == 0 else range(0)
