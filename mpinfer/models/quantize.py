"""Int8 weights with int8 activations.

Weights have one scale per output channel. Activations are quantized row by row as they come, to uint8 with a scale
and an offset, as in LLM.int8 (Dettmers 2022): what else is in the batch does not matter. There, too, outliers are
what hurts: a row whose range is wide against its root mean square gets a second int8 pass over what the first one
rounded away. That is decided for each row from the row alone, and needs no calibration.
"""

import torch
from torch import nn

from mpinfer.errors import ModelError

_WIDE = 14.0  # range / root mean square from which a row gets a second pass; a normal row of 576 values has about 6
_CHUNK_ROWS = 4096  # rows of a weight that are quantized at a time, to keep temporaries small


class Int8Linear(nn.Module):
    """A linear layer of int8 codes [out, in], packed by oneDNN, and float32 scales [out]; float32 in and out."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        _check_kernel(layer.weight)
        codes, scales = quantize_rows(layer.weight)
        self.weight_bytes = codes.nbytes + 3 * scales.nbytes
        self._in_features = layer.in_features
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self._scales = scales
        self._zeros = torch.zeros(len(scales), dtype=torch.int32)
        self._sums = codes.sum(1) * scales  # what an activation of 1 everywhere gives, [out]
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self._in_features)
        codes, scale, low = _encode(rows)
        y = self._product(codes, scale, low)
        root_mean_square = rows.square().mean(1, keepdim=True).sqrt_()
        wide = (scale * 255 > root_mean_square * _WIDE).flatten().nonzero().flatten()
        if len(wide):
            rounded_away = rows[wide] - torch.addcmul(low[wide], codes[wide], scale[wide])
            y.index_add_(0, wide, self._product(*_encode(rounded_away)))
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)

    def _product(self, codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """(scale * codes + low) times the weight, [rows, out]; a sum of integers until the scales come in."""
        y = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, self._packed, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.mul_(scale).addcmul_(low, self._sums)


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


def _encode(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 codes [rows, in], scale and low [rows, 1], so that scale * codes + low is close to the rows."""
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    scale = ((high - low) / 255).clamp_min_(torch.finfo(torch.float32).tiny)
    return ((rows - low) / scale).round_().to(torch.uint8), scale, low


def _check_kernel(weight: torch.Tensor) -> None:
    """Without VNNI, 8-bit products overflow a 16-bit sum on x86; elsewhere torch has no such kernel."""
    if weight.device.type != "cpu" or not torch.cpu._is_vnni_supported():
        raise ModelError(
            f"model.quantize='int8' on {weight.device.type}: needs a CPU with AVX-512 VNNI; use model.quantize=none"
        )
