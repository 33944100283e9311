"""EfficientNet-Lite0, an image classifier, in plain torch: a factory for `model.path`.

Its names are those of the weights that launch/fetch_efficientnet.sh fetches. They were trained with the padding of
TensorFlow, which for strides of 2 is uneven: one more at the right and bottom than at the left and top.
"""

import torch
from torch import nn
from torch.nn import functional

IMAGE = 224  # pixels of a side
CLASSES = 1000
# How often, kernel, stride of the first, expansion, channels in, channels out.
_STAGES = [
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
]


def build() -> nn.Module:
    """The model with random weights: images [batch, 3, 224, 224] to logits [batch, 1000]."""
    return EfficientNetLite0()


class EfficientNetLite0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, 32, 3, stride=2, image=IMAGE)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList()
        image = IMAGE // 2
        for repeats, kernel, first_stride, expansion, channels, out in _STAGES:
            for repeat in range(repeats):
                stride = 1 if repeat else first_stride
                self._blocks.append(_MBConv(out if repeat else channels, out, expansion, kernel, stride, image))
                image //= stride
        self._conv_head = _SameConv(320, 1280, 1, image=image)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = functional.relu6(self._bn0(self._conv_stem(image)))
        for block in self._blocks:
            x = block(x)
        x = functional.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))


class _MBConv(nn.Module):
    """An inverted bottleneck: widen, filter each channel by itself, narrow; added to its input where shapes agree."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int, image: int) -> None:
        super().__init__()
        wide = channels * expansion
        self._widens = expansion > 1
        self._adds = stride == 1 and channels == out
        if self._widens:
            self._expand_conv = _SameConv(channels, wide, 1, image=image)
            self._bn0 = _norm(wide)
        self._depthwise_conv = _SameConv(wide, wide, kernel, stride=stride, groups=wide, image=image)
        self._bn1 = _norm(wide)
        self._project_conv = _SameConv(wide, out, 1, image=image // stride)
        self._bn2 = _norm(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self._widens else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self._adds else y


class _SameConv(nn.Conv2d):
    """A convolution of images of a known side, padded so that a side of n becomes one of n / stride."""

    def __init__(self, channels: int, out: int, kernel: int, *, image: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)
        total = max((-(-image // stride) - 1) * stride + kernel - image, 0)
        before, after = total // 2, total - total // 2
        self._pads = (before, after, before, after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(functional.pad(x, self._pads) if any(self._pads) else x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
