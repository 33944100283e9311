"""Linear layers in the form that this CPU computes fastest.

A general GEMM reorders its operands at every call. oneDNN, or a kernel of our own, can keep a weight reordered instead,
which pays most where a step has few rows. Which is fastest here is measured, shape by shape, as layers are loaded.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import nn

from mpinfer.models.convolution import PackedConvolution
from mpinfer.models.kernels import Kernels, PackedWeights
from mpinfer.models.quantize import CompiledInt8Linear, Int8Embedding, Int8Linear

_REPEATS = 5
_WORTH = 1.2  # another than the first must be this much faster to be taken: below it, timing noise would choose


class PackedLinear(nn.Module):
    """A float32 linear layer whose weight only oneDNN can read."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight_bytes = layer.weight.nbytes
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


class CompiledLinear(nn.Module):
    """A float32 linear layer in the form that mpinfer's own kernel reads."""

    def __init__(self, layer: nn.Linear, kernels: Kernels) -> None:
        super().__init__()
        self._kernels, self.in_features, self._outputs = kernels, layer.in_features, layer.out_features
        bias = None if layer.bias is None else layer.bias.detach()
        self._packed, self._bias, self._parts = kernels.pack(layer.weight.detach(), bias)
        self.weight_bytes = layer.weight.nbytes + (0 if bias is None else bias.nbytes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear(x, self._packed, self._bias, self._parts, self._outputs)

    def packed(self) -> PackedWeights:
        packed, bias = self._packed.data_ptr(), self._bias.data_ptr()
        return PackedWeights(packed, bias, self.in_features, self._outputs, self._parts)


Makers = dict[str, Callable[[nn.Linear], nn.Module]]
"""What can be made of a layer, by kernel."""


class LayerTuner:
    """Replaces layers as they are loaded. `used` counts them by the kernel they got."""

    def __init__(self, rows: int, quantize: str = "none", kernels: Kernels | None = None) -> None:
        self._rows = rows  # of a typical input
        self._quantize, self._kernels = quantize, kernels
        self._best: dict[torch.Size, str] = {}  # kernel, by shape of the weight
        self.used: Counter[str] = Counter()

    @torch.inference_mode()
    def tune(self, layer: nn.Module) -> nn.Module:
        """The layer to use instead of `layer`, or `layer` itself."""
        if type(layer) is nn.Linear:
            makers = self._int8_makers(layer) if self._quantize == "int8" else self._makers(layer)
            if layer.weight.shape not in self._best:
                self._best[layer.weight.shape] = self._fastest(layer, makers)
            best = self._best[layer.weight.shape]
            self.used[best] += 1
            return makers[best](layer)
        if self._quantize != "int8" or not any(p.dim() > 1 for p in layer.parameters(recurse=False)):
            return layer  # a norm, or a module of modules: nothing to compress
        if type(layer) is nn.Embedding:
            self.used["int8 table"] += 1
            return Int8Embedding(layer)
        self.used["torch"] += 1
        return layer

    def _makers(self, layer: nn.Linear) -> Makers:
        makers: Makers = {}
        plain = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
        if plain and (kernels := self._kernels) is not None:  # first, as only so can layers be computed whole
            makers["mpinfer"] = lambda layer: CompiledLinear(layer, kernels)
        makers["torch"] = lambda layer: layer
        if plain and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            makers["onednn"] = PackedLinear
        return makers

    def _int8_makers(self, layer: nn.Linear) -> Makers:
        makers: Makers = {}
        if (kernels := self._kernels) is not None and CompiledInt8Linear.fits(layer, kernels):
            makers["mpinfer int8"] = lambda layer: CompiledInt8Linear(layer, kernels)
        makers["onednn int8"] = Int8Linear
        return makers

    def _fastest(self, layer: nn.Linear, makers: Makers) -> str:
        """The first of them, unless another is clearly faster."""
        first = next(iter(makers))
        if len(makers) == 1:
            return first
        x = torch.randn(self._rows, layer.in_features)
        seconds = _seconds({name: make(layer) for name, make in makers.items()}, x)
        best = min(seconds, key=lambda name: seconds[name])
        return best if seconds[best] * _WORTH < seconds[first] else first


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the weights that packed and quantized layers of a model hold beside its parameters."""
    kinds = (PackedLinear, CompiledLinear, PackedConvolution, Int8Linear, CompiledInt8Linear, Int8Embedding)
    return sum(module.weight_bytes for module in model.modules() if isinstance(module, kinds))


def _seconds(layers: Mapping[str, nn.Module], x: torch.Tensor) -> dict[str, float]:
    """The fastest call of each, after one that warms up; by turns, so that all have their share of quiet moments."""
    best_s = dict.fromkeys(layers, float("inf"))
    for _ in range(1 + _REPEATS):
        for name, layer in layers.items():
            started = time.perf_counter()
            layer(x)
            best_s[name] = min(best_s[name], time.perf_counter() - started)
    return best_s
