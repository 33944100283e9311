"""Linear layers in the form that this CPU computes fastest.

A general GEMM reorders its operands at every call. oneDNN can keep a weight reordered instead, which pays most
where a step has few rows. Whether it pays here is measured, shape by shape, as layers are loaded.
"""

import time
from collections import Counter

import torch
from torch import nn

from mpinfer.models.convolution import PackedConvolution
from mpinfer.models.kernels import Kernels
from mpinfer.models.quantize import Int8Embedding, Int8Linear

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
    """Replaces layers as they are loaded. `used` counts them by the kernel they got."""

    def __init__(self, rows: int, quantize: str = "none", kernels: Kernels | None = None) -> None:
        self._rows = rows  # of a typical input
        self._quantize, self._kernels = quantize, kernels
        self._packing_pays: dict[torch.Size, bool] = {}
        self.used: Counter[str] = Counter()

    @torch.inference_mode()
    def tune(self, layer: nn.Module) -> nn.Module:
        """The layer to use instead of `layer`, or `layer` itself."""
        if self._quantize == "int8":
            return self._to_int8(layer)
        if type(layer) is not nn.Linear:
            return layer
        packed = PackedLinear(layer) if _can_pack(layer.weight) else None
        pays = packed is not None and self._pays(packed, layer)
        self.used["onednn" if pays else "torch"] += 1
        return packed if packed is not None and pays else layer

    def _to_int8(self, layer: nn.Module) -> nn.Module:
        quantized: nn.Module = layer
        if type(layer) is nn.Linear:
            quantized = Int8Linear(layer, self._kernels)
        elif type(layer) is nn.Embedding:
            quantized = Int8Embedding(layer)
        elif not any(p.dim() > 1 for p in layer.parameters(recurse=False)):
            return layer  # a norm, or a module of modules: nothing to compress
        self.used["torch" if quantized is layer else "int8"] += 1
        return quantized

    def _pays(self, packed: PackedLinear, layer: nn.Linear) -> bool:
        shape = layer.weight.shape
        if shape not in self._packing_pays:
            x = torch.randn(self._rows, layer.in_features)
            self._packing_pays[shape] = _seconds(packed, x) * _WORTH < _seconds(layer, x)
        return self._packing_pays[shape]


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the weights that packed and quantized layers of a model hold beside its parameters."""
    kinds = (PackedLinear, PackedConvolution, Int8Linear, Int8Embedding)
    return sum(module.weight_bytes for module in model.modules() if isinstance(module, kinds))


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
