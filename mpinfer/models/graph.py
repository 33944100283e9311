"""Models of any kind as blocks that can be cut between ranks: encoders, CNNs, RNNs, the user's own modules.

The model is a program (`program.py`), cut between any two of its operations (`cut.py`). What torch cannot trace stays
whole: one block, in replicas.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx, nn

from mpinfer.errors import ModelError
from mpinfer.models.build import Built, build
from mpinfer.models.convolution import PackedConvolution, can_pack, find_groups
from mpinfer.models.cut import Cutter, concrete, size_bytes
from mpinfer.models.graph_parallel import Division, divide
from mpinfer.models.halving import RecordAxes, is_out_of_memory
from mpinfer.models.linear import LayerTuner, packed_bytes
from mpinfer.models.profile import estimated_cost, operation_seconds, probe
from mpinfer.models.program import InputShape, Program, bind_inputs, named_outputs
from mpinfer.models.tensor_parallel import Shard
from mpinfer.plan.block import Block, ModelSummary
from mpinfer.plan.cost import ZERO, Curve, Rates
from mpinfer.plugins import one_line
from mpinfer.spec import AUTO, JobSpec

MICRO_BATCH = 8  # records, unless a quarter or four times as many compute faster
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_LINEAR = torch.ops.aten.linear.default
_LEAST_SHARED = 0.5  # of a program's cost: else shards would mostly do the same
_UNKNOWN_S = 1e-3  # of a record, until a model that cannot be traced is loaded and timed
_NEAR, _SAME = 0.04, 0.005  # of the program's cost: a cut gives way to one so near that carries half; to any so near


class GraphSkeleton:
    """A model without weights, and where it can be cut. Raises `ModelError`.

    `shapes`: of the inputs, by one record. The same on every rank.
    """

    def __init__(self, spec: JobSpec, shapes: Mapping[str, InputShape]) -> None:
        self._spec, self._shapes = spec, shapes
        self._built: Built = build(spec, shapes)
        self._profiles: dict[int, list[float]] = {}  # by batch: seconds of each operation, once they are timed
        self.problem = self._built.problem  # why it cannot be cut; "" if it can
        if self._built.program is not None:
            self._cutter = Cutter(self._built.program)
            self._division = Division(self._built.program)
            candidates = self._cutter.candidates()
            whole = [p for p in candidates if not any(map(self._division.is_divided, self._cutter.crossing(p)))]
            self._boundaries = {False: self._choose_boundaries(candidates), True: self._choose_boundaries(whole)}

    @property
    def program(self) -> Program | None:
        return self._built.program

    @property
    def fixed_batch(self) -> int | None:
        """Records of a batch, of a program that was exported for so many and no other number."""
        if self.program is None:
            return None
        sizes = [node.meta["val"].shape[0] for node in self.program.inputs.values()]
        return next((size for size in sizes if isinstance(size, int)), None)

    def summary(self) -> ModelSummary:
        """Blocks with their weights and measured costs, for the planner: in seconds a record."""
        if self._built.program is None:
            assert self._built.model is not None
            weights = tuple((name, tensor.nbytes) for name, tensor in self._built.model.state_dict().items())
            return ModelSummary((Block("whole", weights, 1.0, 0.0),), micro_batch=MICRO_BATCH, problem=self.problem)
        batch = self._fastest_batch()
        most_shards, shards_problem = self._most_shards()
        return ModelSummary(
            self._blocks(batch, divided=False),
            micro_batch=batch,
            micro_batch_is_fixed=self.fixed_batch is not None,
            most_shards=most_shards,
            shards_problem=shards_problem,
            row_bytes=self.row_bytes,
            divisible=self._blocks(batch, divided=True) if most_shards > 1 else (),
        )

    def _blocks(self, batch: int, divided: bool) -> tuple[Block, ...]:
        """As one rank holds a stage, or several do; `batch`: that operations were timed with."""
        assert self._built.program is not None
        seconds, shared = self._profiles[batch], self._division.weights
        blocks = []
        for number, (start, stop) in enumerate(pairwise(self._boundaries[divided])):
            nodes = self._cutter.weights(start, stop)
            names = [self._built.program.weights[node] for node in nodes]
            sizes = [size_bytes(node.meta["val"], {}) for node in nodes]
            operations = self._cutter.operations[start:stop]
            alone_s = (s for s, node in zip(seconds[start:stop], operations, strict=True) if not self._is_shared(node))
            blocks.append(
                Block(
                    names[0].rpartition(".")[0] if names else f"block.{number}",
                    tuple(zip(names, sizes, strict=True)),
                    sum(seconds[start:stop]) / batch,
                    0.0,
                    reductions=sum(map(self._division.is_summed, operations)),
                    whole=frozenset(name for name, node in zip(names, nodes, strict=True) if node not in shared),
                    whole_cost=sum(alone_s) / batch,
                )
            )
        return tuple(blocks)

    def _is_shared(self, node: fx.Node) -> bool:
        return self._division.is_divided(node) or self._division.is_summed(node)

    def _most_shards(self) -> tuple[int, str]:
        """How many ranks can hold a stage together, and why not more."""
        if self._spec.model.quantize != "none":
            return 1, f"model.quantize={self._spec.model.quantize} is not divided in models of one pass"
        symbols = self._symbols(self.fixed_batch or MICRO_BATCH)
        costs = {node: estimated_cost(node, symbols) for node in self._cutter.operations}
        share = sum(cost for node, cost in costs.items() if self._is_shared(node)) / sum(costs.values())
        if share < _LEAST_SHARED:
            return 1, f"{share:.0%} of its work lies between matrices of which one can be divided by columns"
        most = self._division.most_shards
        return most, f"a matrix has {most} heads or columns"

    @property
    def row_bytes(self) -> float:
        """Of what crosses between blocks for a record, in the mean."""
        inner = range(1, len(self._boundaries[False]) - 1) if self._built.program is not None else ()
        return sum(sum(self.capacity(block, MICRO_BATCH)[1]) for block in inner) / MICRO_BATCH / max(1, len(inner))

    def _fastest_batch(self) -> int:
        """The batch that a record takes least time in, unless it is given."""
        asked = self._spec.parallel.micro_batch
        given = self.fixed_batch or (None if asked == AUTO else asked)
        if given is not None:
            self._record_s(given)
            return given
        # Images of a few records may fit a cache where those of more do not; small layers want many records.
        smaller, larger = MICRO_BATCH // 4, MICRO_BATCH * 4
        best = min((MICRO_BATCH, smaller), key=self._record_s)
        return best if best == smaller else min((best, larger), key=self._record_s)

    def _record_s(self, batch: int) -> float:
        """Seconds of a record in such a batch, by timing each operation for it."""
        assert self._built.program is not None
        if batch not in self._profiles:
            graph, operations = self._built.program.graph, self._cutter.operations
            self._profiles[batch] = operation_seconds(graph, operations, self._symbols(batch))
        return sum(self._profiles[batch]) / batch

    def rates(self) -> Rates:
        """Seconds for each unit of the blocks' costs, of a model that `summary` has timed."""
        if self._built.program is None:
            return Rates(Curve((1.0,), (_UNKNOWN_S,)), ZERO, ZERO)
        unit = self._record_s(self._fastest_batch())
        sizes = sorted(self._profiles)
        return Rates(Curve(tuple(map(float, sizes)), tuple(n * self._record_s(n) / unit for n in sizes)), ZERO, ZERO)

    def probe(self, least_s: float) -> tuple[float, float]:
        """Seconds of a fixed piece of the model's work on this rank, at best and in the mean over `least_s`."""
        if self._built.program is None:
            return 1.0, 1.0
        return probe(self._cutter.operations, self._symbols(self.fixed_batch or MICRO_BATCH), least_s)

    def capacity(self, block: int, batch: int, divided: bool = False) -> tuple[int, list[int]]:
        """Of a message that crosses into a block: the sum of its values' dimensions, and the most bytes of each.

        `divided`: whether blocks are those of stages of several shards, here and below.
        """
        crossing = self._cutter.crossing(self._boundaries[divided][block])
        symbols = self._symbols(batch, longest=True)
        sizes = [size_bytes(node.meta["val"], symbols) for node in crossing]
        return sum(getattr(node.meta["val"], "ndim", 0) for node in crossing), sizes

    def example(self, block: int, batch: int, divided: bool = False) -> list[Any]:
        """What enters a block when a batch of records like the first one comes, as zeros."""
        if self._built.program is None:
            return [torch.zeros(s.batch(batch), dtype=getattr(torch, s.dtype)) for s in self._shapes.values()]
        symbols = self._symbols(batch)
        values = [node.meta["val"] for node in self._cutter.crossing(self._boundaries[divided][block])]
        return [
            torch.zeros([concrete(n, symbols) for n in value.shape], dtype=value.dtype)
            if isinstance(value, torch.Tensor)
            else concrete(value, symbols)
            for value in values
        ]

    def first_values(self, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """What enters the first block, of a batch's tensors by name."""
        if self._built.program is None:
            return [batch[name] for name in self._shapes]
        by_node = {node: name for name, node in self._built.program.inputs.items()}
        return [batch[by_node[node]] for node in self._cutter.crossing(0)]

    def load_part(
        self,
        start: int,
        stop: int,
        device: str,
        micro_batch: int,
        on_block: Callable[[], None],
        shard: Shard | None = None,
    ) -> "GraphPart | WholePart":
        """Blocks [start, stop) with their weights, ready to run, or a shard's part of them. Reads no others.

        `on_block` is called before each block (the transport makes progress there).
        """
        if self._built.program is None:
            return WholePart(self._built, list(self._shapes), device)
        loader = _Loader(self._built, self._cutter, self._symbols(micro_batch), device, self._spec.model.quantize)
        if shard is not None:
            loader.divide(self._division, shard)
        return loader.load(self._boundaries[shard is not None][start : stop + 1], on_block)

    def _choose_boundaries(self, candidates: Sequence[int]) -> list[int]:
        """Of places to cut that are near each other the ones that carry least."""
        symbols = self._symbols(self.fixed_batch or MICRO_BATCH)
        costs = [estimated_cost(node, symbols) for node in self._cutter.operations]
        before = [0.0, *accumulate(costs)]
        carried = {
            p: sum(size_bytes(node.meta["val"], symbols) for node in self._cutter.crossing(p)) for p in candidates
        }
        kept: list[int] = []
        for position in sorted(carried, key=carried.__getitem__):
            reaches = (_NEAR if 2 * carried[other] <= carried[position] else _SAME for other in kept)
            spans = (abs(before[other] - before[position]) / before[-1] for other in kept)
            if all(span > reach for span, reach in zip(spans, reaches, strict=True)):
                kept.append(position)
        return [0, *sorted(kept), self._cutter.end]

    def _symbols(self, batch: int, longest: bool = False) -> dict[Any, int]:
        assert self._built.program is not None
        shapes = {name: s.batch(batch, s.longest if longest else None) for name, s in self._shapes.items()}
        return self._built.program.symbols(shapes)


class GraphPart:
    """Consecutive blocks of a program, with weights."""

    def __init__(
        self,
        blocks: Sequence[fx.GraphModule],
        axes: tuple[RecordAxes, RecordAxes],
        outputs: Sequence[str],
        root: nn.Module,
        read_bytes: int,
        kernels: Mapping[str, int],
        device: str,
        on_block: Callable[[], None],
    ) -> None:
        """`axes`: of what crosses into the part, and out of it."""
        self._blocks, self._on_block, self._device = blocks, on_block, device
        self._into, self._out = axes
        self.can_halve = all(crossing.are_known for crossing in axes)
        self.output_names = outputs  # of the last part's values
        self.read_bytes, self.kernels = read_bytes, dict(kernels)
        tensors = [*root.parameters(), *root.buffers()]
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors) + packed_bytes(root)

    @torch.inference_mode()
    def forward(self, values: Sequence[Any]) -> Sequence[Any]:
        """What crosses into the part in, what crosses out of it out: tensors and sizes."""
        values = [v.to(self._device) if isinstance(v, torch.Tensor) else v for v in values]
        for block in self._blocks:
            self._on_block()
            values = block(*values)
        return values

    def take(self, values: Sequence[Any], start: int, stop: int) -> Sequence[Any]:
        """Of what crosses into the part, the records [start, stop): at least the two that programs take, the last one
        twice if need be."""
        taken = self._into.take(values, start, stop)
        return taken if stop - start > 1 else self._into.join([taken, taken])

    def join(self, pieces: Sequence[Sequence[Any]], records: Sequence[int]) -> Sequence[Any]:
        """What crosses out of the part, of the first so many records of each piece, and again two of them at least."""
        taken = [self._out.take(values, 0, count) for values, count in zip(pieces, records, strict=True)]
        return self._out.join(taken if sum(records) > 1 else taken * 2)


