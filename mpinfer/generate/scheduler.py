"""Which tokens go into the next step of which group. Bookkeeping only: no tensors, no MPI.

A replica has a fixed number of groups in flight, each with a fixed number of slots (one sequence's KV cache
each). Sequences join and leave a group at any step (continuous batching, after Orca). A step holds one token
of every decoding sequence of its group and fills the rest of its token budget with chunks of prompts, so
that a long prompt does not hold up the others (chunked prefill, after Sarathi-Serve).

KV memory is a budget of tokens over all slots. A sequence that finds no room waits; when the ones at work
outgrow the budget, the youngest gives its place up and computes its keys and values again later (preemption
by recomputation, after vLLM).
"""

from bisect import insort
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any, NamedTuple

_HEADROOM_TOKENS = 16  # that every live sequence can grow by when another is admitted: else it would be out soon


class Segment(NamedTuple):
    """Consecutive tokens of one sequence in a step."""

    slot: int
    start: int  # position of the first token
    length: int
    samples: int  # of its last tokens, whose final hidden states are wanted


@dataclass(frozen=True)
class Step:
    """One pass of a group through the pipeline: decoding segments (one token each, by slot), then prompt chunks."""

    segments: tuple[Segment, ...]
    tokens: tuple[int, ...]  # of all segments, one after another
    targets: tuple[int, ...] = ()  # tokens to be scored, one for every sample; () when none are
    released: tuple[int, ...] = ()  # slots whose keys and values are needed no more


@dataclass(frozen=True)
class Limits:
    """When a sequence that generates ends."""

    max_new_tokens: int
    stop_ids: Collection[int] = ()
    stop_text: Any = None  # called with the new tokens: whether they hold a stop string

    def finish_reason(self, new_tokens: list[int]) -> str:
        if new_tokens[-1] in self.stop_ids or (self.stop_text is not None and self.stop_text(new_tokens)):
            return "stop"
        return "length" if len(new_tokens) == self.max_new_tokens else ""


@dataclass(eq=False)
class Sequence:
    """Tokens on their way: a record, or one of the samples or continuations that it asks for.

    With `limits` it generates: the last token's sample is its next token. Without, only its prompt is computed,
    and the samples of all tokens from `sample_from` on are its results.
    """

    index: int  # of its record
    id: str | int
    prompt: list[int]
    limits: Limits | None = None
    number: int = 0  # of the sample or continuation
    sampling: Any = None  # how its tokens are chosen
    sample_from: int = 0
    targets: list[int] = field(default_factory=list)  # tokens to be scored, one for every sample
    new_tokens: list[int] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)  # one for every sample
    finish_reason: str = ""
    finished: bool = False
    dropped: bool = False  # not wanted any more: leaves at its group's next step
    slot: int = -1
    computed: int = 0  # tokens whose keys and values are in the cache, once the current step is through
    length: int = field(init=False)  # of the prompt and the new tokens

    def __post_init__(self) -> None:
        self.length = len(self.prompt) + len(self.new_tokens)

    def tokens(self, start: int, stop: int) -> list[int]:
        prompt = len(self.prompt)
        if start >= prompt:
            return self.new_tokens[start - prompt : stop - prompt]
        return self.prompt[start:stop] + self.new_tokens[: max(0, stop - prompt)]

    def samples(self, start: int, stop: int) -> int:
        """Of the tokens from `start` up to `stop`, how many are sampled."""
        if self.limits is not None:
            return int(stop == self.length)
        return max(0, stop - max(start, self.sample_from))


@dataclass
class _Group:
    free_slots: list[int]  # a heap: low slots first keeps the used ones together
    live: list[Sequence] = field(default_factory=list)  # by age
    sampling: list[tuple[Sequence, int]] = field(default_factory=list)  # of the step in flight: samples of each


