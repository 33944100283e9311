"""How decoder language models are laid out and run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpinfer.plan.block import ModelSummary, Workload
from mpinfer.plan.planner import Plan
from mpinfer.plan.predict import StepTimes, token_costs_s
from mpinfer.spec import AUTO, JobSpec

if TYPE_CHECKING:  # torch loads only once the cheap checks have passed; planning needs no MPI
    from mpinfer.generate.replica import DecodeRank
    from mpinfer.transport.endpoint import Endpoint

BYTES_PER_TOKEN = 4.0  # of a prompt, before it is tokenized


class DecodeEngine:
    """Sequences through a KV cache, a token at a time."""

    def __init__(self, spec: JobSpec, inputs: Any = None) -> None:
        """The model without weights; raises `ModelError`."""
        from mpinfer.models.decoder import DecoderSkeleton

        self._spec = spec
        self._skeleton = DecoderSkeleton(Path(spec.model.path), spec.model.dtype, spec.model.quantize)
        self.kv_cache_bytes = None if spec.generate.kv_cache_gb == AUTO else int(spec.generate.kv_cache_gb * 1e9)

    @staticmethod
    def inputs(spec: JobSpec, records: Any) -> Any:
        """Token ids are all alike."""
        return None

    def summary(self) -> ModelSummary:
        return self._skeleton.summary(with_head=self._spec.model.task != "embed")

    def workload(self, records: int, record_bytes: int, new_tokens: int) -> Workload:
        """What is known of the work before the prompts are tokenized; `new_tokens`: the most that records ask for."""
        prompts = record_bytes / BYTES_PER_TOKEN
        match self._spec.model.task:
            case "score":
                return Workload(records, prompts, 0.0, prompts)
            case "embed":
                return Workload(records, prompts, 0.0, 0.0)
        samples = records * self._spec.generate.n
        most = float(min(new_tokens, samples * self._skeleton.max_length))
        return Workload(records, prompts * self._spec.generate.n, most, most)

    def step_size(self, plan: Plan) -> int:
        """Tokens of a full prefill step, as timed."""
        return self._spec.generate.step_tokens

    def record_costs(
        self, plan: Plan, work: Workload, times: Sequence[StepTimes], lengths: Sequence[int]
    ) -> Sequence[float]:
        """Seconds of a replica's ranks that each record is expected to take, by the bytes of its line."""
        prompt_s, new_s = token_costs_s(plan, self.step_size(plan), times)
        new_tokens = work.new_tokens / work.records
        return [prompt_s * length / BYTES_PER_TOKEN + new_s * new_tokens for length in lengths]

    def build_rank(self, endpoint: "Endpoint", plan: Plan, device: str, needs_logits: bool) -> "DecodeRank":
        from mpinfer.generate.replica import DecodeRank

        return DecodeRank(endpoint, self._spec, plan, self._skeleton, device, needs_logits)