class WholePart:
    """A model that cannot be cut, with weights."""

    kernels: Mapping[str, int] = {}
    can_halve = True

    def __init__(self, built: Built, names: Sequence[str], device: str) -> None:
        assert built.model is not None
        self._model, self._finish, self._names, self._device = built.model, built.finish, names, device
        self._by_name = bind_inputs(self._model, list(names))
        self.output_names: Sequence[str] = ()
        self.read_bytes = 0
        loaded: dict[int, torch.Tensor] = {}  # tied tensors share memory
        for path, module in list(self._model.named_modules()):
            for leaf, tensor in list(module.named_parameters(recurse=False)):
                name = f"{path}.{leaf}".lstrip(".")
                if id(tensor) not in loaded:
                    target = torch.empty(tensor.shape, dtype=tensor.dtype)
                    self.read_bytes += built.store.load(name, target)
                    loaded[id(tensor)] = nn.Parameter(target, requires_grad=False)
                setattr(module, leaf, loaded[id(tensor)])
            for leaf, tensor in module.named_buffers(recurse=False):
                if leaf not in module._non_persistent_buffers_set:
                    self.read_bytes += built.store.load(f"{path}.{leaf}".lstrip("."), tensor)
        self._model.to(device)
        self.weight_bytes = sum(t.nbytes for t in [*self._model.parameters(), *self._model.buffers()])

    @torch.inference_mode()
    def forward(self, values: Sequence[Any]) -> Sequence[Any]:
        tensors = [value.to(self._device) for value in values]
        inputs = dict(zip(self._names, tensors, strict=True))
        try:
            given = self._finish(self._model(**inputs) if self._by_name else self._model(*tensors), inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
            raise ModelError(
                f"{type(self._model).__name__}: raised {one_line(error)} for a batch of {shapes}; correct the model, "
                f"or give it what it takes (input.columns, model.prepare)"
            ) from error
        outputs = named_outputs(given)
        self.output_names = list(outputs)
        return list(outputs.values())

    def take(self, values: Sequence[torch.Tensor], start: int, stop: int) -> Sequence[torch.Tensor]:
        """The records [start, stop) of a batch."""
        return [value[start:stop] for value in values]

    def join(self, pieces: Sequence[Sequence[torch.Tensor]], records: Sequence[int]) -> Sequence[torch.Tensor]:
        """One batch of several, each of so many records."""
        return [torch.cat(found) for found in zip(*pieces, strict=True)]


class _Loader:
    """Fills the graphs of a part with weights, one tensor after the other."""

    def __init__(self, built: Built, cutter: Cutter, symbols: Mapping[Any, int], device: str, quantize: str) -> None:
        assert built.program is not None
        self._program, self._store, self._cutter, self._symbols = built.program, built.store, cutter, symbols
        self._device, self._root, self._read_bytes = device, nn.Module(), 0
        self._quantize = quantize
        self._tuners: dict[int, LayerTuner] = {}  # by rows of the input
        self._kernels: Counter[str] = Counter()
        given = [*self._program.weights, *self._program.constants]
        self._names = {node: f"tensor{number}" for number, node in enumerate(given)}
        self._nodes = {name: node for node, name in self._names.items()}
        self._division: Division | None = None
        self._shard: Shard | None = None

    def divide(self, division: Division, shard: Shard) -> None:
        """Load what a shard has of the blocks, which are those of stages of several shards."""
        self._division, self._shard = division, shard

    def load(self, boundaries: Sequence[int], on_block: Callable[[], None]) -> GraphPart:
        graphs = []
        for start, stop in pairwise(boundaries):
            graph = self._cutter.segment(start, stop, self._names)
            self._place(graph)
            if self._shard is not None:
                divide(graph, self._shard, self._root)
            self._use_convolutions(graph)
            self._use_layers(graph)
            for node in graph.find_nodes(op="get_attr"):
                self._hold(str(node.target))
            graphs.append(graph)
        blocks = [fx.GraphModule(self._root, graph) for graph in graphs]
        for tuner in self._tuners.values():
            self._kernels.update(tuner.used)
        outputs = list(self._program.outputs) if boundaries[-1] == self._cutter.end else []
        axes = self._axes(boundaries[0]), self._axes(boundaries[-1])
        return GraphPart(blocks, axes, outputs, self._root, self._read_bytes, self._kernels, self._device, on_block)

    def _axes(self, position: int) -> RecordAxes:
        """Of the records in what crosses a cut."""
        program = self._program
        crossing = program.outputs.values() if position == self._cutter.end else self._cutter.crossing(position)
        return RecordAxes([node.meta["val"] for node in crossing], program.batch_symbols)

    def _use_convolutions(self, graph: fx.Graph) -> None:
        """Call packed convolutions where the graph has convolutions of images, with the norm and activation behind."""
        groups = find_groups(graph)
        for group in groups:
            sources = group.tensors
            if not all(map(self._is_held, sources)) or not can_pack(self._value(sources[0])):
                continue
            path = "_".join(["convolution", *(str(source.target) for source in sources)])
            if not hasattr(self._root, path):
                tensors = {source: self._tensor(str(source.target)) for source in sources}
                self._root.add_module(path, PackedConvolution(group, tensors))
                self._kernels["onednn convolution"] += 1
            with graph.inserting_before(group.last):
                call = graph.call_module(path, (group.convolution.args[0],))
            group.last.replace_all_uses_with(call)
            for node in [n for n in (group.activation, group.norm, group.convolution) if n is not None]:
                graph.erase_node(node)
            for source in sources:
                if not source.users:
                    graph.erase_node(source)
        for node in graph.nodes if groups else ():
            if node.target in _VIEWS:  # channels last, a view is not always possible
                node.target = torch.ops.aten.reshape.default

    def _use_layers(self, graph: fx.Graph) -> None:
        """Call a layer that is tuned to this machine where the graph has a matrix product with a weight."""
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target != _LINEAR or node.kwargs:
                continue
            x, weight, bias = (*node.args, None)[:3]
            given = [source for source in (weight, bias) if source is not None]
            if not all(map(self._is_held, given)):
                continue
            path = "_".join(["linear", *(str(source.target) for source in given)])
            if not hasattr(self._root, path):
                whole = node.meta["val"]
                rows = size_bytes(whole, self._symbols) // whole.element_size() // int(whole.shape[-1])
                layer = self._linear(str(weight.target), None if bias is None else str(bias.target))
                tuner = self._tuners.setdefault(rows, LayerTuner(rows, self._quantize))
                self._root.add_module(path, tuner.tune(layer))
            with graph.inserting_before(node):
                call = graph.call_module(path, (x,))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            for source in given:
                if not source.users:
                    graph.erase_node(source)

    def _is_held(self, source: Any) -> bool:
        """Whether a node of a graph gets a weight by name."""
        return (
            isinstance(source, fx.Node)
            and source.op == "get_attr"
            and self._nodes.get(str(source.target)) in self._program.weights
        )

    def _value(self, source: fx.Node) -> torch.Tensor:
        """What is known of a weight before it is loaded."""
        return self._nodes[str(source.target)].meta["val"]

    def _linear(self, weight: str, bias: str | None) -> nn.Linear:
        filled = self._tensor(weight)
        layer = nn.Linear(filled.shape[1], filled.shape[0], bias is not None, device="meta")
        layer.weight = nn.Parameter(filled, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(self._tensor(bias), requires_grad=False)
        return layer

    def _hold(self, name: str) -> None:
        """Have the root hold a tensor, or the sub-graph of a branch, that graphs get by name."""
        if hasattr(self._root, name):
            return
        if name not in self._nodes:
            self._root.add_module(name, self._program.owner.get_submodule(name))
        elif self._nodes[name] in self._program.constants:
            self._root.register_buffer(name, self._program.constants[self._nodes[name]].to(self._device))
        else:
            self._root.register_buffer(name, self._tensor(name))

    def _tensor(self, name: str) -> torch.Tensor:
        """A weight, or this shard's part, read from the store. One that two blocks of a part share is held once."""
        node = self._nodes[name]
        value = node.meta["val"]
        part = self._division.part(node, self._shard) if self._division and self._shard else None
        target = torch.empty(tuple(map(int, value.shape)) if part is None else part.shape, dtype=value.dtype)
        self._read_bytes += self._store.load(self._program.weights[node], target, part)
        return target.to(self._device)

    def _place(self, graph: fx.Graph) -> None:
        """Make what the graph creates, such as masks, on this part's device."""
        for node in graph.nodes:
            if isinstance(node.kwargs.get("device"), torch.device):
                node.kwargs = {**node.kwargs, "device": torch.device(self._device)}