class Scheduler:
    """The sequences of one replica.

    `step_tokens` is at least `micro_batch`; `max_length` bounds prompt and new tokens together; `kv_tokens`, at
    least `max_length`, those of all sequences at work.
    """

    def __init__(self, groups: int, micro_batch: int, step_tokens: int, max_length: int, kv_tokens: int) -> None:
        self._groups = [_Group(list(range(g * micro_batch, (g + 1) * micro_batch))) for g in range(groups)]
        self._step_tokens = step_tokens
        self._max_length, self._kv_tokens = max_length, kv_tokens
        self._waiting: list[Sequence] = []  # shortest prompt first: the end is admitted next
        self._preempted: deque[Sequence] = deque()  # go before those
        self._released: list[int] = []
        self.held_tokens = 0  # whose keys and values are in the cache, or soon will be
        self.preemptions = 0

    @property
    def live(self) -> int:
        return sum(len(group.live) for group in self._groups)

    @property
    def slots(self) -> int:
        return self.live + sum(len(group.free_slots) for group in self._groups)

    @property
    def unfinished(self) -> int:
        return self.live + len(self._waiting) + len(self._preempted)

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=lambda waiting: (len(waiting.prompt), -waiting.index, -waiting.number))

    def drop(self, indices: Collection[int]) -> None:
        """Forget the sequences of these records. Those in a step in flight go with it to its end."""
        self._waiting = [sequence for sequence in self._waiting if sequence.index not in indices]
        self._preempted = deque(sequence for sequence in self._preempted if sequence.index not in indices)
        for group in self._groups:
            for sequence in group.live:
                sequence.dropped |= sequence.index in indices

    def next_step(self, group_index: int) -> Step | None:
        """The next step of a group that has none in flight, or None when it has nothing to do."""
        group = self._groups[group_index]
        for sequence in [sequence for sequence in group.live if sequence.dropped]:
            self._leave(group, sequence)
        self._preempt(group)
        self._admit(group)
        if not group.live:
            return None
        group.sampling = []
        segments: list[Segment] = []
        tokens: list[int] = []
        targets: list[int] = []
        room = self._step_tokens
        # Those that decode come first; the rest of the step is for prompts.
        for sequence in sorted(group.live, key=lambda each: (each.length - each.computed > 1, each.slot)):
            start = sequence.computed
            stop = sequence.length if sequence.length <= start + room else start + room
            if start == stop:
                continue
            room -= stop - start
            samples = sequence.samples(start, stop)
            segments.append(Segment(sequence.slot, start, stop - start, samples))
            tokens += sequence.tokens(start, stop)
            if sequence.targets:
                targets += sequence.targets[len(sequence.results) :][:samples]
            sequence.computed = stop
            group.sampling.append((sequence, samples))
        released, self._released = tuple(self._released), []
        return Step(tuple(segments), tuple(tokens), tuple(targets), released)

    def sampling(self, group_index: int) -> list[Sequence]:
        """The sequence of every sample of the group's step in flight."""
        return [sequence for sequence, samples in self._groups[group_index].sampling for _ in range(samples)]

    def commit(self, group_index: int, results: list[Any]) -> list[Sequence]:
        """Take in the results of the samples of the group's step in flight; returns the sequences that are finished.

        The result of a generating sequence is a pair of its next token and what is to be kept of it.
        """
        group = self._groups[group_index]
        finished = []
        own = iter(results)
        for sequence, samples in group.sampling:
            if sequence.limits is None:
                sequence.results += islice(own, samples)
                is_over = sequence.computed == sequence.length
            else:
                is_over = bool(samples) and self._take(sequence, sequence.limits, *next(own))
            if is_over:
                finished.append(sequence)
                self._leave(group, sequence)
        group.sampling = []
        return finished

    def _admit(self, group: _Group) -> None:
        """Let waiting sequences in, as far as the next step can begin them, but leave the other groups their share: a
        pipeline is only full while the steps of its groups take equally long.

        Longest prompts first: the short ones fill the gaps at the end, and neighbouring slots, which attend
        together, get similar lengths.
        """
        if not (self._waiting or self._preempted) or not group.free_slots:
            return
        share = -(-self.unfinished // len(self._groups))
        room = self._step_tokens - sum(sequence.length - sequence.computed for sequence in group.live)
        heapify(group.free_slots)
        while (self._waiting or self._preempted) and group.free_slots and len(group.live) < share and room > 0:
            sequence = self._preempted[0] if self._preempted else self._waiting[-1]
            if self.live and self.held_tokens + sequence.length + _HEADROOM_TOKENS * (self.live + 1) > self._kv_tokens:
                return  # first come, first served: what fits behind it would keep it waiting for ever
            if self._preempted:
                self._preempted.popleft()
            else:
                self._waiting.pop()
            sequence.slot = heappop(group.free_slots)
            group.live.append(sequence)
            self.held_tokens += sequence.length
            room -= sequence.length

    def _preempt(self, group: _Group) -> None:
        """Send the youngest of a group back to wait while all sequences together outgrow the budget, as only those that
        generate can. The last one at work stays, since alone it fits."""
        while group.live and self.live > 1 and self.held_tokens > self._kv_tokens:
            sequence = group.live[-1]
            self._leave(group, sequence)
            sequence.computed = 0
            self._preempted.append(sequence)
            self.preemptions += 1

    def _leave(self, group: _Group, sequence: Sequence) -> None:
        group.live.remove(sequence)
        heappush(group.free_slots, sequence.slot)
        self._released.append(sequence.slot)
        self.held_tokens -= sequence.length

    def _take(self, sequence: Sequence, limits: Limits, token: int, kept: Any) -> bool:
        """Append a new token and what is to be kept of it; whether the sequence ends there."""
        sequence.new_tokens.append(token)
        sequence.length += 1
        sequence.results.append(kept)
        self.held_tokens += 1
        reason = limits.finish_reason(sequence.new_tokens)
        sequence.finish_reason = reason or ("length" if sequence.length == self._max_length else "")
        return bool(sequence.finish_reason)
