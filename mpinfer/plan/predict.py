"""How long a run will take, from what one step costs on the very ranks that will run it."""

from collections.abc import Sequence
from dataclasses import dataclass

from mpinfer.plan.block import Workload
from mpinfer.plan.planner import Plan


@dataclass(frozen=True)
class StepTimes:
    """Measured on one rank, after load: its own stage, its own shapes."""

    prefill_s: float  # a step full of prompt tokens
    decode_s: float  # a step of one token for every sequence of a group


def token_costs_s(plan: Plan, step_tokens: int, times: Sequence[StepTimes]) -> tuple[float, float]:
    """Seconds of a replica's ranks for a token of a prompt and for a new one, in full steps."""
    replica = times[: plan.stages]
    return (
        sum(stage.prefill_s for stage in replica) / step_tokens,
        sum(stage.decode_s for stage in replica) / plan.micro_batch,
    )


def predict_wall_s(plan: Plan, workload: Workload, step_tokens: int, times: Sequence[StepTimes]) -> float:
    """Seconds from the first record to the last result; `times` by rank.

    Every replica gets an even share; its slowest stage works without a pause while the others wait for it, once
    the pipeline is full. An estimate: prompts are not tokenized yet, and sequences may stop before their limit.
    """
    if not workload.records:
        return 0.0
    records = -(-workload.records // plan.replicas)
    share = records / workload.records
    prefill_steps = workload.prompt_tokens * share / step_tokens
    decode_steps = workload.new_tokens * share / min(plan.micro_batch, -(-records // plan.in_flight))
    return max(
        _replica_wall_s(prefill_steps, decode_steps, times[first : first + plan.stages])
        for first in range(0, plan.replicas * plan.stages, plan.stages)
    )


def _replica_wall_s(prefill_steps: float, decode_steps: float, stages: Sequence[StepTimes]) -> float:
    slowest = max(prefill_steps * stage.prefill_s + decode_steps * stage.decode_s for stage in stages)
    fill = sum(stage.prefill_s for stage in stages) - max(stage.prefill_s for stage in stages)
    return slowest + fill
