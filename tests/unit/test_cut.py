"""Programs cut anywhere compute what the model computes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from mpinfer.models.cut import Cutter, size_bytes
from mpinfer.models.program import InputShape, Program, Untraceable, named_outputs, trace
from mpinfer.models.recurrent import unstack_recurrent

WIDTH = 4
OPERATIONS = ["linear", "shared", "relu_", "add", "iadd", "scale", "cat", "chunk", "norm", "mean", "ids", "transpose"]


class RandomGraph(nn.Module):
    """A straight program over earlier values [records, WIDTH], of steps (operation, operand, other operand)."""

    def __init__(self, steps: Sequence[tuple[str, int, int]], outputs: Sequence[int]) -> None:
        super().__init__()
        self.steps, self.outputs = steps, outputs
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Embedding(7, WIDTH)
        self.own = nn.ModuleDict()
        for number, (operation, _, _) in enumerate(steps):
            if operation in ("linear", "transpose"):
                self.own[str(number)] = nn.Linear(WIDTH, WIDTH)
            elif operation == "cat":
                self.own[str(number)] = nn.Linear(2 * WIDTH, WIDTH, bias=False)
            elif operation == "norm":
                self.own[str(number)] = nn.BatchNorm1d(WIDTH)
                nn.init.uniform_(self.own[str(number)].get_buffer("running_mean"))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> Any:
        values = [x * 1.5, self.table(ids)]
        for number, (operation, first, second) in enumerate(self.steps):
            a, b = values[first % len(values)], values[second % len(values)]
            values.append(self._compute(operation, str(number), a, b, ids))
        chosen = [values[index % len(values)] for index in self.outputs]
        return {"first": chosen[0], "rest": tuple(chosen[1:])}

    def _compute(self, operation: str, name: str, a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        match operation:
            case "linear" | "norm":
                return self.own[name](a)
            case "shared":
                return self.shared(a)
            case "relu_":
                return torch.relu_(a)
            case "add":
                return a + b
            case "iadd":
                a += b
                return a
            case "scale":
                return a * a.shape[0] + b.mean()
            case "cat":
                return self.own[name](torch.cat([a, b], dim=1))
            case "chunk":
                left, right = a.chunk(2, dim=1)
                return torch.cat([right, left], dim=1)
            case "mean":
                return a - b.mean(dim=0, keepdim=True)
            case "ids":
                return a * (ids > 2)[:, None]
        return self.own[name](a.T.contiguous().T)


def tensors_of(model: nn.Module, program: Program) -> tuple[nn.Module, dict[fx.Node, str]]:
    """A module that holds what the program's graphs get by name."""
    root = nn.Module()
    names = {node: f"tensor{n}" for n, node in enumerate([*program.weights, *program.constants])}
    state = model.state_dict()
    for node, name in names.items():
        root.register_buffer(name, state[program.weights[node]] if node in program.weights else program.constants[node])
    return root, names


def run_cut(model: nn.Module, program: Program, cutter: Cutter, cuts: Sequence[int], inputs: dict[str, Any]) -> Any:
    root, names = tensors_of(model, program)
    by_node = {node: name for name, node in program.inputs.items()}
    values: Any = [inputs[by_node[node]] for node in cutter.crossing(0)]
    for start, stop in pairwise([0, *cuts, cutter.end]):
        values = fx.GraphModule(root, cutter.segment(start, stop, names))(*values)
        # As over a channel: copies, without strides, and what is changed in place there is not seen here.
        values = [v.clone(memory_format=torch.contiguous_format) if isinstance(v, torch.Tensor) else v for v in values]
    return dict(zip(program.outputs, values, strict=True))


steps = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=12)


@settings(max_examples=60, deadline=None)
@given(steps, st.lists(st.integers(0, 15), min_size=1, max_size=3), st.data())
def test_random_graphs_cut_at_random_places_compute_the_same(
    operations: list[tuple[str, int, int]], outputs: list[int], data: st.DataObject
) -> None:
    torch.manual_seed(len(operations))
    model = RandomGraph(operations, outputs).eval().requires_grad_(False)
    shapes = {"x": InputShape((WIDTH,), "float32"), "ids": InputShape((), "int64")}
    program = trace(model, shapes, lambda found, _: found)
    cutter = Cutter(program)
    inputs = {"x": torch.randn(5, WIDTH), "ids": torch.randint(0, 7, (5,))}
    places = [position for position in range(1, cutter.end) if cutter.can_cut(position)]
    cuts = sorted(data.draw(st.sets(st.sampled_from(places), max_size=4))) if places else []
    wanted = named_outputs(model(x=inputs["x"].clone(), ids=inputs["ids"]))
    found = run_cut(model, program, cutter, cuts, inputs)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


class Skips(nn.Module):
    """Down and up again, with a value that is carried past everything."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.down(x))
        return self.up(torch.cat([x, self.middle(y)], dim=1))


def test_what_is_used_behind_a_cut_crosses_it() -> None:
    program = trace(Skips().eval(), {"x": InputShape((8,), "float32")}, lambda found, _: found)
    cutter = Cutter(program)
    symbols = program.symbols({"x": (6, 8)})
    sizes = [
        sorted(size_bytes(node.meta["val"], symbols) for node in cutter.crossing(position))
        for position in cutter.candidates()
    ]
    assert sizes == [[6 * 4 * 4, 6 * 8 * 4], [6 * 12 * 4]]  # before the middle layer x and y; before the last one both


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_are_cut_between_layers(kind: Any, bidirectional: bool) -> None:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(5, 6, num_layers=3, batch_first=True, bidirectional=bidirectional)
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> Any:
            states, last = self.rnn(x)
            return states, self.head((last[0] if isinstance(last, tuple) else last)[-1])

    torch.manual_seed(0)
    model = Speech().eval().requires_grad_(False)
    x = torch.randn(4, 7, 5)
    wanted = named_outputs(model(x))
    names = list(model.state_dict())
    model = unstack_recurrent(model)
    assert list(model.state_dict()) == names
    program = trace(model, {"x": InputShape((7, 5), "float32", longest=100)}, lambda found, _: found)
    cutter = Cutter(program)
    cuts = cutter.candidates()
    assert len(cuts) == 4  # before each layer, whose first state is made before it, and before the head
    found = run_cut(model, program, cutter, cuts, {"x": x})
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    longer = torch.randn(2, 31, 5)
    states = run_cut(model, program, cutter, cuts, {"x": longer})["0"]
    torch.testing.assert_close(states, model(longer)[0], rtol=1e-5, atol=1e-6)


def test_a_mask_is_computed_again_and_not_carried() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.first, self.second = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            mask = (ids > 0)[:, None, :] & (ids > 0)[:, :, None]  # [records, tokens, tokens]
            x = self.first(self.table(ids))
            return self.second(mask.to(x.dtype) @ x)

    model = Masked().eval().requires_grad_(False)
    program = trace(model, {"ids": InputShape((11,), "int64", longest=64)}, lambda found, _: found)
    cutter = Cutter(program)
    position = cutter.candidates()[0]  # before the first layer
    assert {node.name for node in cutter.crossing(position)} == {program.inputs["ids"].name, "embedding"}
    ids = torch.randint(0, 9, (3, 20))
    found = run_cut(model, program, cutter, cutter.candidates(), {"ids": ids})
    torch.testing.assert_close(found["output"], model(ids))


def test_a_model_that_looks_at_its_numbers_cannot_be_traced() -> None:
    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(Untraceable, match=r"data-dependent|guard"):
        trace(Looks(), {"x": InputShape((2,), "float32")}, lambda found, _: found)
