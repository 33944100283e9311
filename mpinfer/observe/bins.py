"""Amounts over time in a bounded number of bins: as exact at the end of a long run as of a short one, only coarser."""

from array import array
from collections.abc import Iterable
from operator import add
from typing import Any

FIRST_WIDTH_S = 2.0**-10
"""A power of two: after any number of doublings an edge is still exact."""


class Bins:
    """Rows of `count` bins. When time runs past the last one, neighbours are merged and all are twice as wide."""

    def __init__(self, rows: int, count: int) -> None:
        self.width_s, self._count = FIRST_WIDTH_S, count
        self.rows = [array("d", bytes(8 * count)) for _ in range(rows)]

    def add(self, row: int, start_s: float, end_s: float) -> None:
        """A stretch of time, shared out to the bins that it lies in."""
        last = self._bin(end_s)
        first = int(start_s / self.width_s)
        amounts, width_s = self.rows[row], self.width_s
        if first == last:
            amounts[last] += end_s - start_s
            return
        amounts[first] += (first + 1) * width_s - start_s
        for between in range(first + 1, last):
            amounts[between] += width_s
        amounts[last] += end_s - last * width_s

    def count(self, row: int, at_s: float) -> None:
        """Something that happened once."""
        place = self._bin(at_s)
        self.rows[row][place] += 1

    def sums(self) -> list[float]:
        return [sum(row) for row in self.rows]

    def widen(self, width_s: float) -> None:
        """To a width that doubling leads to."""
        while self.width_s < width_s:
            self._merge()

    def to_dict(self, per_unit: float = 1.0) -> dict[str, Any]:
        """Whole numbers of units, for JSON: 1e6 makes microseconds of seconds. Bins at the end in which nothing
        happened are left out."""
        used = max((n for row in self.rows for n, amount in enumerate(row, start=1) if amount), default=0)
        return {
            "bin_s": self.width_s,
            "rows": [[round(amount * per_unit) for amount in row[:used]] for row in self.rows],
        }

    @classmethod
    def from_dict(cls, tree: dict[str, Any], count: int, per_unit: float = 1.0) -> "Bins":
        bins = cls(len(tree["rows"]), max(count, *map(len, tree["rows"])))
        bins.width_s = tree["bin_s"]
        for row, amounts in zip(bins.rows, tree["rows"], strict=True):
            row[: len(amounts)] = _doubles(amount / per_unit for amount in amounts)
        return bins

    def _bin(self, at_s: float) -> int:
        while (place := int(at_s / self.width_s)) >= self._count:
            self._merge()
        return place

    def _merge(self) -> None:
        for number, row in enumerate(self.rows):
            merged = _doubles(map(add, row[0::2], row[1::2]))
            self.rows[number] = merged + array("d", bytes(8 * (self._count - len(merged))))
        self.width_s *= 2


def _doubles(values: Iterable[float]) -> "array[float]":
    return array("d", values)
