"""What a strategy changes of the results: nothing, what another order of sums changes, or what compression costs."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mpinfer.experiments.cell import Cell, RunFailed, Start
from mpinfer.experiments.comparison import (
    DIVERGED_SHARE,
    ERROR_BOUND,
    TIE_BOUND,
    Comparison,
    Divergence,
    compare,
    perplexity,
)
from mpinfer.generate.text import Text
from mpinfer.preview import FirstLook
from mpinfer.records.files import RESULTS, write_atomically
from mpinfer.spec import FAKE


class Judge:
    """Holds outputs against those of the reference.

    A strategy is lossless that leaves alone every key that decides results (`JobSpec.identity`): another order of sums
    is all that it may change. Of the others it is told how much they change. `start`: what runs are started with that
    only score text; without it none are.
    """

    def __init__(self, look: FirstLook, reference: Cell, scratch: Path, start: Start | None) -> None:
        self.reference = reference
        self.verdicts: dict[Cell, dict[str, Any]] = {}  # of those that have runs of their own
        self._look, self._scratch, self._start = look, scratch, start
        self._dtype = look.spec.model.dtype

    @property
    def alarms(self) -> bool:
        """Whether a lossless strategy gave other results."""
        return any(verdict["verdict"] == "differs" for verdict in self.verdicts.values())

    def look_at(self, cell: Cell) -> None:
        """Compare all of its runs with the reference's first; the one that has least in common counts."""
        own = cell.own
        if own in self.verdicts:
            return
        found = [compare(Path(run["directory"]), self.reference.output) for run in own.runs]
        worst = min(found, key=lambda each: (each.same_records, -(each.largest_error or 0.0)))
        lossless = self._is_lossless(own)
        self.verdicts[own] = {
            "lossless": lossless,
            "verdict": self._verdict(own, worst) if lossless else "lossy",
            "same_records": _share(worst.same_records, worst.records),
            "same_tokens": _share(worst.same_tokens, worst.tokens),
            "same_labels": _share(worst.same_labels, worst.labels),
            "largest_error": _finite(worst.largest_error),
            "perplexity": None,
            "reference_perplexity": None,
        }

    def score(self, cells: Sequence[Cell]) -> None:
        """Of lossy strategies, on the most ranks that each ran on, the perplexity of the reference's own text."""
        most = {cell.strategy: cell for cell in sorted(cells, key=lambda cell: cell.ranks)}
        lossy = [cell.own for cell in most.values() if not self.verdicts[cell.own]["lossless"]]
        spec = self._look.spec
        if not lossy or spec.model.weights == FAKE:
            return
        if spec.model.task == "score":
            scored = {cell: cell.output for cell in (self.reference, *lossy)}
        elif spec.model.task == "generate" and self._start is not None:
            texts = ((index, [*samples]) for index, samples in self._reference_tokens())
            scored = self._score_texts("perplexity", texts, [self.reference, *lossy])
        else:
            return
        of_reference = scored.get(self.reference)
        for cell in lossy:
            if of_reference is not None and cell in scored:
                self.verdicts[cell]["perplexity"] = perplexity(scored[cell])
                self.verdicts[cell]["reference_perplexity"] = perplexity(of_reference)

    def _is_lossless(self, cell: Cell) -> bool:
        assert cell.spec is not None
        assert self.reference.spec is not None
        return cell.spec.identity() == self.reference.spec.identity()

    def _verdict(self, cell: Cell, found: Comparison) -> str:
        if found.is_identical:
            return "reference" if cell is self.reference.own else "identical"
        error = found.largest_error or 0.0
        if found.unlike or error > ERROR_BOUND[self._dtype] or not self._are_ties(cell, found):
            return "differs"
        return "within"

    def _are_ties(self, cell: Cell, found: Comparison) -> bool:
        """Whether tokens that leave the reference's were as good as its own, by its own log-probabilities."""
        if not found.divergences:
            return True
        if self._look.needs_logits or self._start is None:  # drawn by chance, or from logits that are not the model's
            return len({d.index for d in found.divergences}) <= max(1, DIVERGED_SHARE * found.records)
        if any(len(d.ours) != len(d.reference) for d in found.divergences):
            return False  # one only continues the other
        texts = ((d.index, [d.ours, d.reference]) for d in _one_a_record(found.divergences))
        directory = self._score_texts(f"ties-{cell.strategy}-{cell.ranks}", texts, [self.reference]).get(self.reference)
        return directory is not None and all(
            abs(ours - reference) <= TIE_BOUND[self._dtype] for ours, reference in _last_logprobs(directory)
        )

    def _score_texts(
        self, name: str, texts: Iterable[tuple[int, list[list[int]]]], cells: Sequence[Cell]
    ) -> dict[Cell, Path]:
        """Have continuations of records scored, under the settings of each cell; where the results are, by cell."""
        assert self._start is not None
        text = Text(Path(self._look.spec.model.path), sys.maxsize)
        records = (
            {"id": index, "token_ids": text.encode(json.loads(self._look.records.line(index))), "continuations": tokens}
            for index, tokens in texts
        )
        path = self._scratch / f"{name}.jsonl"
        write_atomically(path, [json.dumps(record).encode() + b"\n" for record in records])
        keys = ["model.task=score", "input.format=jsonl", "input.limit=auto", "input.columns=[]"]
        keys.append(f"input.path={json.dumps(str(path))}")
        scored = {}
        for cell in cells:
            directory = self._scratch / f"{name}-{cell.strategy}-{cell.ranks}"
            try:
                self._start(cell.ranks, [*cell.overrides, *keys], directory)
                scored[cell] = directory
            except RunFailed as error:
                print(f"mpinfer: bench: {name} of {cell.strategy}: {error}", file=sys.stderr, flush=True)
        return scored

    def _reference_tokens(self) -> Iterable[tuple[int, list[list[int]]]]:
        """Of each record, the tokens of its samples."""
        with (self.reference.output / RESULTS).open(encoding="utf-8") as lines:
            for line in lines:
                result = json.loads(line)
                output = result.get("output", {})
                samples = [s["token_ids"] for s in output.get("samples", [output] if output else []) if s["token_ids"]]
                if samples:
                    yield result["index"], samples


def _one_a_record(divergences: Sequence[Divergence]) -> Iterable[Divergence]:
    return {divergence.index: divergence for divergence in divergences}.values()


def _last_logprobs(directory: Path) -> Iterable[tuple[float, float]]:
    """Of each record, that of the last token of either continuation."""
    with (directory / RESULTS).open(encoding="utf-8") as lines:
        for line in lines:
            ours, reference = json.loads(line)["output"]["scores"]
            yield ours["token_logprobs"][-1], reference["token_logprobs"][-1]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _finite(value: float | None) -> float | None:
    return None if value is None or value == float("inf") else value
