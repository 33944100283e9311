"""Cut a list of blocks into contiguous stages, for ranks that may differ in speed and memory."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from math import inf

Interval = tuple[int, int]  # both ends included

_EXACT = 1e-12  # relative: where the search for the least bottleneck ends


class DoesNotFit(ValueError):
    """There are too few blocks, or no cut leaves every stage within its memory."""


def partition(
    costs: Sequence[float],
    speeds: Sequence[float],
    bytes_of: Callable[[int, int], int] = lambda start, stop: 0,
    limits: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """Cuts (0, c1, ..., n) into one non-empty stage for each of `speeds`, in that order, such that the slowest one (its
    blocks' costs over its speed) is as fast as possible.

    `bytes_of(start, stop)`: what blocks [start, stop) hold, no less with more blocks; stage s may hold `limits[s]`.

    Exact: for a given bottleneck the cuts that are within reach of the first stages are a few intervals, by dynamic
    programming over the stages; the least bottleneck that reaches the end is found by bisection. Among equal optima the
    one whose earlier stages are fullest. Raises `DoesNotFit`.
    """
    blocks, stages = len(costs), len(speeds)
    if not 1 <= stages <= blocks:
        raise DoesNotFit(f"{blocks} blocks cannot make {stages} non-empty stages")
    search = _Search(costs, speeds, bytes_of, limits or [inf] * stages)
    best = search.cuts(inf)
    if best is None:
        raise DoesNotFit(f"no cut of {blocks} blocks into {stages} stages leaves each within its memory")
    low, high = 0.0, search.bottleneck(best)
    while high - low > _EXACT * high:
        middle = (low + high) / 2
        cuts = search.cuts(middle)
        if cuts is None:
            low = middle
        else:
            best, high = cuts, search.bottleneck(cuts)
    return best


def part_costs(costs: Sequence[float], cuts: Sequence[int]) -> list[float]:
    return [sum(costs[start:stop]) for start, stop in pairwise(cuts)]


class _Search:
    def __init__(
        self,
        costs: Sequence[float],
        speeds: Sequence[float],
        bytes_of: Callable[[int, int], int],
        limits: Sequence[float],
    ) -> None:
        self._costs, self._speeds, self._bytes_of, self._limits = costs, speeds, bytes_of, limits
        self._before = [0.0, *accumulate(costs)]
        self._costliest = max(costs)
        self._sizes = [bytes_of(block, block + 1) for block in range(len(costs))]
        self._largest = max(self._sizes)
        self._unlimited = all(limit >= bytes_of(0, len(costs)) for limit in limits)

    def bottleneck(self, cuts: Sequence[int]) -> float:
        return max(self._seconds(*ends, stage) for stage, ends in enumerate(pairwise(cuts)))

    def cuts(self, most: float) -> tuple[int, ...] | None:
        """Cuts whose stages take at most so long each, if there are any."""
        blocks, stages = len(self._costs), len(self._speeds)
        ends: list[list[Interval]] = [[(0, 0)]]  # of the first stages: where they can end
        for stage in range(stages):
            last = blocks - (stages - stage - 1)  # the stages behind need a block each
            reached: list[Interval] = []
            for first, stop in self._starts(ends[-1], stage, most):
                # Every start in between reaches its next block at least, so there are no gaps.
                furthest = min(self._reach(stop, stage, most), last)
                if reached and first + 1 <= reached[-1][1] + 1:
                    reached[-1] = (reached[-1][0], max(reached[-1][1], furthest))
                elif first + 1 <= furthest:
                    reached.append((first + 1, furthest))
            if not reached:
                return None
            ends.append(reached)
        if ends[-1][-1][1] < blocks:
            return None
        cuts = [blocks]
        for reached in reversed(ends[:-1]):
            cuts.append(max(min(stop, cuts[-1] - 1) for start, stop in reached if start < cuts[-1]))
        return tuple(reversed(cuts))

    def _starts(self, ends: Sequence[Interval], stage: int, most: float) -> Iterator[Interval]:
        """The intervals without the blocks that alone are too much for a stage."""
        limit, speed, blocks = self._limits[stage], self._speeds[stage], len(self._costs)
        if self._costliest / speed <= most and self._largest <= limit:
            yield from ends
            return
        for first, last in ends:
            start = first
            for block in range(first, min(last, blocks - 1) + 1):
                if self._costs[block] / speed > most or self._sizes[block] > limit:
                    if start < block:
                        yield start, block - 1
                    start = block + 1
            if start <= last:
                yield start, last

    def _reach(self, start: int, stage: int, most: float) -> int:
        """The last end of a stage that starts there."""
        blocks = len(self._costs)
        if start >= blocks:
            return start
        by_time = bisect_right(self._before, self._before[start] + most * self._speeds[stage]) - 1
        by_time = max(start, min(by_time, blocks))
        # What was rounded in the sum decides as in `bottleneck`.
        while by_time < blocks and self._seconds(start, by_time + 1, stage) <= most:
            by_time += 1
        while by_time > start and self._seconds(start, by_time, stage) > most:
            by_time -= 1
        if self._unlimited:
            return by_time
        ends = range(start, by_time + 1)
        return start + bisect_right(ends, self._limits[stage], key=lambda stop: self._bytes_of(start, stop)) - 1

    def _seconds(self, start: int, stop: int, stage: int) -> float:
        return (self._before[stop] - self._before[start]) / self._speeds[stage]
