"""How models of any other kind are laid out and run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpinfer.plan.block import ModelSummary, Workload
from mpinfer.plan.planner import Plan
from mpinfer.plan.predict import StepTimes
from mpinfer.records.inputs import Input
from mpinfer.spec import JobSpec

if TYPE_CHECKING:  # torch loads only once the cheap checks have passed; planning needs no MPI
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

    @staticmethod
    def inputs(spec: JobSpec, records: Input) -> Any:
        """What the records are like, for rank 0 to tell; JSON-able. Raises `InputError`."""
        from mpinfer.forward.first import input_shapes, shapes_to_json

        return shapes_to_json(input_shapes(spec, records))

    def summary(self) -> ModelSummary:
        return self._skeleton.summary()

    def workload(self, records: int, record_bytes: int, new_tokens: int) -> Workload:
        """A record is what a token is to a decoder: the unit of work."""
        return Workload(records, float(records), 0.0, 0.0)

    def step_size(self, plan: Plan) -> int:
        """Records of a full step, as timed."""
        return plan.micro_batch

    def record_costs(
        self, plan: Plan, work: Workload, times: Sequence[StepTimes], lengths: Sequence[int]
    ) -> Sequence[float]:
        return [1.0] * len(lengths)

    def build_rank(self, endpoint: "Endpoint", plan: Plan, device: str, needs_logits: bool) -> "ForwardRank":
        from mpinfer.forward.replica import ForwardRank

        return ForwardRank(endpoint, self._spec, plan, self._skeleton, device)
