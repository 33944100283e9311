"""Modules that tests run by their names."""

import resource
from pathlib import Path

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


class _Hungry(nn.Module):
    """Needs half a gigabyte for each record of a batch, for a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        room = torch.empty(x.shape[0], 2**29, dtype=torch.int8)
        return self.last(x + (0 * room[:, :8]).to(x.dtype))


def hungry() -> nn.Module:
    """Of eight records four get their memory at a time."""
    _limit_memory(3)
    return _Hungry()


class _Greedy(nn.Module):
    """Needs as many gigabytes as the sum of a batch's numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.empty(int(x.sum()) << 30, dtype=torch.int8)
        return x


def greedy() -> nn.Module:
    _limit_memory(6)
    return _Greedy()


def _limit_memory(gigabytes: int) -> None:
    """Of address space, beyond what this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (gigabytes << 30),) * 2)
