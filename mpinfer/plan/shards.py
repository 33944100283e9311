"""How heads, columns and tokens are divided over the shards of a stage: in whole units, evenly or not."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import floor

from mpinfer.errors import PlanError

_ALIGNMENTS = (64, 16)  # columns that kernels take at a time, and that int8 rotates together
_LEAST_BLOCKS = 4  # of aligned columns for each shard: fewer would divide too coarsely


def split(units: int, shares: Sequence[float], align: int = 1) -> list[range]:
    """Units [0, units) in order, a range for each share and about in proportion; all but the last end on a multiple of
    `align`. Raises `PlanError` when not every share can have `align` units, or the rest."""
    blocks, parts = -(-units // align), len(shares)
    if blocks < parts:
        raise PlanError(
            f"{units} units in blocks of {align}: cannot be divided over {parts} shards, each needs one; use at most "
            f"{blocks} shards"
        )
    cuts = [0]
    for part, reached in enumerate(accumulate(shares), start=1):
        nearest = floor(blocks * reached / sum(shares) + 0.5)
        cuts.append(min(max(nearest, cuts[-1] + 1), blocks - (parts - part)))
    cuts[-1] = blocks
    return [range(start * align, min(stop * align, units)) for start, stop in pairwise(cuts)]


def split_evenly(units: int, parts: int) -> list[range]:
    """Units divided into parts as equal as may be; aligned where there are enough of them. Raises `PlanError`."""
    align = next((a for a in _ALIGNMENTS if units >= _LEAST_BLOCKS * parts * a), 1)
    return split(units, [1] * parts, align)
