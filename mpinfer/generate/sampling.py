"""How the next token is chosen from logits: the filters of transformers' `generate`, in its order.

The random number of a token depends on its record's seed, its sample and its position, and on nothing else:
not on the batch, the layout or the number of ranks.
"""

import hashlib
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import torch

from mpinfer.generate.scheduler import Sequence

_FINITE = torch.finfo(torch.float32)
_LIKELY = 512  # tokens that mostly hold a nucleus: looked at before all of the vocabulary is sorted


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a sequence are chosen. `temperature` 0: the best one."""

    seed: tuple[int | str, ...]
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    forbidden_before: tuple[int, ...] = ()  # stop tokens, until there are `min_new_tokens`
    logprobs: int | None = None  # best tokens to report beside the chosen one; None: report nothing

    def uniform(self, number: int, position: int) -> float:
        """A number from [0, 1) for one token of one sample."""
        text = repr((*self.seed, number, position)).encode()
        bits = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
        return (bits >> 11) / 2**53


def choose_tokens(logits: torch.Tensor, sequences: Many[Sequence]) -> list[tuple[int, Any]]:
    """(token, log-probabilities or None) for every row of logits [samples, vocabulary].

    Log-probabilities are the model's own, before any filter: {"logprob": of the token, "top": [[token, logprob],
    ...]}.
    """
    settings: list[Sampling] = [sequence.sampling for sequence in sequences]
    scores = logits.clone()
    for row, sequence, sampling in zip(scores, sequences, settings, strict=True):
        _penalize(row, sequence, sampling)
    tokens = scores.argmax(1)
    drawn = [row for row, sampling in enumerate(settings) if sampling.temperature > 0]
    if drawn:
        uniforms = [settings[row].uniform(sequences[row].number, len(sequences[row].new_tokens)) for row in drawn]
        tokens[drawn] = _draw(scores[drawn], [settings[row] for row in drawn], uniforms)
    chosen = tokens.tolist()
    return [
        (token, None if sampling.logprobs is None else _logprobs(row, token, sampling.logprobs))
        for row, token, sampling in zip(logits, chosen, settings, strict=True)
    ]


def _penalize(row: torch.Tensor, sequence: Sequence, sampling: Sampling) -> None:
    """What depends on the tokens so far, in place."""
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*sequence.prompt, *sequence.new_tokens}))
        values = row[seen]
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if len(sequence.new_tokens) < sampling.min_new_tokens:
        row[[token for token in sampling.forbidden_before if token < len(row)]] = float("-inf")


def _draw(scores: torch.Tensor, settings: list[Sampling], uniforms: list[float]) -> torch.Tensor:
    """One token a row, from the filtered distribution, by its cumulative sum in the order of the vocabulary: so a
    rounding error of two tokens' probabilities moves a boundary, but never swaps two tokens. [rows]"""
    temperatures = _column([sampling.temperature for sampling in settings]).clamp(_FINITE.tiny, _FINITE.max)
    scores = (scores - scores.amax(1, keepdim=True)) / temperatures  # never above 0: no overflow, whatever divides it
    for row, sampling in zip(scores, settings, strict=True):
        if 0 < sampling.top_k < len(row):
            row[row < row.topk(sampling.top_k).values[-1]] = float("-inf")
    probabilities = scores.softmax(1)
    if cut := [row for row, sampling in enumerate(settings) if sampling.top_p < 1]:
        probabilities[cut] = _nucleus(probabilities[cut], _column([settings[row].top_p for row in cut]))
    if any(sampling.min_p > 0 for sampling in settings):
        limit = _column([sampling.min_p for sampling in settings]) * probabilities.amax(1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < limit, 0)
    cumulative = probabilities.double().cumsum(1)
    total = cumulative[:, -1:]
    wanted = torch.tensor(uniforms, dtype=torch.float64)[:, None] * total
    wanted = wanted.minimum(total.nextafter(torch.zeros_like(total)))  # a rounded product must not lie beyond the end
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]


def _nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero all but the fewest most probable tokens that together have `top_p`, row by row (nucleus sampling). Tokens as
    probable as the last of those stay, too: which of them a sort puts first may depend on the other rows."""
    values = probabilities.topk(min(_LIKELY, probabilities.shape[1])).values
    if (values.sum(1, keepdim=True) < top_p).any():
        values = probabilities.sort(1, descending=True).values
    before = values.cumsum(1) - values
    least = values.masked_fill(before >= top_p, float("inf")).amin(1, keepdim=True)
    return probabilities.masked_fill(probabilities < least, 0)


def _logprobs(row: torch.Tensor, token: int, best: int) -> dict[str, Any]:
    logprobs = row.log_softmax(0)
    values, tokens = logprobs.topk(min(best, len(logprobs)))
    top = [list(pair) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]
    return {"logprob": logprobs[token].item(), "top": top}


def _column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[:, None]
