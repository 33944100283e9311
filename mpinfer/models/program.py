"""Any torch model as a program: a graph of operations without weights, traced by `torch.export`.

Tracing computes nothing and holds no weight: parameters are fake tensors that know their shape only.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from mpinfer.errors import ModelError, RecordError

_TRACED_BATCH = 3  # records; sizes 0 and 1 would be taken as fixed
_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size"}


@dataclass(frozen=True)
class InputShape:
    """Of an input of the model, by one record of it."""

    shape: tuple[int, ...]
    dtype: str  # "float32", say
    longest: int | None = None  # most that the first dimension may be, if it varies from record to record

    def batch(self, records: int, length: int | None = None) -> tuple[int, ...]:
        """The shape of a batch, with records of this one's length or of another."""
        rest = self.shape if length is None or self.longest is None else (length, *self.shape[1:])
        return (records, *rest)


@dataclass
class Program:
    """What a model computes. Nodes of `graph` have their (symbolic) values in `meta["val"]`."""

    graph: fx.Graph
    owner: nn.Module  # of what the graph's get_attr nodes name
    inputs: dict[str, fx.Node]
    outputs: dict[str, fx.Node]
    weights: dict[fx.Node, str]  # names of the tensors to load
    constants: dict[fx.Node, torch.Tensor]  # tensors that come with the program
    ranges: dict[Any, Any]  # of symbols of sizes

    @property
    def batch_symbols(self) -> set[Any]:
        """What the number of records is called in sizes; none where it is fixed."""
        counts = [node.meta["val"].shape[0] for node in self.inputs.values()]
        return {count.node.expr for count in counts if isinstance(count, torch.SymInt)}

    def symbols(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[Any, int]:
        """What the symbols of sizes stand for when batches of these shapes enter."""
        found = {}
        for name, node in self.inputs.items():
            for size, value in zip(node.meta["val"].shape, shapes[name], strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    found[size.node.expr] = value
        return found

    def check(self, sample: Mapping[str, torch.Tensor]) -> None:
        """Raises `RecordError` when the tensors of a record are not what the program was traced for."""
        if sample.keys() != self.inputs.keys():
            raise RecordError(
                f"the record gives {', '.join(sample) or 'nothing'}, the model was planned for "
                f"{', '.join(self.inputs)} as in the first record; give every record the same fields"
            )
        for name, node in self.inputs.items():
            tensor, val = sample[name], node.meta["val"]
            if tensor.dtype != val.dtype:
                raise RecordError(
                    f"{name}: is {_dtype(tensor)}, the first record has {_dtype(val)}; give every record the same type"
                )
            sizes = val.shape[1:]
            fits = tensor.dim() == len(sizes) and all(map(self._fits, sizes, tensor.shape))
            if not fits:
                shown = ", ".join(map(self._shown, sizes))
                raise RecordError(
                    f"{name}: has shape {list(tensor.shape)}, the model as traced with the first record takes "
                    f"[{shown}]; give every record such a shape"
                )

    def _fits(self, size: Any, actual: int) -> bool:
        if not isinstance(size, torch.SymInt):
            return size == actual
        bounds = self.ranges.get(size.node.expr)
        return bounds is None or bounds.lower <= actual <= bounds.upper

    def _shown(self, size: Any) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        bounds = self.ranges.get(size.node.expr)
        if bounds is None:
            return "any"
        return f"{bounds.lower} or more" if bounds.upper > 2**31 else f"{bounds.lower} to {bounds.upper}"


def trace(model: nn.Module, shapes: Mapping[str, InputShape], finish: Callable[[Any, dict], Any]) -> Program:
    """The program of a model whose parameters are on the meta device or real.

    `finish(outputs, inputs)` is traced behind the model. Raises `ModelError` when the model does not take these
    inputs or when torch cannot trace it.
    """
    names = list(shapes)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        inputs = [torch.zeros(s.batch(_TRACED_BATCH), dtype=getattr(torch, s.dtype)) for s in shapes.values()]
    call = _Call(model, bind_inputs(model, names), names, finish)
    dynamic = tuple({0: Dim.AUTO, 1: Dim.AUTO} if s.longest else {0: Dim.AUTO} for s in shapes.values())
    originals = list(_parameters(model))
    fakes: dict[int, nn.Parameter] = {}  # by the original: tied parameters stay tied
    try:
        for module, leaf, parameter in originals:
            if id(parameter) not in fakes:
                fakes[id(parameter)] = nn.Parameter(_fake(parameter, mode), requires_grad=False)
            setattr(module, leaf, fakes[id(parameter)])
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(call, tuple(inputs), dynamic_shapes={"tensors": dynamic}, strict=False)
            exported = _functional(exported)
    except ModelError:
        raise
    except Exception as error:
        raise Untraceable(f"{type(error).__name__}: {_first_line(error)}") from error
    finally:
        for module, leaf, parameter in originals:
            setattr(module, leaf, parameter)
    return program_of(exported, names, prefix="model.")


class Untraceable(ModelError):
    """The model cannot be made a program; it may still run whole."""


def program_of(exported: ExportedProgram, names: Iterable[str], prefix: str = "") -> Program:
    """The program of an export whose inputs are to be called `names`, in the order in which it takes them."""
    graph, signature = exported.graph, exported.graph_signature
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    placeholders: list[fx.Node] = []
    weights: dict[fx.Node, str] = {}
    constants: dict[fx.Node, torch.Tensor] = {}
    for spec in signature.input_specs:
        node = nodes[spec.arg.name]
        match spec.kind:
            case InputKind.USER_INPUT:
                placeholders.append(node)
            case InputKind.PARAMETER | InputKind.BUFFER:
                assert spec.target is not None
                if spec.kind == InputKind.BUFFER and not spec.persistent:
                    constants[node] = exported.constants[spec.target]
                else:
                    weights[node] = spec.target.removeprefix(prefix)
            case InputKind.CONSTANT_TENSOR:
                assert spec.target is not None
                constants[node] = exported.constants[spec.target]
            case _:
                raise Untraceable(f"it takes a {spec.kind.name.lower().replace('_', ' ')}")
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in signature.output_specs):
        raise Untraceable("its forward changes its own buffers or inputs")
    for node in list(graph.nodes):
        if node.op == "call_function" and getattr(node.target, "_opname", "") in _CHECKS:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    (output,) = graph.find_nodes(op="output")
    values = list(output.args[0])
    outputs = {
        name: value for name, value in zip(_output_names(exported), values, strict=True) if isinstance(value, fx.Node)
    }
    tensors = {n: v for n, v in outputs.items() if isinstance(v.meta.get("val"), torch.Tensor)}
    if not tensors:
        raise Untraceable("it gives no tensor")
    inputs = dict(zip(names, placeholders, strict=True))
    return Program(graph, exported.graph_module, inputs, tensors, weights, constants, exported.range_constraints)


def bind_inputs(model: nn.Module, names: list[str]) -> bool:
    """Whether the model takes inputs of these names by name (else in their order).

    Raises `ModelError` when it takes them neither way.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError:
        try:
            signature.bind(*names)
        except TypeError:
            raise ModelError(
                f"{type(model).__name__}: takes {', '.join(signature.parameters) or 'nothing'}, but a record gives "
                f"{', '.join(names)}; name the fields as the model does (input.columns, model.prepare)"
            ) from None
        return False
    return True


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors in what a model returned, each by its path: "output" alone, or "logits", "states.0"."""
    pairs, _ = pytree.tree_flatten_with_path(outputs)
    return {_path(keys): value for keys, value in pairs if isinstance(value, torch.Tensor)}


class _Call(nn.Module):
    """Takes tensors in a fixed order, whatever the model wants them as."""

    def __init__(self, model: nn.Module, by_name: bool, names: list[str], finish: Callable[[Any, dict], Any]) -> None:
        super().__init__()
        self.model = model
        self._by_name, self._names, self._finish = by_name, names, finish

    def forward(self, *tensors: torch.Tensor) -> Any:
        inputs = dict(zip(self._names, tensors, strict=True))
        return self._finish(self.model(**inputs) if self._by_name else self.model(*tensors), inputs)


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """The same without operations that change their operands: a value that crossed a cut is a copy."""
    changing = [node for node in exported.graph.nodes if _changes_operand(node)]
    if not all(map(_is_simple_change, changing)):
        return exported.run_decompositions({})  # right for every alias, but it takes a second
    for node in changing:
        operand = node.args[0]
        packet = getattr(torch.ops.aten, node.target._opname.removesuffix("_"))
        node.target = getattr(packet, node.target._overloadname)
        # Whoever used the operand after it was changed meant the result.
        operand.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)
    return exported


