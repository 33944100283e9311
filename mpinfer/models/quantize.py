"""Int8 weights with int8 activations.

Weights have a scale for each output channel. Activations are quantized as they come, each row with a scale of its own,
so that what else is in the batch does not matter. mpinfer's kernel has a scale for every group of inputs, in both: then
SmolLM2 loses a third as much. Outliers would take a scale for themselves: inputs and weights are rotated by small
Hadamard matrices first, which spreads an outlier over its block and leaves the product as it was (after QuaRot,
Ashkboos et al. 2024). No calibration, and no model is known by name.
"""

from functools import cache

import torch
from torch import nn

from mpinfer.errors import ModelError
from mpinfer.models.kernels import Kernels, PackedWeights

_BLOCK = 64  # inputs that are rotated together; with 16, SmolLM2 loses 1.5 times as much, and 64 cost little more
_CHUNK_ROWS = 4096  # rows of a weight that are quantized at a time, to keep temporaries small


class Int8Linear(nn.Module):
    """A linear layer of int8 codes [out, in], packed by oneDNN, and float32 scales [out]; float32 in and out.

    Raises `ModelError` where torch has no such kernel.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        if layer.weight.device.type != "cpu" or not hasattr(torch.ops.onednn, "qlinear_prepack"):
            raise ModelError(
                f"model.quantize='int8' on {layer.weight.device}: needs a CPU for which torch has oneDNN; "
                "use model.quantize=none"
            )
        # Codes are 1 to 255, and 1 to 127 without VNNI, where two products are summed in 16 bits.
        self._levels = 127 if torch.cpu._is_vnni_supported() else 63
        self._rotation = hadamard(_largest_block(layer.in_features))
        self._in_features = layer.in_features
        codes, scales = quantize_rows(rotate(layer.weight, self._rotation))
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self._scales, self._zeros = scales, torch.zeros(len(scales), dtype=torch.int32)
        self._offset = codes.sum(1) * scales * -(self._levels + 1)  # of the code of 0: oneDNN's own way is slower
        self.bias = layer.bias
        self.weight_bytes = codes.nbytes + 3 * scales.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, steps = self._quantize(x.reshape(-1, self._in_features))
        y = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, self._packed, self._scales, self._zeros, self._offset, 1.0, 0, torch.float32, "none", [], ""
        )
        y.mul_(steps)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)

    def _quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 codes, in which 0 is `_levels` + 1, and the step of each row [rows, 1]."""
        rows = rotate(rows, self._rotation)
        steps = rows.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(self._levels)
        # oneDNN is fast for unsigned codes only, but torch converts faster to signed ones: the sum wraps around.
        return (rows * steps.reciprocal()).round_().to(torch.int8).view(torch.uint8).add_(self._levels + 1), steps


class CompiledInt8Linear(nn.Module):
    """The same by mpinfer's own kernel, for a CPU that has instructions for it and inputs that are a multiple of 8."""

    def __init__(self, layer: nn.Linear, kernels: Kernels) -> None:
        super().__init__()
        self._kernels, self.in_features, self._outputs = kernels, layer.in_features, layer.out_features
        self._block = _largest_block(layer.in_features)
        groups = rotate(layer.weight, hadamard(self._block)).split(kernels.int8_group, dim=1)
        codes, scales = zip(*map(quantize_rows, groups), strict=True)
        self._packed = kernels.pack_int8(torch.cat(codes, dim=1))
        self._scales = kernels.in_panels(torch.stack(scales, dim=1)).transpose(1, 2).flatten()
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        self._bias = kernels.in_panels(bias).flatten()
        self.weight_bytes = layer.weight.numel() + self._scales.nbytes + self._bias.nbytes

    @staticmethod
    def fits(layer: nn.Linear, kernels: Kernels | None) -> bool:
        return kernels is not None and kernels.int8_group > 0 and layer.in_features % 8 == 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        y = self._kernels.linear_int8(rows, self._block, self._packed, self._scales, self._bias, self._outputs)
        return y.view(*x.shape[:-1], -1)

    def packed(self) -> PackedWeights:
        packed, bias, scales = (tensor.data_ptr() for tensor in (self._packed, self._bias, self._scales))
        return PackedWeights(packed, bias, self.in_features, self._outputs, 0, self._block, scales)


class Int8Embedding(nn.Module):
    """An embedding table of int8 codes [entries, dimension] and float32 scales [entries, 1]."""

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()
        self._codes, scales = quantize_rows(layer.weight)
        self._scales = scales[:, None]
        self.weight_bytes = self._codes.nbytes + scales.nbytes

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._codes[ids] * self._scales[ids]


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of the shape of a matrix, and the float32 scale of each row."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    for part, own_codes, own_scales in zip(*(t.split(_CHUNK_ROWS) for t in (weight, codes, scales)), strict=True):
        torch.div(part.abs().amax(1), 127, out=own_scales).clamp_min_(torch.finfo(torch.float32).tiny)
        own_codes.copy_((part / own_scales[:, None]).round_())
    return codes, scales


def rotate(rows: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Every block of each row times the rotation; [rows, columns]."""
    return (rows.reshape(-1, len(rotation)) @ rotation).view(rows.shape)


@cache
def hadamard(size: int) -> torch.Tensor:
    """The orthogonal matrix of a power of two whose entries are all equally large (Sylvester's construction)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def _largest_block(features: int) -> int:
    """The largest power of two up to `_BLOCK` that divides the inputs."""
    return min(_BLOCK, features & -features)
