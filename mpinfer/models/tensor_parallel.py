"""Tensor parallelism: a stage's layers, embedding and output embedding divided over ranks (shards).

After Megatron-LM (Shoeybi et al. 2019). Queries, keys, values and the first matrices of an MLP are divided by columns,
in whole heads and columns; what follows them by rows, and its results are summed over all shards: two all-reduces a
layer. Everything between is the same on all shards. transformers' own plans tell which matrices of a family are
divided how; what a plan does not make plain is refused, as a wrong answer is worse than none.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from mpinfer.models.sources import Slice
from mpinfer.plan.shards import split, split_evenly

# Plans of families for which transformers has none, by the layer's modules.
_PLANS = {
    "gpt2": {"attn.c_attn": "colwise", "attn.c_proj": "rowwise", "mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"},
    "opt": {
        **{f"self_attn.{name}_proj": "colwise" for name in "qkv"},
        "self_attn.out_proj": "rowwise",
        "fc1": "colwise",
        "fc2": "rowwise",
    },
}
# What the words of a plan say of weights. transformers gathers where its cuts run through packed matrices; ours do not.
_BY_COLUMNS, _BY_ROWS = ("colwise", "colwise_gather_output"), ("rowwise", "rowwise_split_input")
_WITH_QKV, _WITH_HALVES = ("qkv_proj", "c_attn"), ("gate_up_proj",)  # matrices side by side in one
_HEAD_COUNTS = ("num_heads", "num_attention_heads")  # where modules keep them
_KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads")


class NotShardable(Exception):
    """Why a model cannot be divided."""


class SumMemory(Protocol):
    """Memory that all shards of a stage share: each writes a slot, says so in its counter, and adds up all slots."""

    place: int  # of this shard
    counters: list[int]  # addresses, by shard
    slots: list[list[int]]  # addresses, of turns by shard
    state: np.ndarray  # int64: the turn, what this shard has said, and how many numbers kernels have summed
    most: int  # numbers of one sum; larger ones may be faster in another way
    spins: int  # how often to look for the others before `wait`

    def wait(self) -> None:
        """Until all others have said as much."""


@dataclass(frozen=True)
class Shard:
    """One of the ranks that hold a stage together."""

    index: int
    count: int
    reduce: Callable[[torch.Tensor], torch.Tensor]  # the sum over all shards, in place
    memory: SumMemory | None = None  # where kernels may do the same, with small tensors


@dataclass(frozen=True)
class _Matrix:
    """A linear module of a layer, and how it is divided."""

    path: str
    by_rows: bool
    sizes: tuple[int, ...]  # of the matrices side by side in it, along the axis that is divided


@dataclass(frozen=True)
class LayerSplit:
    """How one layer is divided: attention by its KV heads and the query heads that share them, the MLP by columns."""

    attention: str  # path of the attention module
    heads: int
    kv_heads: int
    head_dim: int
    columns: int
    of_attention: tuple[_Matrix, ...]
    of_mlp: tuple[_Matrix, ...]

    def ranges(self, index: int, count: int) -> tuple[range, range]:
        """KV heads and columns of the MLP of one of `count` shards.

        Each is divided as evenly as it can be by itself: all shards wait for the slowest after either, so that columns
        could not make up for a head more.
        """
        return split(self.kv_heads, [1] * count)[index], split_evenly(self.columns, count)[index]


def plan_layer(layer: nn.Module, layers_name: str, config: Any) -> LayerSplit:
    """How a layer is divided, by the family's plan; raises `NotShardable`."""
    styles = _styles(layers_name, config)
    if not styles:
        raise NotShardable(f"neither transformers nor mpinfer has a plan for model_type={config.model_type!r}")
    groups: dict[str, list[_Matrix]] = {}
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    for path, style in styles.items():
        try:
            module = layer.get_submodule(path)
        except AttributeError:  # of other layers of the family, or a bare parameter
            continue
        if style.startswith("replicated"):
            continue
        if style not in _BY_COLUMNS + _BY_ROWS or not _is_linear(module):
            raise NotShardable(f"{path} is a {type(module).__name__}, to be divided {style!r}")
        by_rows = style in _BY_ROWS
        rows, columns = _sizes(module)
        parent, _, name = path.rpartition(".")
        sizes: tuple[int, ...] = (rows,) if by_rows else (columns,)
        if name in _WITH_QKV:
            sizes = tuple(columns * part // (heads + 2 * kv_heads) for part in (heads, kv_heads, kv_heads))
        elif name in _WITH_HALVES:
            sizes = (columns // 2,) * 2
        groups.setdefault(parent, []).append(_Matrix(path, by_rows, sizes))
    attentions = [parent for parent in groups if type(layer.get_submodule(parent)).__name__.endswith("Attention")]
    mlps = [parent for parent in groups if parent not in attentions]
    if len(attentions) != 1 or len(mlps) != 1 or any(sum(m.by_rows for m in of) != 1 for of in groups.values()):
        raise NotShardable(f"a layer is not one attention and one MLP, but {sorted(groups)}")
    attention = layer.get_submodule(attentions[0])
    head_dim: int = getattr(attention, "head_dim", 0) or getattr(attention, "head_size", 0)
    of_attention, of_mlp = groups[attentions[0]], groups[mlps[0]]
    (columns,) = next(matrix.sizes for matrix in of_mlp if matrix.by_rows)
    (attended,) = next(matrix.sizes for matrix in of_attention if matrix.by_rows)
    _check_rest(layer, {m.path for of in groups.values() for m in of}, attentions[0], mlps[0], head_dim)
    whole_heads = head_dim > 0 and all(size % (kv_heads * head_dim) == 0 for m in of_attention for size in m.sizes)
    if not whole_heads or attended != heads * head_dim or any(set(m.sizes) != {columns} for m in of_mlp):
        raise NotShardable("its matrices are not made of heads, or columns of the MLP, side by side")
    return LayerSplit(attentions[0], heads, kv_heads, head_dim, columns, tuple(of_attention), tuple(of_mlp))


def cut_layer(layer: nn.Module, plan: LayerSplit, shard: Shard) -> dict[str, Slice]:
    """Leave only a shard's part of a layer without weights; returns what to load, by the names of its parameters.

    The sum over the shards is not part of it yet: see `RowParallel`.
    """
    kv_heads, columns = plan.ranges(shard.index, shard.count)
    slices: dict[str, Slice] = {}
    for matrices, units, own in ((plan.of_attention, plan.kv_heads, kv_heads), (plan.of_mlp, plan.columns, columns)):
        for matrix in matrices:
            ranges, before = [], 0
            for size in matrix.sizes:
                unit = size // units
                ranges.append(range(before + own.start * unit, before + own.stop * unit))
                before += size
            module = layer.get_submodule(matrix.path)
            found = _cut_linear(module, matrix.by_rows, tuple(ranges), with_bias=shard.index == 0)
            slices.update({f"{matrix.path}.{leaf}": part for leaf, part in found.items()})
    _tell_heads(layer.get_submodule(plan.attention), plan, len(kv_heads))
    return slices


def row_parallel(plan: LayerSplit) -> list[str]:
    """Paths of the modules after which the shards' results are summed."""
    return [matrix.path for matrix in (*plan.of_attention, *plan.of_mlp) if matrix.by_rows]


def cut_embedding(module: nn.Module, shard: Shard) -> Slice:
    """Leave only a shard's entries of an embedding without weights; returns what to load of its weight."""
    assert isinstance(module, nn.Embedding)
    own = split(module.num_embeddings, [1] * shard.count)[shard.index]
    part = Slice(0, (own,), tuple(module.weight.shape))
    module.weight = _without_values(part.shape, module.weight)
    module.num_embeddings, module.padding_idx = len(own), None  # padding matters in training alone
    return part


class RowParallel(nn.Module):
    """A linear module with some of its inputs; with the other shards' it gives the whole's output."""

    def __init__(self, module: nn.Module, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.module, self._reduce = module, reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._reduce(self.module(x))


class VocabularyParallelEmbedding(nn.Module):
    """An embedding with the entries of a shard; looks up its own tokens and gets the others' from the other shards."""

    def __init__(self, module: nn.Module, own: range, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.module, self._own, self._reduce = module, own, reduce

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [..., tokens] to [..., tokens, hidden]
        ids = ids - self._own.start
        foreign = (ids < 0) | (ids >= len(self._own))
        return self._reduce(self.module(ids.masked_fill(foreign, 0)).masked_fill(foreign[..., None], 0))


def _styles(layers_name: str, config: Any) -> dict[str, str]:
    """The plan's words for each module of a layer."""
    if config.model_type in _PLANS:
        return _PLANS[config.model_type]
    plan = getattr(config.get_text_config(), "base_model_tp_plan", None) or {}
    prefix = f"{layers_name}.*."
    return {path.removeprefix(prefix): style for path, style in plan.items() if path.startswith(prefix)}


def _check_rest(layer: nn.Module, divided: set[str], attention: str, mlp: str, head_dim: int) -> None:
    """Everything else of a layer must be the same on all shards: vectors, of heads or of the residual stream."""
    for path, parameter in layer.named_parameters():
        parent = path.rpartition(".")[0]
        if parent in divided:
            continue
        kind = type(layer.get_submodule(parent)).__name__
        if parameter.dim() > 1:
            raise NotShardable(f"{path} ({kind}) is in no plan")
        if path.startswith(f"{attention}.") and parameter.shape != (head_dim,):
            raise NotShardable(f"{path} ({kind}) spans several heads")
        if mlp and path.startswith(f"{mlp}."):
            raise NotShardable(f"{path} ({kind}) spans all columns of the MLP")


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _sizes(module: Any) -> tuple[int, int]:
    """Inputs and outputs."""
    return (module.in_features, module.out_features) if type(module) is nn.Linear else (module.nx, module.nf)


def _cut_linear(module: Any, by_rows: bool, ranges: tuple[range, ...], with_bias: bool) -> dict[str, Slice]:
    """Leave some of the inputs (`by_rows`) or of the outputs; returns what to load of weight and bias.

    The bias of what is divided by rows is added once, by the shard that keeps it.
    """
    linear = type(module) is nn.Linear  # its weight is [out, in]; that of GPT-2's Conv1D [in, out]
    part = Slice(int(by_rows == linear), ranges, tuple(module.weight.shape))
    slices = {"weight": part}
    module.weight = _without_values(part.shape, module.weight)
    names = ("in_features", "out_features") if linear else ("nx", "nf")
    setattr(module, names[0 if by_rows else 1], part.shape[part.axis])
    if module.bias is None:
        return slices
    if not by_rows:
        slices["bias"] = Slice(0, ranges, tuple(module.bias.shape))
        module.bias = _without_values(slices["bias"].shape, module.bias)
    elif not with_bias:
        zeros = torch.zeros(module.bias.shape, dtype=module.bias.dtype)
        module.bias = None
        if not linear:  # which cannot do without
            del module.bias
            module.register_buffer("bias", zeros, persistent=False)
    return slices


def _tell_heads(attention: Any, plan: LayerSplit, kv_heads: int) -> None:
    """Modules that know how many heads there are must count those of the shard."""
    heads = plan.heads // plan.kv_heads * kv_heads
    counts = {**dict.fromkeys(_HEAD_COUNTS, heads), **dict.fromkeys(_KV_HEAD_COUNTS, kv_heads)}
    for name, count in {**counts, "split_size": heads * plan.head_dim}.items():
        if hasattr(attention, name):
            setattr(attention, name, count)
    if any(
        matrix.path.rpartition(".")[2] == "qkv_proj" for matrix in plan.of_attention
    ):  # is taken apart by the config
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads, attention.config.num_key_value_heads = heads, kv_heads


def _without_values(shape: tuple[int, ...], like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device="meta"), requires_grad=False)
