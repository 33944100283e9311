"""Divide a program over the shards of a stage: a matrix by its columns, what follows with it, and the next by its rows.

Behind the second one stands a sum over the shards (Megatron-LM; Shoeybi et al., 2019). Where that is possible is read
off the operations: what a matrix makes is followed, dimension by dimension, through all that treats its parts alike,
until another matrix takes it in. Where it meets anything else, the first matrix stays whole. So do embeddings, norms
and convolutions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx, nn

from mpinfer.models.program import Program
from mpinfer.models.sources import Slice
from mpinfer.models.tensor_parallel import Shard
from mpinfer.plan.shards import split, split_evenly

_aten = torch.ops.aten
_LINEAR = _aten.linear.default
_ALIKE = {  # of one value, number by number
    _aten.gelu.default,
    _aten.relu.default,
    _aten.silu.default,
    _aten.tanh.default,
    _aten.sigmoid.default,
    _aten.erf.default,
    _aten.neg.default,
    _aten.dropout.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.to.dtype,
}
_PAIRWISE = {_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor}
_RESHAPES = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default}
_ATTENTION = _aten.scaled_dot_product_attention.default
_KEY = "division"  # of a node's meta, which copies of the node have, too


@dataclass(eq=False)
class _Region:
    """Matrices that are divided alike, and all that lies between them."""

    units: int = 0  # heads, once a view makes some; else columns, once all is followed
    heads: bool = False
    failed: bool = False
    columns: list[fx.Node] = field(default_factory=list)
    rows: list[fx.Node] = field(default_factory=list)
    joined: "_Region | None" = None

    def root(self) -> "_Region":
        return self if self.joined is None else self.joined.root()

    def ranges(self, count: int) -> list[range]:
        """The units of each of `count` shards."""
        return split(self.units, [1] * count) if self.heads else split_evenly(self.units, count)


@dataclass(frozen=True)
class _Divided:
    """A value of which every shard has a part, along a dimension."""

    region: _Region
    dim: int


@dataclass(frozen=True)
class _Size:
    """Of a view whose sizes are written out: one of them is the region's."""

    region: _Region
    place: int
    size: int  # of the whole


@dataclass(frozen=True)
class _Sum:
    """Of a matrix divided by rows: every shard has a summand."""


