"""Linear layers in the form that this CPU computes fastest.

A general GEMM reorders its operands at every call. oneDNN can keep a weight reordered instead, which pays most
where a step has few rows. Whether it pays here is measured, shape by shape, as layers are loaded.
"""

import time
from collections import Counter

import torch
from torch import nn

_REPEATS = 5
_WORTH = 1.05  # a packed weight must be this much faster to be taken: below it, timing noise would choose


class PackedLinear(nn.Module):
    """A float32 linear layer whose weight only oneDNN can read."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight_bytes = layer.weight.nbytes
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


class LayerTuner:
    """Replaces linear layers as they are loaded. `kernels` counts them by the kernel they got."""

    def __init__(self, rows: int) -> None:
        self._rows = rows  # of a typical input
        self._packing_pays: dict[torch.Size, bool] = {}
        self.kernels: Counter[str] = Counter()

    @torch.inference_mode()
    def tune(self, layer: nn.Module) -> nn.Module:
        """The layer to use instead of `layer`, or `layer` itself."""
        if type(layer) is not nn.Linear:
            return layer
        packed = PackedLinear(layer) if _can_pack(layer.weight) else None
        pays = packed is not None and self._pays(packed, layer)
        self.kernels["onednn" if pays else "torch"] += 1
        return packed if packed is not None and pays else layer

    def _pays(self, packed: PackedLinear, layer: nn.Linear) -> bool:
        shape = layer.weight.shape
        if shape not in self._packing_pays:
            x = torch.randn(self._rows, layer.in_features)
            self._packing_pays[shape] = _seconds(packed, x) * _WORTH < _seconds(layer, x)
        return self._packing_pays[shape]


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the weights that packed layers of a model hold beside its parameters."""
    return sum(module.weight_bytes for module in model.modules() if isinstance(module, PackedLinear))


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
