"""From final hidden states to what a task wants of them, computed on the last and the first stage together.

The output embedding costs as much as several layers, but only for tokens that are sampled: no cut of the
layers balances a pipeline both while it prefills and while it decodes. So its rows are split between the
last stage and the first, where the tokens go next anyway (vocabulary-parallel, as in Megatron-LM). The last
stage sends the hidden states on with what it found in its share of the vocabulary; the first adds its own.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from mpinfer.models.decoder import DecoderPart


class Readout(Protocol):
    """What one rank's share of the vocabulary has to say of hidden states."""

    def __init__(self, part: DecoderPart) -> None: ...

    @staticmethod
    def width(share: int) -> int:
        """Columns that `reduce` makes of a share of so many tokens."""

    def reduce(self, hidden: torch.Tensor, targets: Sequence[int]) -> torch.Tensor:
        """Float32 [samples, width] of hidden states [samples, hidden]; `targets`: tokens to be scored."""


class NoReadout:
    """The hidden states themselves are wanted."""

    def __init__(self, part: DecoderPart) -> None:
        """No part is asked."""

    @staticmethod
    def width(share: int) -> int:
        return 0

    def reduce(self, hidden: torch.Tensor, targets: Sequence[int]) -> torch.Tensor:
        return hidden.new_empty(len(hidden), 0, dtype=torch.float32)


class Logits:
    """All logits of a share of the vocabulary, for sampling. [samples, share]"""

    def __init__(self, part: DecoderPart) -> None:
        self._part = part

    @staticmethod
    def width(share: int) -> int:
        return share

    def reduce(self, hidden: torch.Tensor, targets: Sequence[int]) -> torch.Tensor:
        return self._part.logits(hidden).float()


class Best:
    """The largest logit of a share and its token, which are all that greedy decoding needs. [samples, 2]"""

    def __init__(self, part: DecoderPart) -> None:
        self._part = part

    @staticmethod
    def width(share: int) -> int:
        return 2

    def reduce(self, hidden: torch.Tensor, targets: Sequence[int]) -> torch.Tensor:
        return _best(self._part.logits(hidden).float(), self._part.vocabulary.start)


class Likelihood:
    """Sum of exponentials (as a logarithm), the target's logit, the largest logit and its token. [samples, 4]

    The target's logit is -inf where it lies in another rank's share.
    """

    def __init__(self, part: DecoderPart) -> None:
        self._part = part

    @staticmethod
    def width(share: int) -> int:
        return 4

    def reduce(self, hidden: torch.Tensor, targets: Sequence[int]) -> torch.Tensor:
        logits, own = self._part.logits(hidden).float(), self._part.vocabulary
        target = torch.tensor(targets, device=logits.device)[:, None] - own.start
        inside = (target >= 0) & (target < len(own))
        at_target = logits.gather(1, target.clamp(0, len(own) - 1)).masked_fill(~inside, float("-inf"))
        return torch.cat([logits.logsumexp(1, keepdim=True), at_target, _best(logits, own.start)], dim=1)


def merge_best(shares: Sequence[torch.Tensor]) -> list[int]:
    """The best token of every sample, of what `Best` found in each share; of equal ones the lowest."""
    first, *others = [share[:, -2:] for share in shares]
    for other in others:
        better = (other[:, 0] > first[:, 0]) | ((other[:, 0] == first[:, 0]) & (other[:, 1] < first[:, 1]))
        first = torch.where(better[:, None], other, first)
    return first[:, 1].long().tolist()


def merge_likelihood(shares: Sequence[torch.Tensor]) -> list[tuple[float, int]]:
    """(log-probability of the target, best token) of every sample, of what `Likelihood` found in each share."""
    total = torch.stack([share[:, 0] for share in shares]).logsumexp(0)
    target = torch.stack([share[:, 1] for share in shares]).amax(0)
    return list(zip((target - total).tolist(), merge_best(shares), strict=True))


def _best(logits: torch.Tensor, start: int) -> torch.Tensor:
    # numpy's search makes use of vectors, torch's on a CPU does not: ten times as fast.
    token = torch.from_numpy(logits.numpy().argmax(1)) if logits.device.type == "cpu" else logits.argmax(1)
    value = logits.gather(1, token[:, None])[:, 0]
    return torch.stack([value, (token + start).float()], dim=1)  # float32 is exact up to 2**24 tokens
