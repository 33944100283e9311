"""What two runs of the same records have in common: tokens, labels and numbers, record by record."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpinfer.records.files import RESULTS

if TYPE_CHECKING:  # numpy loads only where arrays are
    import numpy as np

# What another order of the same sums may change, by model.dtype: numbers, relative to the largest of their kind; and
# between the log-probabilities of two tokens, of which then either may be taken.
ERROR_BOUND = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
TIE_BOUND = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
DIVERGED_SHARE = 0.01  # of records that may leave the reference where ties cannot be told: sampled tokens


@dataclass(frozen=True)
class Divergence:
    """Where the tokens of a record leave the reference's."""

    index: int
    sample: int
    ours: list[int]  # up to the first token that differs
    reference: list[int]


@dataclass
class Comparison:
    """Sums over the records that both runs have."""

    records: int = 0
    same_records: int = 0  # in every word and every bit
    tokens: int = 0  # of the reference
    same_tokens: int = 0  # before a record's first difference
    labels: int = 0
    same_labels: int = 0
    unlike: list[int] = field(default_factory=list)  # records of which only one is an error, or of other shapes
    divergences: list[Divergence] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)  # by what it is: the largest difference
    largest: dict[str, float] = field(default_factory=dict)  # and the largest number of the reference

    @property
    def is_identical(self) -> bool:
        return self.same_records == self.records

    @property
    def largest_error(self) -> float | None:
        """Of any number, relative to the largest of its kind; None where there are no numbers."""
        relative = [error / (self.largest[name] or 1.0) for name, error in self.errors.items()]
        return max(relative, default=None)


@dataclass(frozen=True)
class _Outcome:
    """A record's result in a form that can be compared."""

    error: bool
    tokens: list[list[int]]  # of each sample
    label: str | None
    numbers: dict[str, Any]  # lists, arrays, or by label


def compare(directory: Path, reference: Path) -> Comparison:
    """Hold the results of a run against those of the reference; of runs of different length, the records of both."""
    found = Comparison()
    pairs = zip(_outcomes(directory), _outcomes(reference), strict=False)
    for index, (ours, theirs) in enumerate(pairs):
        found.records += 1
        if ours.error or theirs.error:
            same = ours.error == theirs.error
            found.unlike += [] if same else [index]
        else:
            same = _compare_words(found, index, ours, theirs)
            same &= _compare_numbers(found, index, ours, theirs)
        found.same_records += same
    return found


def perplexity(directory: Path) -> float | None:
    """Of the continuations that a run of `score` was given; None where it scored no token."""
    logprobs: list[float] = []
    for result in _results(directory):
        for score in result.get("output", {}).get("scores", []):
            logprobs += score["token_logprobs"]
    return math.exp(-math.fsum(logprobs) / len(logprobs)) if logprobs else None


def _compare_words(found: Comparison, index: int, ours: _Outcome, theirs: _Outcome) -> bool:
    found.labels += theirs.label is not None
    found.same_labels += theirs.label is not None and ours.label == theirs.label
    if len(ours.tokens) != len(theirs.tokens):
        found.unlike.append(index)
        return False
    for sample, (own, other) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own, other, strict=False)))
        found.tokens += len(other)
        found.same_tokens += common
        if own != other:
            found.divergences.append(Divergence(index, sample, own[: common + 1], other[: common + 1]))
    return ours.tokens == theirs.tokens and ours.label == theirs.label


def _compare_numbers(found: Comparison, index: int, ours: _Outcome, theirs: _Outcome) -> bool:
    import numpy as np

    same = ours.numbers.keys() == theirs.numbers.keys()
    for name in theirs.numbers:
        other = theirs.numbers[name]
        own = ours.numbers.get(name)
        if isinstance(other, dict) and isinstance(own, dict):
            own, other = _by_label(own, other)
        own, other = np.asarray(own, np.float64), np.asarray(other, np.float64)
        if own.shape != other.shape:
            found.unlike.append(index)
            same = False
            continue
        both = np.isnan(own) & np.isnan(other) | (own == other)
        difference = np.where(both, 0.0, np.nan_to_num(np.abs(own - other), nan=np.inf))
        finite = np.abs(other[np.isfinite(other)])
        found.errors[name] = max(found.errors.get(name, 0.0), float(difference.max(initial=0.0)))
        found.largest[name] = max(found.largest.get(name, 0.0), float(finite.max(initial=0.0)))
        same &= bool(both.all())
    return same


def _by_label(ours: dict[str, float], theirs: dict[str, float]) -> tuple[list[float], list[float]]:
    """Scores of the reference's labels; who does not list one gives it at most the least that it lists."""
    least = min(ours.values())
    return [ours.get(label, min(least, score)) for label, score in theirs.items()], list(theirs.values())


def _outcomes(directory: Path) -> "Iterator[_Outcome]":
    files = lru_cache(maxsize=8)(lambda name: _array(directory / name))  # rows of a file follow one another, mostly
    for result in _results(directory):
        output = result.get("output")
        if output is None:
            yield _Outcome(True, [], None, {})
            continue
        samples = output.get("samples", [output] if "token_ids" in output else [])
        numbers: dict[str, Any] = {}
        if "top" in output:
            numbers["score"] = dict(output["top"])
        elif "scores" in output:
            numbers["logprob"] = [logprob for score in output["scores"] for logprob in score["token_logprobs"]]
        elif not samples:
            for name, value in output.items():
                if isinstance(value, dict) and value.keys() == {"file", "row"}:
                    value = files(value["file"])[value["row"]]
                if name != "prompt_tokens":
                    numbers[name] = value
        yield _Outcome(False, [sample["token_ids"] for sample in samples], output.get("label"), numbers)


def _array(path: Path) -> "np.ndarray":
    import numpy as np

    array: np.ndarray = np.load(path, mmap_mode="r")
    return array


def _results(directory: Path) -> Iterator[dict[str, Any]]:
    with (directory / RESULTS).open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
