"""Cut a list of blocks into contiguous stages."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def partition(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cuts (0, c1, ..., n) such that the costliest of `stages` non-empty contiguous parts is as cheap as possible.

    Exact, by dynamic programming over prefixes in O(stages * n^2); among equal optima the one whose earlier
    stages are fullest, so the answer is deterministic. Raises `ValueError` when there are fewer blocks than stages.
    """
    blocks = len(costs)
    if not 1 <= stages <= blocks:
        raise ValueError(f"{blocks} blocks cannot make {stages} non-empty stages")
    prefix = [0.0, *accumulate(costs)]
    best = [[float("inf")] * (blocks + 1) for _ in range(stages + 1)]
    last_cut = [[0] * (blocks + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for stage in range(1, stages + 1):
        for stop in range(stage, blocks + 1):
            for start in range(stop - 1, stage - 2, -1):
                here = prefix[stop] - prefix[start]
                if here >= best[stage][stop]:
                    break  # parts only grow as the cut moves left
                slowest = max(best[stage - 1][start], here)
                if slowest < best[stage][stop]:
                    best[stage][stop] = slowest
                    last_cut[stage][stop] = start
    cuts = [blocks]
    for stage in range(stages, 0, -1):
        cuts.append(last_cut[stage][cuts[-1]])
    return tuple(reversed(cuts))


def part_costs(costs: Sequence[float], cuts: Sequence[int]) -> list[float]:
    return [sum(costs[start:stop]) for start, stop in pairwise(cuts)]
