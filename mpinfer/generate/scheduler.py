"""Which tokens go into the next step of which group. Bookkeeping only: no tensors, no MPI.

A replica has a fixed number of groups in flight, each with a fixed number of slots (one sequence's KV cache
each). Sequences join and leave a group at any step (continuous batching, after Orca). A step holds one token
of every decoding sequence of its group and fills the rest of its token budget with chunks of prompts, so
that a long prompt does not hold up the others (chunked prefill, after Sarathi-Serve).
"""

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple


class Segment(NamedTuple):
    """Consecutive tokens of one sequence in a step."""

    slot: int
    start: int  # position of the first token
    length: int
    sample: bool  # whether the last token's logits choose the next token


@dataclass(frozen=True)
class Step:
    """One pass of a group through the pipeline: decoding segments (one token each, by slot), then prompt chunks."""

    segments: tuple[Segment, ...]
    tokens: tuple[int, ...]  # of all segments, one after another


@dataclass
class Sequence:
    """One record on its way."""

    index: int
    id: str | int
    prompt: list[int]
    new_tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    slot: int = -1
    prefilled: int = 0  # prompt tokens whose keys and values are in the cache, once the current step is through


@dataclass
class _Group:
    free_slots: list[int]  # a heap: low slots first keeps the used ones together
    live: list[Sequence] = field(default_factory=list)
    sampling: list[Sequence] = field(default_factory=list)  # of the step in flight, in its order


class Scheduler:
    """The sequences of one replica. `step_tokens` is at least `micro_batch`; `max_length` bounds prompt and new
    tokens together."""

    def __init__(
        self,
        groups: int,
        micro_batch: int,
        step_tokens: int,
        max_new_tokens: int,
        max_length: int,
        stop_ids: Collection[int],
    ) -> None:
        self._groups = [_Group(list(range(g * micro_batch, (g + 1) * micro_batch))) for g in range(groups)]
        self._step_tokens = step_tokens
        self._max_new_tokens, self._max_length = max_new_tokens, max_length
        self._stop_ids = frozenset(stop_ids)
        self._waiting: list[Sequence] = []  # shortest prompt first: the end is admitted next
        self._live = 0

    @property
    def slots(self) -> int:
        return self._live + sum(len(group.free_slots) for group in self._groups)

    @property
    def unfinished(self) -> int:
        return self._live + len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=lambda waiting: (len(waiting.prompt), -waiting.index))

    def next_step(self, group_index: int) -> Step | None:
        """The next step of a group that has none in flight, or None when it has nothing to do."""
        group = self._groups[group_index]
        self._admit(group)
        if not group.live:
            return None
        group.live.sort(key=lambda sequence: sequence.slot)
        segments: list[Segment] = []
        tokens: list[int] = []
        group.sampling = []
        for sequence in group.live:
            if sequence.new_tokens:
                position = len(sequence.prompt) + len(sequence.new_tokens) - 1
                segments.append(Segment(sequence.slot, position, 1, True))
                tokens.append(sequence.new_tokens[-1])
                group.sampling.append(sequence)
        for sequence in group.live:
            budget = self._step_tokens - len(tokens)
            chunk = sequence.prompt[sequence.prefilled : sequence.prefilled + budget]
            if chunk and not sequence.new_tokens:
                start = sequence.prefilled
                sequence.prefilled += len(chunk)
                complete = sequence.prefilled == len(sequence.prompt)
                segments.append(Segment(sequence.slot, start, len(chunk), complete))
                tokens.extend(chunk)
                if complete:
                    group.sampling.append(sequence)
        return Step(tuple(segments), tuple(tokens))

    def commit(self, group_index: int, tokens: Collection[int]) -> list[Sequence]:
        """Take in the tokens sampled by the group's step in flight; returns the sequences that are finished."""
        group = self._groups[group_index]
        finished = []
        for sequence, token in zip(group.sampling, tokens, strict=True):
            sequence.new_tokens.append(token)
            sequence.finish_reason = self._finish_reason(sequence, token)
            if sequence.finish_reason:
                finished.append(sequence)
                group.live.remove(sequence)
                heappush(group.free_slots, sequence.slot)
        self._live -= len(finished)
        group.sampling = []
        return finished

    def _admit(self, group: _Group) -> None:
        """Let waiting sequences in, but leave the other groups their share: a group alone cannot fill a pipeline.

        Longest prompts first: the short ones fill the gaps at the end, and neighbouring slots, which attend
        together, get similar lengths.
        """
        share = -(-self.unfinished // len(self._groups))
        heapify(group.free_slots)
        while self._waiting and group.free_slots and len(group.live) < share:
            sequence = self._waiting.pop()
            sequence.slot = heappop(group.free_slots)
            group.live.append(sequence)
            self._live += 1

    def _finish_reason(self, sequence: Sequence, token: int) -> str:
        if token in self._stop_ids:
            return "stop"
        if len(sequence.new_tokens) == self._max_new_tokens:
            return "length"
        if len(sequence.prompt) + len(sequence.new_tokens) == self._max_length:
            return "length"
        return ""
