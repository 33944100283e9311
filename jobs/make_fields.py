"""make_fields.py OUT.npy: writes 64 smooth random fields, [64, 1, 64, 64] float32, always the same."""

import sys
from pathlib import Path

import numpy as np

SIDE = 64
_WAVES = 8  # in a field


def make_fields(count: int) -> np.ndarray:
    """[count, 1, 64, 64] float32: each a sum of waves in random directions. More fields begin with the same ones."""
    axis = np.arange(SIDE) / SIDE
    fields = np.empty((count, 1, SIDE, SIDE), np.float32)
    for number, field in enumerate(fields):
        random = np.random.default_rng(number)
        down, right = random.integers(-6, 7, (2, _WAVES, 1, 1))  # whole waves over the grid
        phase = random.uniform(0, 2 * np.pi, (_WAVES, 1, 1))
        height = random.normal(size=(_WAVES, 1, 1))
        angles = 2 * np.pi * (down * axis[:, None] + right * axis) + phase  # [waves, 64, 64]
        field[0] = (height * np.cos(angles)).sum(axis=0)
    return fields


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_fields.py OUT.npy")
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    np.save(sys.argv[1], make_fields(64))
