"""Choose the layout: how many replicas and stages, where the cuts lie, how much is in flight.

A simple rule for now: as few stages as memory allows, everything else replicas; cuts that make the slowest
stage as fast as possible by FLOPs. What the job file gives is obeyed or refused, never adjusted.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from typing import Any

from mpinfer.errors import PlanError
from mpinfer.plan.block import ModelSummary, Workload, costs
from mpinfer.plan.grid import Grid
from mpinfer.plan.partition import part_costs, partition
from mpinfer.spec import AUTO, ParallelSpec

SLACK = 1.25  # slots for what a group may get: shares are even by cost, and the shorter records the more of them
MEMORY_SHARE = 0.7  # of a rank's memory that weights may take
KV_MEMORY_SHARE = 0.85  # that weights and KV cache may take together; the rest is activations and libraries


@dataclass(frozen=True)
class Plan:
    """The layout of a job. `cuts` are block indices: stage s holds blocks [cuts[s], cuts[s+1])."""

    replicas: int
    stages: int
    shards: int
    cuts: tuple[int, ...]
    micro_batch: int  # sequences or records in a group
    in_flight: int  # groups of a replica
    kv_tokens: int  # of all sequences of a replica at work, that every stage's KV cache has room for
    reasons: tuple[str, ...]

    @property
    def grid(self) -> Grid:
        return Grid(self.replicas, self.stages, self.shards)

    def blocks_of(self, stage: int) -> tuple[int, int]:
        return self.cuts[stage], self.cuts[stage + 1]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Plan":
        return cls(**{**tree, "cuts": tuple(tree["cuts"]), "reasons": tuple(tree["reasons"])})


def make_plan(
    parallel: ParallelSpec,
    model: ModelSummary,
    workload: Workload,
    rank_memory_bytes: Sequence[int],
    kv_cache_bytes: int | None = None,
    cores_per_rank: float = 1.0,
) -> Plan:
    """Lay `model` out over one rank per entry of `rank_memory_bytes`; raises `PlanError` with figures.

    `kv_cache_bytes`: what a rank's KV cache may take; None: what its weights leave of its memory. Where ranks outnumber
    cores (`cores_per_rank` below 1), fewer groups keep every core busy, and larger ones compute faster.
    """
    ranks, blocks = len(rank_memory_bytes), len(model.blocks)
    reasons: list[str] = [f"the model runs whole, in replicas only: {model.problem}"] if model.problem else []
    shards = 1
    stages = _given_or(parallel.stages, lambda: _fewest_stages(parallel, model, workload, rank_memory_bytes, reasons))
    if stages > 1 and model.problem:
        raise PlanError(f"parallel.stages={stages}: the model cannot be cut ({model.problem}); use 1 stage")
    if stages > blocks:
        raise PlanError(f"parallel.stages={stages}: more stages than the model's {blocks} blocks; use at most {blocks}")
    if ranks % stages:
        raise PlanError(
            f"parallel.stages={stages}: does not divide {ranks} ranks; start a multiple of {stages} ranks "
            f"or choose a divisor of {ranks}"
        )
    replicas = _given_or(parallel.replicas, lambda: ranks // stages)
    if replicas * stages * shards != ranks:
        raise PlanError(
            f"parallel.replicas={replicas} x parallel.stages={stages}: needs {replicas * stages} ranks, the world has "
            f"{ranks}; start {replicas * stages} ranks or set one of them to auto"
        )
    model = model.for_stages(stages)
    cuts = partition(costs(model.blocks, workload), stages)
    kv_tokens = _kv_tokens(model, cuts, rank_memory_bytes, kv_cache_bytes, reasons) if model.decodes else 0
    at_work = ceil(stages * min(1.0, cores_per_rank))  # stages that have a core at the same time
    # Without a KV cache nothing comes back to the first stage: one micro-batch more waits before each.
    in_flight = _given_or(parallel.in_flight, lambda: at_work if model.decodes else 2 * stages)
    if in_flight < at_work:
        raise PlanError(
            f"parallel.in_flight={in_flight}: fewer groups than the {at_work} stages that have a core leave some idle; "
            f"use at least {at_work}"
        )
    share = workload.records / (replicas * in_flight)
    slack = SLACK if model.decodes else 1.0
    micro_batch = _given_or(parallel.micro_batch, lambda: min(ceil(share * slack), model.micro_batch))
    if parallel.micro_batch == AUTO:
        more = f" and {slack - 1:.0%} more" if model.decodes else ""
        reasons.append(
            f"micro_batch {micro_batch}: {workload.records} records over {replicas * in_flight} groups{more}, at most "
            f"{model.micro_batch}"
        )
    if micro_batch > model.micro_batch and model.micro_batch_is_fixed:
        raise PlanError(
            f"parallel.micro_batch={micro_batch}: the program was exported for batches of {model.micro_batch}; use at "
            f"most that, or export it with a dynamic batch"
        )
    return Plan(replicas, stages, shards, cuts, micro_batch, in_flight, kv_tokens, tuple(reasons))


def describe(plan: Plan, model: ModelSummary, workload: Workload) -> str:
    """The plan as a table for people, with the reasons for what it chose."""
    model = model.for_stages(plan.stages)
    total = costs(model.blocks, workload)
    parts = part_costs(total, plan.cuts)
    lines = [
        f"plan: {plan.grid} = {plan.grid.size} ranks, {plan.in_flight} groups of {plan.micro_batch} "
        f"{'sequences' if model.decodes else 'records'} in flight per replica",
        f"  {'stage':>5}  {'blocks':<22} {'weights':>10}  {'work':>6}",
    ]
    for stage, (start, stop) in enumerate(pairwise(plan.cuts)):
        first, last = model.blocks[start].name, model.blocks[stop - 1].name
        names = first if start == stop - 1 else f"{first} .. {last}"
        megabytes = model.weight_bytes_of(start, stop) / 1e6
        lines.append(f"  {stage:>5}  {names:<22} {megabytes:>7.1f} MB  {parts[stage] / sum(parts):>6.1%}")
    even = sum(parts) / len(parts)
    lines.append(f"  slowest stage {max(parts) / even:.2f}x the mean")
    lines.extend(f"  {reason}" for reason in plan.reasons)
    return "\n".join(lines)


def _given_or(value: Any, choose: Any) -> int:
    return choose() if value == AUTO else value


def _kv_tokens(
    model: ModelSummary,
    cuts: Sequence[int],
    rank_memory_bytes: Sequence[int],
    kv_cache_bytes: int | None,
    reasons: list[str],
) -> int:
    """The tokens that the tightest stage has room for. Raises `PlanError` when there is none."""
    memory = min(rank_memory_bytes)
    rooms = []  # tokens, bytes and bytes of weights by stage
    for start, stop in pairwise(cuts):
        weights = model.weight_bytes_of(start, stop)
        room = int(KV_MEMORY_SHARE * memory) - weights if kv_cache_bytes is None else kv_cache_bytes
        rooms.append((room // max(1, model.kv_bytes_per_token_of(start, stop)), room, weights))
    tokens, room, weights = min(rooms)
    if tokens < 1:
        raise PlanError(
            f"KV cache of {room / 1e6:.0f} MB a rank: has no room for a token (a rank has {memory / 1e6:.0f} MB, of "
            f"which weights take {weights / 1e6:.0f} MB); use more stages, or raise generate.kv_cache_gb"
        )
    given = "what weights leave" if kv_cache_bytes is None else "as given"
    reasons.append(
        f"KV cache up to {room / 1e6:.0f} MB a rank ({given}): room for {tokens} tokens at work in a replica"
    )
    return tokens


def _fewest_stages(
    parallel: ParallelSpec,
    model: ModelSummary,
    workload: Workload,
    rank_memory_bytes: Sequence[int],
    reasons: list[str],
) -> int:
    """The smallest divisor of the ranks whose every stage fits the memory of the poorest rank."""
    ranks = len(rank_memory_bytes)
    if parallel.replicas != AUTO:
        if ranks % parallel.replicas:
            raise PlanError(
                f"parallel.replicas={parallel.replicas}: does not divide {ranks} ranks; start a multiple of "
                f"{parallel.replicas} ranks or choose a divisor of {ranks}"
            )
        reasons.append(f"stages {ranks // parallel.replicas}: {ranks} ranks / {parallel.replicas} replicas as given")
        return ranks // parallel.replicas
    limit = MEMORY_SHARE * min(rank_memory_bytes)
    largest = 0
    for stages in (n for n in range(1, ranks + 1) if ranks % n == 0 and n <= len(model.blocks)):
        split = model.for_stages(stages)
        cuts = partition(costs(split.blocks, workload), stages)
        largest = max(split.weight_bytes_of(start, stop) for start, stop in pairwise(cuts))
        verdict = f"{stages} stages: largest {largest / 1e6:.1f} MB of weights against {limit / 1e6:.0f} MB a rank"
        if largest <= limit:
            reasons.append(f"{verdict}, fits: fewest stages win")
            return stages
        reasons.append(f"{verdict}, refused")
    raise PlanError(
        f"model of {model.weight_bytes / 1e6:.0f} MB: does not fit {ranks} ranks of "
        f"{min(rank_memory_bytes) / 1e6:.0f} MB (best cut leaves {largest / 1e6:.0f} MB on one rank, "
        f"{MEMORY_SHARE:.0%} may be weights); start more ranks"
    )
