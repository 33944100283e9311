"""A small U-Net over a field on a grid, in plain torch: a factory for `model.path`.

    python jobs/unet.py models/unet/weights.safetensors

writes its weights. They are drawn from a seed: the model is for trying things out and has learned nothing.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

SEED = 0
_CHANNELS = (64, 128, 256)  # by level, from fine to coarse


def build() -> nn.Module:
    """The model with its weights: fields [batch, 1, 64, 64] to [batch, 2, 64, 64]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = UNet()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # as if trained: those of a new one change nothing
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.2, 0.4)
    return model


def write_weights(path: str | Path) -> None:
    """Write the weights of `build` as safetensors; the folder is made."""
    from safetensors.torch import save_file

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(build().state_dict(), path)


class UNet(nn.Module):
    """Down and up again; on the way up each level sees what it was on the way down."""

    def __init__(self) -> None:
        super().__init__()
        fine, middle, coarse = _CHANNELS
        self.down = nn.ModuleList([_double_conv(1, fine), _double_conv(fine, middle), _double_conv(middle, coarse)])
        self.widen = nn.ModuleList([nn.ConvTranspose2d(coarse, middle, 2, 2), nn.ConvTranspose2d(middle, fine, 2, 2)])
        self.up = nn.ModuleList([_double_conv(2 * middle, middle), _double_conv(2 * fine, fine)])
        self.head = nn.Conv2d(fine, 2, 1)

    def forward(self, field: torch.Tensor) -> torch.Tensor:
        x = self.down[0](field)
        skips = []
        for down in self.down[1:]:
            skips.append(x)
            x = down(functional.max_pool2d(x, 2))
        for widen, up in zip(self.widen, self.up, strict=True):
            x = up(torch.cat([skips.pop(), widen(x)], dim=1))
        return self.head(x)


def _double_conv(channels: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (channels, out):
        layers += [nn.Conv2d(size, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: unet.py OUT.safetensors")
    write_weights(sys.argv[1])
