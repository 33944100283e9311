"""What a job of records that pass once asks for, and how long a replica takes for it."""

import time
from collections.abc import Sequence
from math import ceil

from mpinfer.errors import RecordError
from mpinfer.forward.first import make_sampler
from mpinfer.forward.prepare import make_preparer
from mpinfer.plan.cost import Demand, EvenCosts, Mix, StageCost
from mpinfer.plan.layout import Replica
from mpinfer.plan.machine import Link
from mpinfer.plan.simulate import Simulated, simulate
from mpinfer.records.inputs import Input
from mpinfer.spec import JobSpec
from mpinfer.transport.codec import encoded_bytes

_SAMPLE = 32  # records
_SAMPLE_S = 0.5


class ForwardEstimator:
    """Prepares a sample of the records: how large they are beside the first, and how long that takes."""

    tokens_per_record = 0.0

    def __init__(self, spec: JobSpec, records: Input, row_bytes: float) -> None:
        self._row_bytes = encoded_bytes(spec.transport.wire, row_bytes)
        preparer = make_preparer(spec)
        sample = make_sampler(spec, preparer)
        sizes: list[int] = []
        seconds: list[float] = []
        until = time.perf_counter() + _SAMPLE_S
        for index in range(0, len(records), -(-len(records) // _SAMPLE) or 1):
            if index in records.refused or (sizes and time.perf_counter() > until):
                continue
            started = time.perf_counter()
            try:
                sizes.append(preparer.size(sample(records.line(index))))
            except RecordError:
                continue
            seconds.append(time.perf_counter() - started)
        # The first call may load a library.
        self.prepare_s = sum(seconds[1:]) / len(seconds[1:]) if len(seconds) > 1 else sum(seconds)
        self._size = (
            sum(sizes) / len(sizes) / sizes[0] if sizes and sizes[0] else 1.0
        )  # the model is timed at the first's

    def mix(self, micro_batch: int) -> Mix:
        return ((Demand(micro_batch * self._size), 1 / micro_batch),)

    def work(self, replica: Replica, records: int) -> float:
        """About what a simulation asks of this rank: in steps, by stages."""
        return ceil(records / replica.micro_batch) * (2 * replica.stages)

    def estimate(self, replica: Replica, stages: Sequence[StageCost], records: int) -> float:
        """Seconds of the slowest stage, while the others keep up, and of filling the pipeline."""
        batch = Demand(replica.micro_batch * self._size)
        seconds = [stage.seconds(batch) for stage in stages]
        return (ceil(records / replica.micro_batch) - 1) * max(seconds) + sum(seconds)

    def simulate(self, replica: Replica, stages: Sequence[StageCost], hops: Sequence[Link], records: int) -> Simulated:
        if not records:
            return Simulated(0.0, (0.0,) * replica.stages, 0)
        source = _VirtualBatches(records, replica.micro_batch, self._size)
        return simulate(source, stages, hops, self._row_bytes)

    def record_costs(self, stages: Sequence[StageCost], micro_batch: int, lengths: Sequence[int]) -> EvenCosts:
        ((demand, steps),) = self.mix(micro_batch)
        return EvenCosts(sum(stage.seconds(demand) for stage in stages) * steps, len(lengths))


class _VirtualBatches:
    """Batches in virtual time, each full but the last."""

    def __init__(self, records: int, micro_batch: int, size: float) -> None:
        self._left, self._micro_batch, self._size = records, micro_batch, size

    def next(self) -> Demand | None:
        rows = min(self._left, self._micro_batch)
        self._left -= rows
        return Demand(rows * self._size) if rows else None

    def commit(self) -> None:
        """Nothing comes back."""
