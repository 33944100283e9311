"""How long records take, as a histogram of a fixed size."""

import math
from itertools import accumulate

_A_DOUBLING = 16  # classes: 4 % wide
_LEAST_S, _DOUBLINGS = 2.0**-20, 44  # from a microsecond to half a year
_PERCENTILES = (50, 90, 99)


class Latency:
    def __init__(self) -> None:
        self._counts = [0] * (_A_DOUBLING * _DOUBLINGS)
        self._longest_s = 0.0

    def add(self, seconds: float) -> None:
        place = int(_A_DOUBLING * math.log2(max(seconds / _LEAST_S, 1.0)))
        self._counts[min(place, len(self._counts) - 1)] += 1
        self._longest_s = max(self._longest_s, seconds)

    def summary(self) -> dict[str, float] | None:
        """Percentiles, to a class, and the longest; None where there was no record."""
        total = sum(self._counts)
        if not total:
            return None
        return {
            **{f"p{share}": self._percentile(share / 100 * total) for share in _PERCENTILES},
            "max": self._longest_s,
        }

    def _percentile(self, rank: float) -> float:
        place = next(place for place, below in enumerate(accumulate(self._counts)) if below >= rank)
        return min(_LEAST_S * 2 ** ((place + 1) / _A_DOUBLING), self._longest_s)
