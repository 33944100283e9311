"""What a job of a decoder asks for, by a sample of its records, and how long a replica takes for it.

The sample's sequences go through the very scheduler that a replica uses, in virtual time.
"""

from array import array
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Any

from mpinfer.errors import RecordError
from mpinfer.generate.scheduler import Scheduler, Sequence, Step
from mpinfer.generate.tasks import make_task
from mpinfer.models.decoder import DecoderSkeleton
from mpinfer.plan.cost import Demand, Mix, StageCost
from mpinfer.plan.layout import Replica
from mpinfer.plan.machine import Link
from mpinfer.plan.simulate import Simulated, simulate
from mpinfer.records.inputs import Input
from mpinfer.spec import AUTO, JobSpec
from mpinfer.transport.codec import encoded_bytes

_SAMPLE = 128  # records


class DecodeEstimator:
    def __init__(self, spec: JobSpec, skeleton: DecoderSkeleton, records: Input, needs_logits: bool) -> None:
        """Tokenizes a sample of the records."""
        given = spec.generate.max_length
        self._max_length = skeleton.max_length if given == AUTO else min(given, skeleton.max_length)
        self._step_tokens = spec.generate.step_tokens
        task = make_task(spec, skeleton, self._max_length, needs_logits)
        self._sample: list[list[Sequence]] = []
        self._bytes = 0  # of the sampled records' lines
        stride = -(-len(records) // _SAMPLE) or 1
        for index in range(0, len(records), stride):
            if index in records.refused:
                continue
            try:
                sequences = task.sequences(index, records.ids[index], records.line(index).decode())
            except (RecordError, UnicodeDecodeError):
                continue  # it will be an error in the results
            self._sample.append(sequences)
            self._bytes += records.lengths[index]
        sequences = [sequence for record in self._sample for sequence in record]
        # Of a sequence in the mean: tokens of its prompt, new ones, and those whose logits are computed.
        self._prompt = _mean(len(sequence.prompt) for sequence in sequences)
        self._new = _mean(_new_tokens(sequence, self._max_length) for sequence in sequences)
        self._samples = _mean(_samples(sequence, self._max_length) for sequence in sequences)
        self._per_record = len(sequences) / max(1, len(self._sample))
        self._row_bytes = encoded_bytes(
            spec.transport.wire, skeleton.hidden_size * skeleton.dtype.itemsize, skeleton.dtype.itemsize
        )

    @property
    def tokens_per_record(self) -> float:
        """In the KV cache at the end of each of its sequences."""
        return self._prompt + self._new

    def mix(self, micro_batch: int) -> Mix:
        """Of a record, in full steps: what it adds to the work of every block."""
        prompt, decode = self._prompt_step(), self._decode_step(micro_batch)
        count = self._per_record
        return (prompt, self._prompt * count / prompt.rows), (decode, self._new * count / decode.rows)

    def _prompt_step(self) -> Demand:
        """Filled with tokens of prompts."""
        rows = self._step_tokens
        samples = max(0.0, self._samples - self._new) / max(1.0, self._prompt)
        return Demand(rows, rows * samples, pairs=rows * self._prompt / 2)

    def _decode_step(self, sequences: float) -> Demand:
        """Of so many sequences, at half their length."""
        return Demand(sequences, sequences, sequences * (self._prompt + self._new / 2))

    def work(self, replica: Replica, records: int) -> float:
        """About what a simulation asks of this rank: every step for its stages, and for its sequences."""
        sequences = records * self._per_record
        steps = sequences * (self._prompt / self._step_tokens + self._new / min(replica.micro_batch, sequences or 1))
        return steps * (2 * replica.stages) + sequences * self._new

    def estimate(self, replica: Replica, stages: Many[StageCost], records: int) -> float:
        """Seconds of the slowest stage, while the others keep up: waves of sequences fill the slots, and the last one
        is smaller."""
        sequences = records * self._per_record
        prompt = self._prompt_step()
        seconds = sequences * self._prompt / prompt.rows * _slowest(stages, prompt)
        waves, rest = divmod(sequences, replica.in_flight * replica.micro_batch)
        for count, group in ((waves, replica.micro_batch), (1, rest / replica.in_flight)):
            if group:
                seconds += count * self._new * replica.in_flight * _slowest(stages, self._decode_step(group))
        return seconds + sum(stage.seconds(prompt) for stage in stages) - _slowest(stages, prompt)

    def simulate(self, replica: Replica, stages: Many[StageCost], hops: Many[Link], records: int) -> Simulated:
        if not self._sample or not records:
            return Simulated(0.0, (0.0,) * replica.stages, 0)
        # Spread over the sample, which is spread over the input.
        picked = [self._sample[number * len(self._sample) // records] for number in range(records)]
        max_length = min(self._max_length, replica.kv_tokens)
        source = _VirtualRing(picked, replica, max(self._step_tokens, replica.micro_batch), max_length)
        return simulate(source, stages, hops, self._row_bytes)

    def record_costs(self, stages: Many[StageCost], micro_batch: int, lengths: Many[int]) -> Many[float]:
        """Seconds of a replica's stages that each record is expected to take, by the bytes of its line."""
        prompt_s, new_s = (
            sum(stage.seconds(demand) for stage in stages) * steps for demand, steps in self.mix(micro_batch)
        )
        mean = self._bytes / max(1, len(self._sample)) or 1.0
        return array("f", (prompt_s * length / mean + new_s for length in lengths))


class _VirtualRing:
    """The decode ring in virtual time: sequences end where their limits say."""

    def __init__(self, records: Iterable[Many[Sequence]], replica: Replica, step_tokens: int, max_length: int) -> None:
        self._scheduler = Scheduler(replica.in_flight, replica.micro_batch, step_tokens, max_length, replica.kv_tokens)
        for number, sequences in enumerate(records):
            for sequence in sequences:
                self._scheduler.add(_fresh(sequence, number, max_length))
        self._idle = deque(range(replica.in_flight))
        self._in_flight: deque[int] = deque()

    def next(self) -> Demand | None:
        for _ in range(len(self._idle)):
            group = self._idle.popleft()
            step = self._scheduler.next_step(group)
            if step is not None:
                self._in_flight.append(group)
                return demand(step)
            self._idle.append(group)
        return None

    def commit(self) -> None:
        group = self._in_flight.popleft()
        results: list[Any] = [(0, None)] * len(self._scheduler.sampling(group))
        self._scheduler.commit(group, results)
        self._idle.append(group)


def demand(step: Step) -> Demand:
    """What a step asks of every stage."""
    samples, context, pairs = 0, 0, 0.0
    for _, start, length, own in step.segments:
        samples += own
        if length == 1:
            context += start + 1
        else:
            pairs += length * (start + length / 2)
    return Demand(len(step.tokens), samples, context, pairs)


def _fresh(sequence: Sequence, number: int, max_length: int) -> Sequence:
    """The sequence before it is computed, which ends at its length alone."""
    limits = sequence.limits and replace(sequence.limits, stop_ids=(), stop_text=None)
    prompt = sequence.prompt[: max_length - 1]
    return replace(sequence, index=number, prompt=prompt, limits=limits, new_tokens=[], results=[])


def _slowest(stages: Many[StageCost], demand: Demand) -> float:
    return max(stage.seconds(demand) for stage in stages)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / max(1, len(values))


def _new_tokens(sequence: Sequence, max_length: int) -> int:
    if sequence.limits is None:
        return 0
    return min(sequence.limits.max_new_tokens, max_length - len(sequence.prompt))


def _samples(sequence: Sequence, max_length: int) -> int:
    return _new_tokens(sequence, max_length) or len(sequence.prompt) - sequence.sample_from
