"""How decoder language models are measured, laid out and run."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

from mpinfer.plan.block import ModelSummary
from mpinfer.plan.cost import Rates, speeds_of
from mpinfer.plan.layout import Plan
from mpinfer.records.inputs import Input
from mpinfer.spec import AUTO, JobSpec

if TYPE_CHECKING:  # torch loads only once the cheap checks have passed; planning needs no MPI
    from mpinfer.generate.estimate import DecodeEstimator
    from mpinfer.generate.replica import DecodeRank
    from mpinfer.transport.endpoint import Endpoint


class DecodeEngine:
    """Sequences through a KV cache, a token at a time."""

    def __init__(self, spec: JobSpec, inputs: Any = None) -> None:
        """The model without weights; raises `ModelError`."""
        from mpinfer.models.decoder import DecoderSkeleton

        self._spec = spec
        model = spec.model
        self._skeleton = DecoderSkeleton(Path(model.path), model.dtype, model.quantize, model.weights, model.kernels)
        self.kv_cache_bytes = None if spec.generate.kv_cache_gb == AUTO else int(spec.generate.kv_cache_gb * 1e9)

    @staticmethod
    def inputs(spec: JobSpec, records: Input) -> Any:
        """Token ids are all alike."""
        return None

    def summary(self) -> ModelSummary:
        return self._skeleton.summary(with_head=self._spec.model.task != "embed")

    def estimator(self, records: Input, needs_logits: bool) -> "DecodeEstimator":
        from mpinfer.generate.estimate import DecodeEstimator

        return DecodeEstimator(self._spec, self._skeleton, records, needs_logits)

    def measure(self, device: str, least_s: float) -> Any:
        """What work costs on this rank, in the mean over so many seconds; JSON-able. Raises `ModelError`."""
        from mpinfer.generate.measure import measure

        return measure(self._skeleton, self.summary(), self._spec.generate.step_tokens, device, least_s).to_dict()

    def rates(self, measured: Sequence[tuple[float, Any]]) -> tuple[Rates, list[float]]:
        """Of what all ranks have measured, and how many shared a core meanwhile: the rates of those like the one in the
        middle, and every rank's speed beside theirs."""
        rates = [Rates.from_dict(each).times(1 / crowd) for crowd, each in measured]
        seconds = [sum(each.rows.seconds) + sum(each.serial.seconds) for each in rates]
        speeds = speeds_of(seconds, median_low(seconds))
        own = speeds[seconds.index(median_low(seconds))]
        alike = [each for each, speed in zip(rates, speeds, strict=True) if speed == own]
        return Rates.mean(alike), [speed / own for speed in speeds]

    def build_rank(self, endpoint: "Endpoint", plan: Plan, device: str, needs_logits: bool) -> "DecodeRank":
        from mpinfer.generate.replica import DecodeRank

        return DecodeRank(endpoint, self._spec, plan, self._skeleton, device, needs_logits)
