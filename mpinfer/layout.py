"""Lay a job out over the ranks of this world: the model without weights, what its work costs here, the plan."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mpinfer.cluster.allocation import machine_links
from mpinfer.cluster.describe import load_cluster
from mpinfer.cluster.memory import local_memory_bytes
from mpinfer.engine import ENGINES, Engine
from mpinfer.plan.block import ModelSummary
from mpinfer.plan.cost import Demand, Rates, Timed
from mpinfer.plan.layout import Plan, Replica
from mpinfer.plan.machine import Machine, Seat
from mpinfer.plan.planner import Estimator, describe, make_plan, replica_costs
from mpinfer.preview import FirstLook, memory_limit
from mpinfer.spec import AUTO, JobSpec
from mpinfer.transport.endpoint import agree, everywhere, library_version
from mpinfer.transport.probe import measure_links
from mpinfer.version import VERSION
from mpinfer.world import World, check_model_copies

if TYPE_CHECKING:  # torch loads only once the cheap checks have passed and threads are bound
    from mpinfer.engine import Rank

# Measuring may take this share of what a slow rank alone would compute, within limits: a better plan would save a short
# run less than it costs.
_MEASURING_SHARE, _MEASURING_S = 0.05, (0.2, 1.0)
_SLOW_FLOPS_PER_S, _BYTES_A_TOKEN = 1e10, 4
_TIMING_BY_TURNS_S = 0.3  # where ranks share cores: many turns of each, whoever begins first
_TIMING_SHARE, _TIMING_S = 0.01, (0.05, 0.2)  # the same for each step on loaded stages, of the predicted wall


@dataclass(frozen=True)
class Expected:
    """What the run is expected to take, from steps timed on the loaded stages."""

    wall_s: float
    record_s: Sequence[float]  # of a replica's stages, for each record
    speeds: dict[int, float]  # records a second, by the rank that leads a replica


@dataclass(frozen=True)
class Basis:
    """What a plan was made from; rank 0's."""

    model: ModelSummary
    machine: Machine
    rates: Rates
    estimator: Estimator


@dataclass(frozen=True)
class Layout:
    """What every rank knows before it loads."""

    engine: Engine  # the model, without weights
    plan: Plan
    needs_logits: bool
    planned_s: float  # the wall that was predicted for the plan
    basis: Basis | None  # rank 0's

    def expect(self, steps: Sequence[Sequence[Timed]], records: int, lengths: Sequence[int]) -> Expected:
        """Of so many records, where each rank has timed these steps. Rank 0 asks."""
        assert self.basis is not None
        basis, walls, speeds = self.basis, [0.0], {}
        record_s: Sequence[float] = ()
        for replica in self.plan.replicas:
            costs, hops = replica_costs(basis.model, basis.machine, basis.rates, replica)
            alike = [other for other in self.plan.replicas if self._kind(other) == self._kind(replica)]
            costs = [cost.corrected(_timed(steps, alike, stage)) for stage, cost in enumerate(costs)]
            share = round(records * replica.share) if len(self.plan.replicas) > 1 else records
            cores = sum(min(1.0, basis.machine.seats[rank].cores) for rank in replica.ranks)
            run = basis.estimator.simulate(replica, costs, hops, max(1, share)).on_cores(cores, replica.shards)
            walls.append(run.wall_s if records else 0.0)
            speeds[replica.leader] = max(1, share) / run.wall_s if run.wall_s else 1.0
            record_s = record_s or basis.estimator.record_costs(costs, replica.micro_batch, lengths)
        return Expected(max(walls), record_s, speeds)

    def _kind(self, replica: Replica) -> Any:
        """What is alike of replicas that should be as fast as each other."""
        assert self.basis is not None
        speeds = [self.basis.machine.seats[rank].speed for rank in replica.ranks]
        return replica.stages, replica.shards, replica.cuts, replica.micro_batch, speeds


def _timed(steps: Sequence[Sequence[Timed]], replicas: Sequence[Replica], stage: int) -> list[Timed]:
    """The steps of a stage, by the slowest of its shards, in the mean over replicas."""
    each = [[steps[rank] for rank in replica.stage_ranks(stage)] for replica in replicas]
    slowest = [[max(step.seconds for step in same) for same in zip(*shards, strict=True)] for shards in each]
    return [Timed(s.demand, fmean(same)) for s, same in zip(each[0][0], zip(*slowest, strict=True), strict=True)]