def _changes_operand(node: Any) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _is_simple_change(node: Any) -> bool:
    """Whether an operation such as `relu_` changes a value that no other value is a view of."""
    name, operand = node.target._opname, node.args[0]
    functional = getattr(torch.ops.aten, name.removesuffix("_"), None)
    return (
        name.endswith("_")
        and functional is not None
        and node.target._overloadname in functional.overloads()
        and operand.op == "call_function"
        and not _may_alias(operand)
        and not any(_may_alias(user) for user in operand.users if user is not node)
    )


def _may_alias(node: Any) -> bool:
    """Whether a value may share memory with what it was made of."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(argument.alias_info is not None for argument in schema.arguments)


def _fake(parameter: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    return FakeTensor(mode, parameter.detach().to("meta"), torch.device("cpu"))


def _parameters(model: nn.Module) -> Iterable[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield module, leaf, parameter


def _output_names(exported: ExportedProgram) -> list[str]:
    spec = exported.call_spec.out_spec
    assert spec is not None
    pairs, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    return [_path(keys) for keys, _ in pairs]


def _path(keys: Iterable[Any]) -> str:
    parts = [next(str(getattr(key, a)) for a in ("key", "idx", "name") if hasattr(key, a)) for key in keys]
    return ".".join(parts) or "output"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
