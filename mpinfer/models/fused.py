"""Linear layers that get the same input, computed as one.

Queries, keys and values, or the two halves of a gated MLP: one wide GEMM instead of two or three narrow ones.
The model's own forward still calls each of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# Names that transformers' families give to layers of one module with a common input. A wrong guess costs time, never
# results: a layer that is called with another input computes it for that.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class FusedLinear(nn.Module):
    """The layers of a group; `whole` computes all of their outputs side by side."""

    def __init__(self, whole: nn.Module, in_features: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.whole, self.in_features, self.widths = whole, in_features, list(widths)
        self._input: torch.Tensor | None = None  # held, so that no other tensor can be taken for it
        self._outputs: tuple[torch.Tensor, ...] = ()

    def output(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """What one member makes of x, [..., widths[member]]; the last one's call forgets x."""
        if x is not self._input:
            self._input, self._outputs = x, self.whole(x).split(self.widths, dim=-1)
        output = self._outputs[member]
        if member == len(self.widths) - 1:
            self._input, self._outputs = None, ()
        return output


class FusedMember(nn.Module):
    """Stands where a layer of a group stood."""

    def __init__(self, group: FusedLinear, member: int) -> None:
        super().__init__()
        self.group, self._member = group, member

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.output(x, self._member)


def find_group(parent: nn.Module, name: str) -> list[str]:
    """The names of all layers that can be fused with a module's child, itself included; [] when none can."""
    for names in GROUPS:
        if name in names:
            layers = [getattr(parent, other, None) for other in names]
            if all(type(layer) is nn.Linear for layer in layers) and len({_kind(layer) for layer in layers}) == 1:
                return list(names)
    return []


def concatenated(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer with the outputs of all, side by side."""
    first = layers[0]
    whole = nn.Linear(first.in_features, sum(layer.out_features for layer in layers), bias=False, device="meta")
    whole.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    if first.bias is not None:
        whole.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
    return whole


def _kind(layer: Any) -> tuple[int, bool]:
    return layer.in_features, layer.bias is not None