class Division:
    """What of a program is divided."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._whole: set[fx.Node] = set()  # matrices that would not do
        while failed := self._follow():
            self._whole.update(failed)
        self._parts: dict[fx.Node, tuple[_Region, int]] = {}  # weights, with the axis
        self._of_first: set[fx.Node] = set()  # that the first shard holds for all
        regions = {value.region.root(): None for value in self._values.values()}
        for region in regions:
            for node in region.columns:
                self._parts |= dict.fromkeys(_weights(node), (region, 0))
            for node in region.rows:
                matrix, *bias = _weights(node)
                self._parts[matrix] = region, 1
                self._of_first.update(bias)
                node.meta[_KEY] = _Sum()
            if not region.heads:
                region.units = int(_weights(region.columns[0])[0].meta["val"].shape[0])
        for node, size in self._sizes.items():
            node.meta[_KEY] = size
        self.most_shards = min((region.units for region in regions), default=1)

    @property
    def weights(self) -> set[fx.Node]:
        """Of which not every shard holds the whole."""
        return {*self._parts, *self._of_first}

    def is_divided(self, node: fx.Node) -> bool:
        """Whether shards have parts of a value; of a sum they have the whole."""
        return node in self._values

    def is_summed(self, node: fx.Node) -> bool:
        return isinstance(node.meta.get(_KEY), _Sum)

    def part(self, weight: fx.Node, shard: Shard) -> Slice | None:
        """What a shard holds of a weight; None where that is all."""
        if weight not in self._parts:
            return None
        region, axis = self._parts[weight]
        whole = tuple(map(int, weight.meta["val"].shape))
        units, width = region.ranges(shard.count)[shard.index], whole[axis] // region.units
        return Slice(axis, (range(units.start * width, units.stop * width),), whole)

    # -- what follows what ---------------------------------------------------------------------------------------

    def _follow(self) -> list[fx.Node]:
        """One pass over the operations; the matrices whose columns cannot be divided."""
        self._values: dict[fx.Node, _Divided] = {}
        self._sizes: dict[fx.Node, _Size] = {}
        roles: dict[fx.Node, tuple[_Region, int]] = {}
        regions: list[_Region] = []
        for node in self._program.graph.nodes:
            given = [source for source in node.all_input_nodes if source in self._values]
            if node.op == "output" or (given and node.op != "call_function"):
                self._fail(given)
            elif node.target == _LINEAR and self._is_matrix(node):
                self._take_matrix(node, roles, regions)
            elif given:
                self._pass_on(node, given)
        return [node for region in regions if region.root().failed for node in region.columns]

    def _is_matrix(self, node: fx.Node) -> bool:
        """Whether a linear operation multiplies with weights that nothing else uses."""
        weights = _weights(node)
        return not node.kwargs and all(
            weight in self._program.weights and all(user.target == _LINEAR for user in weight.users)
            for weight in weights
        )

    def _take_matrix(self, node: fx.Node, roles: dict[fx.Node, tuple[_Region, int]], regions: list[_Region]) -> None:
        weight, *_ = _weights(node)
        value = self._values.get(node.args[0])  # type: ignore[arg-type]
        if value is not None:
            region, axis = value.region.root(), 1
            if value.dim != node.args[0].meta["val"].dim() - 1:  # type: ignore[union-attr]
                region.failed = True
            region.rows.append(node)
        elif node in self._whole:
            region, axis = _Region(), -1
        else:
            region, axis = _Region(columns=[node]), 0
            regions.append(region)
            self._values[node] = _Divided(region, node.meta["val"].dim() - 1)
        known, known_axis = roles.setdefault(weight, (region, axis))
        if known_axis != axis:  # a weight that is used twice, and not alike
            region.root().failed = known.root().failed = True
        self._join(known, region)

    def _pass_on(self, node: fx.Node, given: Sequence[fx.Node]) -> None:
        """Whether an operation makes of divided values one that is divided; else none of them may be."""
        values = [self._values[source] for source in given]
        for other in values[1:]:
            self._join(values[0].region, other.region)
        dim = self._dim_behind(node, given, values[0])
        if dim is None or any(value.dim != values[0].dim for value in values):
            self._fail(given)
        else:
            self._values[node] = _Divided(values[0].region, dim)

    def _dim_behind(self, node: fx.Node, given: Sequence[fx.Node], value: _Divided) -> int | None:
        shapes = [source.meta["val"].shape for source in given]
        if not isinstance(node.meta["val"], torch.Tensor):
            return None
        rank, dim = len(shapes[0]), value.dim
        arguments: Any = node.args[1:]
        match node.target:
            case target if target in _ALIKE:
                return dim
            case target if target in _PAIRWISE:
                whole = [n for n in node.all_input_nodes if n not in self._values]
                narrow = all(_is_one(n.meta["val"], dim - rank) for n in whole)
                alike = all(len(shape) == rank and shape[dim] == shapes[0][dim] for shape in shapes)
                return node.meta["val"].dim() - rank + dim if narrow and alike else None
            case _aten.transpose.int:
                a, b = (int(place) % rank for place in arguments)
                return {a: b, b: a}.get(dim, dim)
            case _aten.permute.default:
                return [place % rank for place in arguments[0]].index(dim)
            case _aten.unsqueeze.default:
                return dim + (arguments[0] % (rank + 1) <= dim)
            case _aten.slice.Tensor:
                return dim if arguments and arguments[0] % rank != dim else None
            case _aten.cat.default:
                all_divided = len(given) == len(node.all_input_nodes)
                return dim if arguments and arguments[0] % rank != dim and all_divided else None
            case target if target == _ATTENTION:
                return dim if self._by_heads(node, value) else None
            case target if target in _RESHAPES:
                return self._reshaped(node, value, shapes[0])
        return None

    def _by_heads(self, node: fx.Node, value: _Divided) -> bool:
        """Whether attention has as many heads in all that it takes, and a mask for all of them."""
        attended, masks = node.args[:3], [n for n in (*node.args[3:4], node.kwargs.get("attn_mask")) if n is not None]
        return (
            value.dim == 1
            and all(source in self._values for source in attended)
            and len({int(source.meta["val"].shape[1]) for source in attended}) == 1  # type: ignore[union-attr]
            and all(_is_one(mask.meta["val"], -3) for mask in masks)  # type: ignore[union-attr]
        )

    def _reshaped(self, node: fx.Node, value: _Divided, before: Sequence[Any]) -> int | None:
        """Where the dimension is behind a view: where it was, or divided into heads, or one with what is behind it."""
        region, dim, after = value.region.root(), value.dim, node.meta["val"].shape
        for place, size in enumerate(after):
            if not isinstance(size, int) or _product(after[:place]) != _product(before[:dim]):
                continue
            if size != before[dim]:
                one, other = before[dim:], after[place:]
                if not all(isinstance(each, int) for each in (*one, *other)) or prod(one) != prod(other):
                    continue
                if len(one) == 1 and region.units in (0, other[0]):  # into heads
                    region.units, region.heads = other[0], True
                elif len(other) > 1 or not region.heads:
                    return None
            literal = node.args[1][place]  # type: ignore[index]
            if literal != -1:
                if not isinstance(literal, int):
                    return None
                self._sizes[node] = _Size(region, place, literal)
            return place
        return None

    def _join(self, one: _Region, other: _Region) -> None:
        one, other = one.root(), other.root()
        if one is other:
            return
        other.joined = one
        one.failed |= other.failed or (bool(one.units and other.units) and one.units != other.units)
        one.units, one.heads = one.units or other.units, one.heads or other.heads
        one.columns += other.columns
        one.rows += other.rows

    def _fail(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            self._values[node].region.root().failed = True


def divide(graph: fx.Graph, shard: Shard, root: nn.Module) -> None:
    """Make a copy of operations of a program what a shard computes, with `root` to hold the sum."""
    for node in list(graph.nodes):
        match node.meta.get(_KEY):
            case _Size(region, place, size):
                region = region.root()
                units = region.ranges(shard.count)[shard.index]
                sizes = list(node.args[1])
                sizes[place] = size // region.units * len(units)
                node.args = (node.args[0], sizes)
            case _Sum():
                x, weight, bias = (*node.args, None)[:3]
                if shard.index > 0 and bias is not None:  # one of the summands has it
                    node.args = (x, weight)
                    if not bias.users:
                        graph.erase_node(bias)
                if not hasattr(root, "sum_shards"):
                    root.add_module("sum_shards", _SumShards(shard))
                with graph.inserting_after(node):
                    total = graph.call_module("sum_shards", (node,))
                node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)


class _SumShards(nn.Module):
    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self._reduce = shard.reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._reduce(x)


def _weights(node: fx.Node) -> list[fx.Node]:
    """Of a linear operation: the matrix, and the bias if there is one."""
    return [source for source in node.args[1:] if isinstance(source, fx.Node)]


def _product(sizes: Iterable[Any]) -> Any:
    """As a formula of the sizes' symbols."""
    return prod(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def _is_one(value: Any, place: int) -> bool:
    """Whether a value is the same along a dimension, counted from the last: a number, or broadcast."""
    if not isinstance(value, torch.Tensor) or value.dim() < -place:
        return True
    size = value.shape[place]
    return isinstance(size, int) and size == 1  # asking a symbol would fix it for good
