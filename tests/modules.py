"""Modules that tests run by their names."""

import numpy as np
import torch
from torch import nn


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def linear_of(rows: np.ndarray) -> np.ndarray:
    """What `linear` gives in a run, where every factory is called with the same seed."""
    torch.manual_seed(0)
    with torch.no_grad():
        return linear()(torch.from_numpy(rows)).numpy()


def deep() -> nn.Module:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(576, 5))


def wide() -> nn.Module:
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))


class _Looks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def looks_at_its_numbers() -> nn.Module:
    return _Looks()
