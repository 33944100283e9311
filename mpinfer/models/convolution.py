"""Convolutions with what follows them, in the form that this CPU computes fastest.

A norm with fixed statistics is a factor and an offset by channel, so it goes into the weights; oneDNN computes the
activation along with the convolution, and keeps the weights in its own layout. Channels last, it reorders no operand.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

_ATEN = torch.ops.aten
_CONVOLUTION, _NORM = _ATEN.conv2d.default, _ATEN.batch_norm.default
_ACTIVATIONS: dict[Any, str] = {
    _ATEN.relu.default: "relu",
    _ATEN.relu6.default: "hardtanh",
    _ATEN.silu.default: "swish",
    _ATEN.hardswish.default: "hardswish",
}
_RELU6 = [0.0, 6.0]


@dataclass
class Group:
    """A convolution of a graph, and the operations behind it that are computed with it."""

    convolution: Any  # nodes of the graph
    norm: Any
    activation: Any

    @property
    def last(self) -> Any:
        return self.activation or self.norm or self.convolution

    @property
    def tensors(self) -> list[fx.Node]:
        """Weight and bias of the convolution; weight, bias, mean and variance of the norm: those that there are."""
        given = [*self.convolution.args[1:3], *(self.norm.args[1:5] if self.norm else ())]
        return [node for node in given if isinstance(node, fx.Node)]


def find_groups(graph: fx.Graph) -> list[Group]:
    """Convolutions of images with weights that come from outside of the graph."""
    groups = []
    for node in graph.find_nodes(op="call_function", target=_CONVOLUTION):
        if node.kwargs or not _are_held(node.args[1:3]):
            continue
        norm = _only_user(node, {_NORM})
        if norm is not None and (norm.kwargs or norm.args[5] or not _are_held(norm.args[1:5])):
            norm = None
        groups.append(Group(node, norm, _only_user(norm or node, _ACTIVATIONS.keys())))
    return groups


def can_pack(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


class PackedConvolution(nn.Module):
    """A group whose weight only oneDNN can read: float32 images in, channels last out."""

    def __init__(self, group: Group, tensors: dict[fx.Node, torch.Tensor]) -> None:
        super().__init__()
        given: Any = group.convolution.args[1:]
        weight, bias, stride, padding, dilation, groups = list(given) + _DEFAULTS[len(given) :]
        folded, offset = tensors[weight], None if bias is None else tensors[bias]
        if group.norm is not None:
            folded, offset = _fold(folded, offset, group.norm, tensors)
        self._settings = (_pair(padding), _pair(stride), _pair(dilation), groups)
        self._activation = "none" if group.activation is None else _ACTIVATIONS[group.activation.target]
        self._limits = _RELU6 if self._activation == "hardtanh" else []
        self.weight_bytes = folded.nbytes
        self._packed = torch.ops.mkldnn._reorder_convolution_weight(folded.contiguous(), *self._settings, None)
        self.register_buffer("bias", offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, self.bias, *self._settings, self._activation, self._limits, ""
        )


_DEFAULTS: list[Any] = [None, None, 1, 0, 1, 1]  # of weight, bias, stride, padding, dilation and groups


def _fold(
    weight: torch.Tensor, bias: Any, norm: Any, tensors: dict[fx.Node, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution that norms its result, in double precision on the way."""
    scale, shift, mean, variance = (None if source is None else tensors[source].double() for source in norm.args[1:5])
    assert mean is not None
    assert variance is not None
    factor = (variance + norm.args[7]).rsqrt() * (1.0 if scale is None else scale)
    offset = (0.0 if bias is None else bias.double()) - mean
    folded = weight.double() * factor[:, None, None, None]
    return folded.float(), (offset * factor + (0.0 if shift is None else shift)).float()


def _are_held(sources: Any) -> bool:
    """Whether the graph gets these from outside, as far as they are there."""
    return all(source.op in ("get_attr", "placeholder") for source in sources if source is not None)


def _only_user(node: fx.Node, targets: Any) -> Any:
    """Whoever uses a value, if it is alone and does one of these."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.op != "call_function" or user.target not in targets or user.args[0] is not node:
        return None
    return user


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values
