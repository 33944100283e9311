"""make_program.py DIR: writes DIR/program.pt2, an MLP-Mixer over a field, as `torch.export` saves it.

It takes batches of any size, and stands for a model that comes without its code. Its weights are drawn from a seed:
it has learned nothing.
"""

import sys
from pathlib import Path

import torch
from torch import nn

SEED = 0
_PATCH, _TOKENS, _WIDTH, _LAYERS = 8, 64, 96, 4


def build() -> nn.Module:
    """The module with its weights: fields [batch, 1, 64, 64] to "features" [batch, 96] and "scores" [batch, 10]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Mixer()


def write_program(directory: str | Path) -> Path:
    """Export the module to `directory`/program.pt2; the folder is made. Returns the path."""
    path = Path(directory, "program.pt2")
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = torch.export.Dim("batch")
    program = torch.export.export(build().eval(), (torch.zeros(3, 1, 64, 64),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, _WIDTH, _PATCH, _PATCH)
        self.layers = nn.ModuleList(_MixerLayer() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, 10)

    def forward(self, field: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.patches(field).flatten(2).transpose(1, 2)  # [batch, tokens, width]
        for layer in self.layers:
            x = layer(x)
        features = self.norm(x).mean(dim=1)
        return {"features": features, "scores": self.head(features)}


class _MixerLayer(nn.Module):
    """Mixes the tokens of each channel, then the channels of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.token_norm, self.tokens = nn.LayerNorm(_WIDTH), _mlp(_TOKENS)
        self.channel_norm, self.channels = nn.LayerNorm(_WIDTH), _mlp(_WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.channel_norm(x))


def _mlp(size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_program.py DIR")
    write_program(sys.argv[1])
