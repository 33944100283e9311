"""Linear layers in the layout that this CPU multiplies fastest.

A general GEMM reorders its operands at every call. oneDNN can keep a weight reordered instead, which pays most
where a step has few rows. Whether it pays here is measured, shape by shape, when a part is loaded.
"""

import time
from collections import Counter

import torch
from torch import nn

_REPEATS = 5
_WORTH = 1.05  # a packed weight must be this much faster to be taken: below it, timing noise would choose


class PackedLinear(nn.Module):
    """A linear layer whose weight only oneDNN can read."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight_bytes = weight.nbytes
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


@torch.inference_mode()
def pack_linears(model: nn.Module, rows: int) -> dict[str, int]:
    """Replace linear layers by packed ones where that is faster for inputs of `rows` rows.

    Returns how many layers use which kernel, `onednn` or `torch`. One weight at a time is held twice.
    """
    faster: dict[tuple[torch.Size, torch.dtype], bool] = {}
    kernels: Counter[str] = Counter()
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        if not _can_pack(layer.weight):
            kernels["torch"] += 1
            continue
        packed = PackedLinear(layer.weight, layer.bias)
        key = (layer.weight.shape, layer.weight.dtype)
        if key not in faster:
            x = torch.randn(rows, layer.in_features, dtype=layer.weight.dtype)
            faster[key] = _seconds(packed, x) * _WORTH < _seconds(layer, x)
        if faster[key]:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, packed)
        kernels["onednn" if faster[key] else "torch"] += 1
    return dict(kernels)


def _can_pack(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _seconds(layer: nn.Module, x: torch.Tensor) -> float:
    """The fastest of a few calls, after one that warms up."""
    layer(x)
    best_s = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        layer(x)
        best_s = min(best_s, time.perf_counter() - started)
    return best_s
