"""How models of any other kind are measured, laid out and run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpinfer.plan.block import ModelSummary
from mpinfer.plan.cost import Rates, speeds_of
from mpinfer.plan.layout import Plan
from mpinfer.records.inputs import Input
from mpinfer.spec import JobSpec

if TYPE_CHECKING:  # torch loads only once the cheap checks have passed; planning needs no MPI
    from mpinfer.forward.estimate import ForwardEstimator
    from mpinfer.forward.replica import ForwardRank
    from mpinfer.transport.endpoint import Endpoint


class ForwardEngine:
    """Batches of records in one pass."""

    kv_cache_bytes = None

    def __init__(self, spec: JobSpec, inputs: Any) -> None:
        """The model without weights, for records with these `inputs`; raises `ModelError`."""
        from mpinfer.forward.first import shapes_from_json
        from mpinfer.models.graph import GraphSkeleton

        self._spec = spec
        self._skeleton = GraphSkeleton(spec, shapes_from_json(inputs))
        self._prepare_s = 0.0

    @staticmethod
    def inputs(spec: JobSpec, records: Input) -> Any:
        """What the records are like, for rank 0 to tell; JSON-able. Raises `InputError`."""
        from mpinfer.forward.first import input_shapes, shapes_to_json

        return shapes_to_json(input_shapes(spec, records))

    def summary(self) -> ModelSummary:
        return self._skeleton.summary()

    def estimator(self, records: Input, needs_logits: bool) -> "ForwardEstimator":
        from mpinfer.forward.estimate import ForwardEstimator

        estimator = ForwardEstimator(self._spec, records, self._skeleton.row_bytes)
        self._prepare_s = estimator.prepare_s
        return estimator

    def measure(self, device: str, least_s: float) -> Any:
        """Seconds of a piece of the model's work on this rank, at best and in the mean over so many seconds."""
        return self._skeleton.probe(least_s)

    def rates(self, measured: Sequence[tuple[float, Any]]) -> tuple[Rates, list[float]]:
        """Of the operations that rank 0 has timed, and every rank's speed beside that, by what each has measured and
        how many shared a core meanwhile: that lengthens the mean alone, since the best is of CPU time."""
        _, (best_s, _) = measured[0]
        own = replace(self._skeleton.rates(), record_s=self._prepare_s)
        return own, speeds_of([mean_s / crowd for crowd, (_, mean_s) in measured], best_s)

    def build_rank(self, endpoint: "Endpoint", plan: Plan, device: str, needs_logits: bool) -> "ForwardRank":
        from mpinfer.forward.replica import ForwardRank

        return ForwardRank(endpoint, self._spec, plan, self._skeleton, device)