def lay_out(world: World, spec: JobSpec, look: FirstLook | None) -> Layout:
    """The model without weights, and the plan that rank 0 makes of it; `look` is rank 0's."""
    check_model_copies(world, spec.model.path)
    engine: Engine | None = None

    def second_look() -> dict[str, Any]:
        """What rank 0 alone can refuse with torch; the others' imports would only slow it down."""
        assert look is not None
        nonlocal engine
        inputs = ENGINES[look.kind].inputs(spec, look.records)
        if world.is_crowded:
            engine = ENGINES[look.kind](spec, inputs)
        return {"kind": look.kind, "inputs": inputs, "needs_logits": look.needs_logits}

    told = agree(world.endpoint, second_look)
    engine = everywhere(world.endpoint, lambda: engine or ENGINES[told["kind"]](spec, told["inputs"]))
    world.lap("model")
    machine = _survey(world, spec)
    world.lap("links")
    known: tuple[Estimator, ModelSummary] | None = None
    basis: Basis | None = None

    def sample() -> float:
        """What rank 0 finds out alone, while no other rank disturbs its timings. Returns how long ranks measure."""
        nonlocal known
        assert look is not None
        known = engine.estimator(look.records, look.needs_logits), engine.summary()
        return _within(_MEASURING_S, _MEASURING_SHARE * _slowly_s(look, known[1]))

    measuring_s = agree(world.endpoint, sample)
    own = everywhere(world.endpoint, lambda: engine.measure(device(world, spec), measuring_s))
    measured = world.endpoint.all_gather([_crowd(world), own])
    world.lap("measuring")

    def plan_it() -> dict[str, Any]:
        nonlocal basis
        assert known is not None
        assert look is not None
        estimator, model = known
        rates, speeds = engine.rates(measured)
        seats = machine.seats
        if spec.parallel.cluster == AUTO:
            seats = tuple(replace(seat, speed=speed) for seat, speed in zip(seats, speeds, strict=True))
        basis = Basis(model, replace(machine, seats=seats), rates, estimator)
        records = len(look.records)
        choice = make_plan(spec.parallel, model, basis.machine, rates, estimator, records, engine.kv_cache_bytes)
        world.say(
            f"{VERSION}, ranks {world.endpoint.size}, nodes {world.nodes}, launcher {world.context.launcher}, "
            f"threads a rank {world.binding.threads} ({world.binding.reason})"
        )
        world.say(describe(choice, model))
        return {"plan": choice.plan.to_dict(), "wall_s": choice.wall_s}

    answer = agree(world.endpoint, plan_it)
    plan = Plan.from_dict(answer["plan"])
    world.place = str(plan.coordinates(world.endpoint.rank))
    world.lap("plan")
    return Layout(engine, plan, told["needs_logits"], answer["wall_s"], basis)


def _slowly_s(look: FirstLook, model: ModelSummary) -> float:
    """Seconds that a slow rank alone would compute."""
    row_cost = sum(block.cost_per_token for block in model.blocks)
    if not model.decodes:
        return look.size["records"] * row_cost
    tokens = look.size["record_bytes"] / _BYTES_A_TOKEN + look.size["new_tokens"]
    return tokens * row_cost / _SLOW_FLOPS_PER_S


def _within(limits: tuple[float, float], value: float) -> float:
    return min(max(value, limits[0]), limits[1])


def time_steps(world: World, rank: "Rank", planned_s: float) -> list[list[Timed]]:
    """Steps that every rank has timed on its stage, by rank; the run is planned to take so long."""
    least_s = _TIMING_BY_TURNS_S if _crowd(world) > 1 else _within(_TIMING_S, _TIMING_SHARE * planned_s)
    own = everywhere(world.endpoint, lambda: rank.timed_steps(least_s))
    timed = world.endpoint.all_gather([[asdict(step.demand), step.seconds / _crowd(world)] for step in own])
    return [[Timed(Demand(**demand), seconds) for demand, seconds in steps] for steps in timed]


def device(world: World, spec: JobSpec) -> str:
    """Where this rank computes. Raises `SpecError`."""
    from mpinfer.pipeline.device import choose_device

    return choose_device(spec.model.device, world.local_rank)


def _survey(world: World, spec: JobSpec) -> Machine:
    """The ranks and links of this world; the ranks' speeds are not known yet. As described, where the job says so."""
    endpoint = world.endpoint
    memory_bytes = memory_limit(spec, local_memory_bytes() // world.local_size)
    facts = endpoint.all_gather([world.context.node, memory_bytes, world.cores_per_rank])
    if spec.parallel.cluster != AUTO:
        return everywhere(endpoint, lambda: load_cluster(spec.parallel.cluster, endpoint.size))
    names = [node for node, _, _ in facts]
    numbers = {node: number for number, node in enumerate(dict.fromkeys(names))}
    nodes = [numbers[node] for node in names]
    links = machine_links(endpoint, names, library_version(), lambda: measure_links(endpoint, nodes))
    world.say(str(links))
    seats = tuple(Seat(numbers[node], memory, cores=cores) for node, memory, cores in facts)
    return Machine(seats, links.inside, links.between or links.inside)


def _crowd(world: World) -> float:
    """Ranks to a core while all of a node's compute at once, as in a run, and while they measure; at least 1."""
    return 1 / world.cores_per_rank
