"""Cut a program into blocks: where that is possible, what crosses a cut, and what lies between two.

Between any two operations a program can be cut when all that is computed before and used after is carried over:
the residual as well as the branch. What is cheap to compute again from token ids, masks and constants (positions, an
attention mask) is not carried but computed wherever it is used.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import fx

from mpinfer.models.program import Program

_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten._native_batch_norm_legit_no_training.default)


class Cutter:
    """The order of a program's operations, by position; a cut at position p lies before operation p."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._given = {node for node in program.graph.nodes if node.op == "placeholder"}
        self._again: set[fx.Node] = set()  # computed again wherever they are used
        self.operations: list[fx.Node] = []
        for node in program.graph.nodes:
            if node.op == "get_attr" or (node.op == "call_function" and all(map(self._is_cheap, node.all_input_nodes))):
                self._again.add(node)
            elif node.op == "call_function":
                self.operations.append(node)
        self._needs = [self._sources(node.all_input_nodes) for node in self.operations]
        self._results = self._sources(program.outputs.values())
        self._defined = {node: position for position, node in enumerate(self.operations)}
        self._last_use: dict[fx.Node, int] = {}
        for position, needed in enumerate([*self._needs, self._results]):
            for node in needed:
                self._last_use[node] = position
        self._values = [*program.inputs.values(), *self.operations]  # in a fixed order

    @property
    def end(self) -> int:
        return len(self.operations)

    def crossing(self, position: int) -> list[fx.Node]:
        """The values that are carried over a cut: of every one defined before it and used behind it."""
        return [
            node
            for node in self._values
            if self._defined.get(node, -1) < position and self._last_use.get(node, -1) >= position
        ]

    def can_cut(self, position: int) -> bool:
        """Whether all that crosses is tensors of known size, and sizes."""
        return all(_is_sendable(node.meta["val"]) for node in self.crossing(position))

    def candidates(self) -> list[int]:
        """Where a cut separates weights: before every operation that has some; a norm stays with its convolution."""
        return [
            position
            for position, node in enumerate(self.operations)
            if position > 0 and self._weights(node) and node.target not in _NORMS and self.can_cut(position)
        ]

    def weights(self, start: int, stop: int) -> list[fx.Node]:
        """Of the operations from `start` to before `stop`."""
        found = dict.fromkeys(w for node in self.operations[start:stop] for w in self._weights(node))
        if stop == self.end:
            found.update(dict.fromkeys(node for node in self.program.outputs.values() if node in self.program.weights))
        return list(found)

    def segment(self, start: int, stop: int, names: Mapping[fx.Node, str]) -> fx.Graph:
        """Operations [start, stop) as a graph of their own: from what crosses `start` to what crosses `stop`, or at the
        end to the program's outputs. `names`: attributes that hold weights and constants."""
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for number, node in enumerate(self.crossing(start)):
            made[node] = graph.placeholder(f"x{number}")

        def take(node: fx.Node) -> fx.Node:
            if node not in made:
                if node in names:
                    made[node] = graph.get_attr(names[node])
                else:
                    assert node in self._again, f"{node} was not carried over the cut"
                    made[node] = graph.node_copy(node, take)
            return made[node]

        for node in self.operations[start:stop]:
            made[node] = graph.node_copy(node, take)
        results = self.program.outputs.values() if stop == self.end else self.crossing(stop)
        graph.output(tuple(take(node) for node in results))
        return graph

    def _is_cheap(self, node: fx.Node) -> bool:
        """Whether a value is one of few numbers, or computed from such: no floating input and no weight is."""
        if node in self._again or node in self.program.constants:
            return True
        return node in self.program.inputs.values() and not node.meta["val"].is_floating_point()

    def _sources(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The operations and inputs behind values, through all that is computed again."""
        found: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self._again:
                pending.extend(node.all_input_nodes)
            elif node not in self._given or node in self.program.inputs.values():
                found.add(node)
        return found

    def _weights(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in self.program.weights]


def size_bytes(value: Any, symbols: Mapping[Any, int]) -> int:
    """Of a value in a message, when the symbols of sizes stand for these numbers."""
    if not isinstance(value, torch.Tensor):
        return 8
    return prod(concrete(size, symbols) for size in value.shape) * value.element_size()


def concrete(size: Any, symbols: Mapping[Any, int]) -> int:
    """A size as a number. By its formula: asking the size itself would have torch fix its symbols for good."""
    return int(size.node.expr.xreplace(dict(symbols))) if isinstance(size, torch.SymInt) else int(size)


def _is_sendable(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return isinstance(value, int | torch.SymInt)
    sizes: list[Any] = [size for size in value.shape if isinstance(size, torch.SymInt)]
    unknown = any(_is_unknown(symbol) for size in sizes for symbol in size.node.expr.free_symbols)
    return value.layout == torch.strided and not unknown


def _is_unknown(symbol: Any) -> bool:
    """Whether a size depends on data (torch calls such symbols unbacked)."""
    return str(symbol).startswith(("u", "zuf"))
