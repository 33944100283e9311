"""Choose the layout: replicas x stages x shards, cuts, groups in flight.

Every layout that the ranks allow is a candidate. Of those whose stages fit their ranks' memory the most promising are
simulated, step by step, and the one that is through first is taken; of equally fast ones the simplest (after AlpaServe,
Li et al. 2023, which also plans by simulating). What the job file gives is obeyed or refused, never adjusted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import ceil
from typing import Any, Protocol

from mpinfer.errors import PlanError
from mpinfer.plan.block import ModelSummary
from mpinfer.plan.cost import Mix, Rates, StageCost, block_seconds, stage_costs
from mpinfer.plan.layout import Plan, Replica
from mpinfer.plan.machine import Link, Machine, Seat
from mpinfer.plan.partition import DoesNotFit, partition
from mpinfer.plan.simulate import Simulated
from mpinfer.spec import AUTO, ParallelSpec

SLACK = 1.25  # slots for what a group may get: shares are even by cost, and the shorter records the more of them
MEMORY_SHARE = 0.7  # of a rank's memory that weights may take
KV_MEMORY_SHARE = 0.85  # that weights and KV cache may take together; the rest is activations and libraries
_SAME = 0.02  # predicted walls so near each other are equal: the simpler layout is taken
_PROMISING, _FINALISTS = 1.3, 8  # by estimates: times the best, and how many, that are simulated
_MOST_WORK = 1_000_000  # of all simulations together, some seconds: the layouts behind keep their estimates
_TURN_S = 0.2e-3  # until a rank that waits has a core back that it shares, about what runs of 4 ranks on 2 cores took
_UNEVEN_REPLICAS = 16  # most replicas of unequal size that are tried, beside those that memory suggests

Run = Callable[[Replica, int], Simulated]
Groups = tuple[tuple[int, ...], ...]  # the ranks of each replica


class Estimator(Protocol):
    """What an engine knows of the records and of its own schedule."""

    @property
    def tokens_per_record(self) -> float:
        """In the KV cache at the end; 0 where there is none."""

    def mix(self, micro_batch: int) -> Mix:
        """What a record asks of the blocks, in full steps."""

    def work(self, replica: Replica, records: int) -> float:
        """About what a simulation asks of this rank: grows with steps, their stages and sequences."""

    def estimate(self, replica: Replica, stages: Sequence[StageCost], records: int) -> float:
        """Seconds for so many records on one replica, without a simulation."""

    def simulate(self, replica: Replica, stages: Sequence[StageCost], hops: Sequence[Link], records: int) -> Simulated:
        """So many records in virtual time on one replica."""

    def record_costs(self, stages: Sequence[StageCost], micro_batch: int, lengths: Sequence[int]) -> Sequence[float]:
        """Seconds of a replica's stages that each record is expected to take, by the bytes of its line."""


@dataclass(frozen=True)
class Candidate:
    """A layout, and what came of it."""

    name: str
    plan: Plan | None = None  # None: it is impossible
    wall_s: float = 0.0
    busy_s: tuple[tuple[float, ...], ...] = ()  # of each replica's stages
    bubble: float = 0.0
    memory_bytes: int = 0  # of weights and the KV cache's least, on the fullest rank
    verdict: str = ""

    def to_dict(self) -> dict[str, Any]:
        known = {"predicted_wall_s": self.wall_s, "bubble": self.bubble, "memory_bytes": self.memory_bytes}
        return {"layout": self.name, **(known if self.plan else {}), "verdict": self.verdict}


@dataclass(frozen=True)
class Choice:
    """The plan that was taken, and all that were looked at, best first."""

    plan: Plan
    wall_s: float
    candidates: tuple[Candidate, ...]

    def to_dict(self) -> dict[str, Any]:
        found = [candidate.to_dict() for candidate in self.candidates]
        return {**self.plan.summary(), "predicted_wall_s": self.wall_s, "candidates": found}


def make_plan(
    parallel: ParallelSpec,
    model: ModelSummary,
    machine: Machine,
    rates: Rates,
    estimator: Estimator,
    records: int,
    kv_cache_bytes: int | None = None,
) -> Choice:
    """Lay `model` out over the ranks of `machine`; raises `PlanError` with figures and the nearest layout that works.

    `kv_cache_bytes`: what a rank's KV cache may take; None: what its weights leave of its memory.
    """
    planner = _Planner(parallel, model, machine, rates, estimator, records, kv_cache_bytes)
    planner.check()
    candidates = planner.candidates()
    if not any(c.plan for c in candidates):
        raise PlanError(planner.refusal(candidates))
    possible = sorted(planner.simulated(candidates), key=lambda c: c.wall_s)
    fastest = possible[0].wall_s
    best = min((c for c in possible if c.wall_s <= (1 + _SAME) * fastest), key=_complexity)
    assert best.plan is not None
    judged = [replace(c, verdict=_verdict(c, best)) for c in possible]
    judged.sort(key=lambda c: c.verdict != "chosen")
    plan = replace(best.plan, reasons=planner.reasons(best.plan))
    return Choice(plan, best.wall_s, (*judged, *(c for c in candidates if not c.plan)))


def describe(choice: Choice, model: ModelSummary, most: int = 8) -> str:
    """The plan as a table for people, with its reasons and the layouts that it was chosen from."""
    plan, chosen = choice.plan, choice.candidates[0]
    what = "sequences" if model.decodes else "records"
    lines = [f"plan: {plan} = {plan.ranks} ranks, expected to run for about {choice.wall_s:.3g} s"]
    alike: dict[Any, list[int]] = {}
    for number, r in enumerate(plan.replicas):
        alike.setdefault((r.stages, r.shards, r.cuts, r.micro_batch, r.in_flight), []).append(number)
    for numbers in alike.values():
        layout, busy_s = plan.replicas[numbers[0]], chosen.busy_s[numbers[0]]
        staged = model.for_stages(layout.stages, layout.shards)
        each = "each " if len(numbers) > 1 else ""
        lines.append(
            f"  replica{'s' * (len(numbers) > 1)} {_spans(numbers)}: {layout.in_flight} groups of {layout.micro_batch} "
            f"{what} in flight, {each}{layout.share:.1%} of the records"
        )
        lines.append(f"  {'stage':>5}  {'blocks':<22} {'weights':>10}  {'work':>6}")
        for stage, (start, stop) in enumerate(pairwise(layout.cuts)):
            first, last = staged.blocks[start].name, staged.blocks[stop - 1].name
            names = first if start == stop - 1 else f"{first} .. {last}"
            megabytes = staged.weight_bytes_of(start, stop) / layout.shards / 1e6
            lines.append(f"  {stage:>5}  {names:<22} {megabytes:>7.1f} MB  {busy_s[stage] / (sum(busy_s) or 1):>6.1%}")
    lines.extend(f"  {reason}" for reason in plan.reasons)
    lines.append(f"  {'layout':<44} {'predicted':>10} {'bubble':>7} {'memory':>10}  verdict")
    for candidate in choice.candidates[:most]:
        figures = f"{'':>10} {'':>7} {'':>10}"
        if candidate.plan:
            megabytes = candidate.memory_bytes / 1e6
            figures = f"{candidate.wall_s:>8.3g} s {candidate.bubble:>7.1%} {megabytes:>7.1f} MB"
        lines.append(f"  {candidate.name:<44} {figures}  {candidate.verdict}")
    if (left := len(choice.candidates) - most) > 0:
        lines.append(f"  and {left} more")
    return "\n".join(lines)


def _spans(numbers: Sequence[int]) -> str:
    whole = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1
    return f"{numbers[0]}-{numbers[-1]}" if whole else ", ".join(map(str, numbers))


class _Planner:
    def __init__(
        self,
        parallel: ParallelSpec,
        model: ModelSummary,
        machine: Machine,
        rates: Rates,
        estimator: Estimator,
        records: int,
        kv_cache_bytes: int | None,
    ) -> None:
        self._parallel, self._model, self._machine, self._rates = parallel, model, machine, rates
        self._estimator, self._records, self._kv_cache_bytes = estimator, records, kv_cache_bytes
        self._seats = machine.seats
        self._models: dict[tuple[bool, int], tuple[ModelSummary, list[float]]] = {}
        self._cuts: dict[Any, tuple[int, ...] | None] = {}  # by what is alike of the ranks
        self._known: dict[Any, Simulated] = {}  # simulations by all that they depend on

    # -- what is asked ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse what no layout could obey. Raises `PlanError`."""
        given, model, ranks = self._parallel, self._model, len(self._seats)
        blocks = len(model.blocks)
        if given.stages != AUTO and given.stages > 1 and model.problem:
            raise PlanError(f"parallel.stages={given.stages}: the model cannot be cut ({model.problem}); use 1 stage")
        if given.stages != AUTO and given.stages > blocks:
            raise PlanError(
                f"parallel.stages={given.stages}: more stages than the model's {blocks} blocks; use at most {blocks}"
            )
        if given.shards != AUTO and given.shards > model.most_shards:
            why = model.shards_problem or f"it has {model.most_shards} groups of heads"
            raise PlanError(
                f"parallel.shards={given.shards}: the model makes at most {model.most_shards} ({why}); use at most "
                f"that{self._nearest()}"
            )
        asked = {name: getattr(given, name) for name in ("replicas", "stages", "shards")}
        asked = {name: number for name, number in asked.items() if number != AUTO}
        product = 1
        for number in asked.values():
            product *= number
        names = " x ".join(f"parallel.{name}={number}" for name, number in asked.items())
        full = asked.keys() >= {"replicas", "stages"}  # but for shards, where the model makes any
        if full and (ranks % product or ranks // product > model.most_shards or (len(asked) == 3 and product != ranks)):
            raise PlanError(
                f"{names}: needs {product} ranks, the world has {ranks}; start {product} ranks or set one of them to "
                f"auto{self._nearest()}"
            )
        uneven = "replicas" in asked and len(asked) == 1 and len(set(self._seats)) > 1
        if product > ranks or (ranks % product and not uneven):
            raise PlanError(
                f"{names}: does not divide {ranks} ranks; start a multiple of {product} ranks{self._nearest()}"
            )
        if given.micro_batch != AUTO and given.micro_batch > model.micro_batch and model.micro_batch_is_fixed:
            raise PlanError(
                f"parallel.micro_batch={given.micro_batch}: the program was exported for batches of "
                f"{model.micro_batch}; use at most that, or export it with a dynamic batch"
            )

    def _nearest(self) -> str:
        """The layout that works and is most like the one that was asked for, as the end of a message."""
        asked = self._parallel
        free = _Planner(
            replace(asked, replicas=AUTO, stages=AUTO, shards=AUTO, in_flight=AUTO),
            *(self._model, self._machine, self._rates, self._estimator, self._records, self._kv_cache_bytes),
        )
        possible = [c.plan for c in free.candidates() if c.plan and len({r.shape for r in c.plan.replicas}) == 1]
        if not possible:
            return ""

        def distance(plan: Plan) -> float:
            first = plan.replicas[0]
            has = {"replicas": len(plan.replicas), "stages": first.stages, "shards": first.shards}
            pairs = [(getattr(asked, name), number) for name, number in has.items()]
            return sum(abs(wanted - number) for wanted, number in pairs if wanted != AUTO)

        nearest = min(possible, key=distance)
        first = nearest.replicas[0]
        return (
            f"; the nearest layout that works here: parallel.replicas={len(nearest.replicas)} "
            f"parallel.stages={first.stages} parallel.shards={first.shards}"
        )

    # -- candidates ------------------------------------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        """Every layout, with estimates."""
        return [self._candidate(groups, shards) for groups, shards in dict.fromkeys(self._groupings())]

    def simulated(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The possible ones; those of them that may be the best once more, by simulation."""
        possible = sorted((c for c in candidates if c.plan), key=lambda c: c.wall_s)
        promising = [c for c in possible if c.wall_s <= _PROMISING * possible[0].wall_s][:_FINALISTS]
        work = accumulate(map(self._work, promising))
        promising = [c for c, so_far in zip(promising, work, strict=True) if so_far <= _MOST_WORK]
        if not promising:
            return possible
        finals = []
        for candidate in promising:
            assert candidate.plan is not None
            groups = tuple(replica.ranks for replica in candidate.plan.replicas)
            finals.append(self._laid_out(candidate.name, groups, candidate.plan.replicas[0].shards, self._simulate))
        slowest = max(c.wall_s for c in finals)
        return finals + [replace(c, wall_s=max(c.wall_s, slowest)) for c in possible[len(finals) :]]

    def _work(self, candidate: Candidate) -> float:
        """Of simulating every kind of replica at every depth."""
        assert candidate.plan is not None
        kinds = {self._kind(replica.ranks): replica for replica in candidate.plan.replicas}.values()
        return sum(
            self._estimator.work(replica, self._records_of(replica.share))
            * len(self._depths(replica.ranks, replica.shards))
            for replica in kinds
        )

    def _groupings(self) -> Iterator[tuple[Groups, int]]:
        """Every way to make replicas of the ranks, each with the number of shards of a stage."""
        given, ranks = self._parallel, len(self._seats)
        most = min(self._model.most_shards, ranks)
        for shards in range(1, most + 1) if given.shards == AUTO else [given.shards]:
            for size in (n for n in range(shards, ranks + 1, shards) if ranks % n == 0):
                stages, replicas = size // shards, ranks // size
                if given.stages in (AUTO, stages) and given.replicas in (AUTO, replicas):
                    yield tuple(tuple(range(first, first + size)) for first in range(0, ranks, size)), shards
        if given.stages == AUTO and given.shards in (AUTO, 1):
            yield from ((groups, 1) for groups in self._uneven() if given.replicas in (AUTO, len(groups)))

    def _uneven(self) -> Iterator[Groups]:
        """Replicas of unequal size: as many as memory allows, or of like summed speed."""
        packed = self._packed()
        if packed:
            yield packed
        speeds = [seat.speed for seat in self._seats]
        ranks = len(speeds)
        if len(set(speeds)) == 1 and len({seat.memory_bytes for seat in self._seats}) == 1:
            return
        counts = {*range(1, min(ranks, _UNEVEN_REPLICAS) + 1), len(packed)} - {0}
        for replicas in sorted(counts if self._parallel.replicas == AUTO else {self._parallel.replicas}):
            cuts = partition(speeds, [1.0] * replicas)
            if len({stop - start for start, stop in pairwise(cuts)}) > 1:
                yield tuple(tuple(range(start, stop)) for start, stop in pairwise(cuts))

    def _packed(self) -> Groups:
        """Replicas of as few ranks as the model fits on, in order; what is left over joins the last one."""
        groups: list[tuple[int, ...]] = []
        members: list[int] = []
        for rank in range(len(self._seats)):
            members.append(rank)
            room = sum(MEMORY_SHARE * self._seats[member].memory_bytes for member in members)
            if room >= self._model.weight_bytes and self._cut(members, 1) is not None:
                groups.append(tuple(members))
                members = []
        if groups and members:
            groups[-1] = (*groups[-1], *members)
        return tuple(groups)

    def _candidate(self, groups: Groups, shards: int) -> Candidate:
        shapes = [(len(group) // shards, shards) for group in groups]
        kinds = {shape: shapes.count(shape) for shape in dict.fromkeys(shapes)}
        name = " + ".join(f"{n} replicas x {stages} stages x {own} shards" for (stages, own), n in kinds.items())
        if problem := self._problem(groups, shards):
            return Candidate(name, verdict=f"impossible: {problem}")
        cuts = {self._kind(group): self._cut(group, shards) for group in groups}
        if None in cuts.values():
            return Candidate(name, verdict=f"refused: {self._too_large(groups, shards)}")
        try:
            return self._laid_out(name, groups, shards, self._estimate)
        except PlanError as error:
            return Candidate(name, verdict=f"refused: {error}")

    def _laid_out(self, name: str, groups: Groups, shards: int, run: Run) -> Candidate:
        """A layout whose stages fit, by its `run`s. Raises `PlanError` where there is no room for a KV cache."""
        replicas, runs = self._share_out(groups, shards, run)
        wall_s = max(run.wall_s for run in runs)
        stages = sum(replica.stages for replica in replicas)
        bubble = max(0.0, 1 - sum(sum(run.busy_s) for run in runs) / (wall_s * stages)) if wall_s else 0.0
        memory = max(self._memory(replica) for replica in {self._kind(r.ranks): r for r in replicas}.values())
        return Candidate(name, Plan(replicas), wall_s, tuple(run.busy_s for run in runs), bubble, memory)

    def _problem(self, groups: Groups, shards: int) -> str:
        stages = max(len(group) for group in groups) // shards
        if stages > (blocks := len(self._model.for_stages(stages, shards).blocks)):
            return f"{stages} stages, but {blocks} blocks"
        if stages > 1 and self._model.problem:
            return f"the model cannot be cut ({self._model.problem})"
        teams = (group[i : i + shards] for group in groups for i in range(0, len(group), shards))
        if any(len({self._seats[rank].node for rank in team}) > 1 for team in teams):
            return "shards would talk across nodes at every layer"
        given = self._parallel.in_flight
        if given != AUTO and given < (least := max(self._at_work(group, shards) for group in groups)):
            return (
                f"parallel.in_flight={given} leaves some of {least} stages that have a core idle; use at least {least}"
            )
        return ""

    def _cut(self, ranks: Sequence[int], shards: int) -> tuple[int, ...] | None:
        """Cuts for a replica on these ranks; None when they do not hold it."""
        key = self._kind(ranks), shards
        if key not in self._cuts:
            model, costs = self._staged(len(ranks) // shards, shards)
            seats = self._slowest(ranks, shards, by_memory=True)
            limits = [MEMORY_SHARE * shards * seat.memory_bytes for seat in seats]
            speeds = [seat.speed for seat in self._slowest(ranks, shards)]
            try:
                self._cuts[key] = partition(costs, speeds, model.weight_bytes_of, limits)
            except DoesNotFit:
                self._cuts[key] = None
        return self._cuts[key]

    def _staged(self, stages: int, shards: int) -> tuple[ModelSummary, list[float]]:
        """The model as so many stages hold it, and what a record asks of each block, prefill and decode weighed as the
        job mixes them."""
        key = stages > 1 and shards == 1, shards
        if key not in self._models:
            model = self._model.for_stages(stages, shards)
            self._models[key] = model, block_seconds(model, self._rates, self._estimator.mix(model.micro_batch))
        return self._models[key]

    def _slowest(self, ranks: Sequence[int], shards: int, by_memory: bool = False) -> list[Seat]:
        """Of each stage the rank that the others wait for, or the one with least memory."""
        teams = [[self._seats[rank] for rank in ranks[i : i + shards]] for i in range(0, len(ranks), shards)]
        return [min(team, key=lambda seat: seat.memory_bytes if by_memory else seat.speed) for team in teams]

    def _too_large(self, groups: Groups, shards: int) -> str:
        """Why the first replica that does not hold the model does not."""
        group = next(group for group in groups if self._cut(group, shards) is None)
        model, costs = self._staged(len(group) // shards, shards)
        cuts = partition(costs, [seat.speed for seat in self._slowest(group, shards)])
        memory = min(self._seats[rank].memory_bytes for rank in group)
        largest = max(model.weight_bytes_of(*ends) for ends in pairwise(cuts)) / shards
        limit = MEMORY_SHARE * memory
        return (
            f"largest stage has {largest / 1e6:.1f} MB of weights a rank, and {MEMORY_SHARE:.0%} may be weights: "
            f"{limit / 1e6:.1f} MB"
        )

    # -- what a layout takes ---------------------------------------------------------------------------------------

    def _share_out(self, groups: Groups, shards: int, run: Run) -> tuple[tuple[Replica, ...], list[Simulated]]:
        """Replicas with their shares of the records, which they get as fast as they ask, and their runs."""
        shares = [1 / len(groups)] * len(groups)
        alike = len({self._kind(group) for group in groups}) == 1
        for _ in range(1 if alike else 3):
            pairs = [self._fastest(group, shards, share, run) for group, share in zip(groups, shares, strict=True)]
            rates = [replica.share / max(own.wall_s, 1e-9) for replica, own in pairs]
            shares = [rate / sum(rates) for rate in rates]
        return tuple(replica for replica, _ in pairs), [own for _, own in pairs]

    def _fastest(self, ranks: tuple[int, ...], shards: int, share: float, run: Run) -> tuple[Replica, Simulated]:
        """The groups in flight that bring a replica through its share first."""
        cuts = self._cut(ranks, shards)
        assert cuts is not None
        stages = len(ranks) // shards
        records = self._records_of(share)
        tried = []
        for in_flight in self._depths(ranks, shards):
            for micro_batch in self._batches(records, in_flight):
                replica = Replica(ranks, stages, shards, cuts, micro_batch, in_flight, 0, share)
                if self._model.decodes:
                    replica = replace(replica, kv_tokens=self._kv_tokens(replica))
                tried.append((replica, run(replica, records)))
        fastest = min(own.wall_s for _, own in tried)
        return next((replica, own) for replica, own in tried if own.wall_s <= (1 + _SAME) * fastest)

    def _records_of(self, share: float) -> int:
        return ceil(self._records * share - 1e-9)

    def _at_work(self, ranks: Sequence[int], shards: int) -> int:
        """Stages that have a core at the same time: where ranks share cores, fewer groups keep every core busy, and
        larger ones compute faster."""
        return ceil(sum(min(1.0, self._seats[rank].cores) for rank in ranks) / shards - 1e-9)

    def _depths(self, ranks: Sequence[int], shards: int) -> list[int]:
        stages = len(ranks) // shards
        if self._parallel.in_flight != AUTO:
            return [self._parallel.in_flight]
        if not self._model.decodes:
            return [2 * stages]  # nothing comes back to the first stage: one micro-batch more waits before each
        at_work = self._at_work(ranks, shards)
        return [at_work, at_work + 1] if stages > 1 else [at_work]

    def _batches(self, records: int, in_flight: int) -> list[int]:
        if self._parallel.micro_batch != AUTO:
            return [self._parallel.micro_batch]
        most = self._model.micro_batch
        if self._model.decodes:
            return [max(1, min(ceil(records / in_flight * SLACK), most))]
        if self._model.micro_batch_is_fixed:
            return [most]
        sizes = {max(1, min(records, most >> halvings)) for halvings in range(3)}
        return sorted(sizes, reverse=True)

    def _simulate(self, replica: Replica, records: int) -> Simulated:
        stages, hops = replica_costs(self._model, self._machine, self._rates, replica)
        return self._once(replica, records, lambda: self._estimator.simulate(replica, stages, hops, records))

    def _estimate(self, replica: Replica, records: int) -> Simulated:
        def run() -> Simulated:
            stages, _ = replica_costs(self._model, self._machine, self._rates, replica)
            wall_s = self._estimator.estimate(replica, stages, records)
            mix = self._estimator.mix(replica.micro_batch)
            busy = (records * sum(steps * stage.seconds(demand) for demand, steps in mix) for stage in stages)
            return Simulated(wall_s, tuple(min(wall_s, seconds) for seconds in busy), 0)

        return self._once(replica, -records, run)

    def _once(self, replica: Replica, key: int, run: Callable[[], Simulated]) -> Simulated:
        """What a replica takes, with the cores that its ranks have; replicas that are alike are asked once."""
        keys = (self._kind(replica.ranks), replica.shards, replica.micro_batch, replica.in_flight, key)
        if keys not in self._known:
            cores = sum(min(1.0, self._seats[rank].cores) for rank in replica.ranks)
            self._known[keys] = run().on_cores(cores, replica.shards)
        return self._known[keys]

    def _kind(self, ranks: Sequence[int]) -> Any:
        """What is alike of groups of ranks that are as good as each other."""
        first = self._seats[ranks[0]].node
        return tuple(
            (seat.node - first, seat.memory_bytes, seat.speed, seat.cores)
            for seat in map(self._seats.__getitem__, ranks)
        )

    def _memory(self, replica: Replica) -> int:
        """Bytes of weights and of the KV cache for the records at work, of the fullest rank."""
        model = self._model.for_stages(replica.stages, replica.shards)
        tokens = min(replica.kv_tokens, self._estimator.tokens_per_record * replica.micro_batch * replica.in_flight)
        parts = (
            model.weight_bytes_of(*ends) + tokens * model.kv_bytes_per_token_of(*ends)
            for ends in pairwise(replica.cuts)
        )
        return int(max(parts) / replica.shards)

    def _kv_tokens(self, replica: Replica) -> int:
        """The tokens that the tightest stage has room for. Raises `PlanError` when there is none."""
        tokens, room, weights, memory = min(self._kv_rooms(replica))
        if tokens < 1:
            raise PlanError(
                f"KV cache of {room / 1e6:.0f} MB a rank: has no room for a token (a rank has {memory / 1e6:.0f} MB, "
                f"of which weights take {weights / 1e6:.0f} MB); use more stages, or raise generate.kv_cache_gb"
            )
        return tokens

    def _kv_rooms(self, replica: Replica) -> Iterator[tuple[int, int, int, int]]:
        """Of each stage's poorest rank: tokens, bytes of the cache, of weights, and of memory."""
        model = self._model.for_stages(replica.stages, replica.shards)
        seats = self._slowest(replica.ranks, replica.shards, by_memory=True)
        most_heads = ceil(model.most_shards / replica.shards) / model.most_shards  # of the shard that has most
        for seat, (start, stop) in zip(seats, pairwise(replica.cuts), strict=True):
            weights = ceil(model.weight_bytes_of(start, stop) / replica.shards)
            room = int(KV_MEMORY_SHARE * seat.memory_bytes) - weights
            room = room if self._kv_cache_bytes is None else self._kv_cache_bytes
            token = ceil(model.kv_bytes_per_token_of(start, stop) * most_heads)
            yield room // max(1, token), room, weights, seat.memory_bytes

    # -- why -------------------------------------------------------------------------------------------------------

    def reasons(self, plan: Plan) -> tuple[str, ...]:
        reasons = []
        if self._model.problem:
            reasons.append(f"the model runs whole, in replicas only: {self._model.problem}")
        speeds = [seat.speed for seat in self._seats]
        if max(speeds) > 1.1 * min(speeds):
            slowest = speeds.index(min(speeds))
            reasons.append(
                f"ranks differ in speed: rank {slowest} has {min(speeds) / max(speeds):.2f} of the fastest's"
            )
        if self._model.decodes:
            tokens, room, _, _ = min(room for replica in plan.replicas for room in self._kv_rooms(replica))
            given = "what weights leave" if self._kv_cache_bytes is None else "as given"
            reasons.append(
                f"KV cache up to {room / 1e6:.0f} MB a rank ({given}): room for {tokens} tokens at work in a replica"
            )
        return tuple(reasons)

    def refusal(self, candidates: Sequence[Candidate]) -> str:
        """Why nothing is possible, and what would be."""
        if self._parallel.replicas != AUTO or self._parallel.stages != AUTO or self._parallel.shards != AUTO:
            names = [n for n in ("replicas", "stages", "shards") if getattr(self._parallel, n) != AUTO]
            asked = " ".join(f"parallel.{name}={getattr(self._parallel, name)}" for name in names)
            why = candidates[0].verdict if candidates else "no such layout of these ranks"
            return f"{asked}: {why}{self._nearest() or self._enough()}"
        if self._parallel.in_flight != AUTO and "in_flight" in candidates[0].verdict:
            return candidates[0].verdict.removeprefix("impossible: ")
        least = min(seat.memory_bytes for seat in self._seats)
        why = candidates[-1].verdict if candidates else ""
        return (
            f"model of {self._model.weight_bytes / 1e6:.0f} MB: does not fit {len(self._seats)} ranks of "
            f"{least / 1e6:.0f} MB ({why}){self._enough()}"
        )

    def _enough(self) -> str:
        """How many ranks like these, or how much memory, would do; as the end of a message."""
        poorest = min(self._seats, key=lambda seat: seat.memory_bytes)
        shards = 1 if self._parallel.shards == AUTO else self._parallel.shards
        blocks = len(self._model.for_stages(1, shards).blocks)
        needs = []
        for stages in range(1, 1 + (1 if self._model.problem else blocks)):
            model = self._model.for_stages(stages, shards)
            limit = _least_limit(model, stages)
            needs.append((stages * shards, limit / shards / MEMORY_SHARE))
        ranks = next((ranks for ranks, need in needs if need <= poorest.memory_bytes), None)
        here = max((n for n in needs if n[0] <= len(self._seats)), key=lambda n: n[0], default=needs[0])
        memory = f"{here[1] / 1e6:.0f} MB a rank (parallel.memory_limit_gb={_up(here[1] / 1e9)}) on {here[0]} ranks"
        return f"; start at least {ranks} ranks, or have {memory}" if ranks else f"; it takes {memory}"


def replica_costs(
    model: ModelSummary, machine: Machine, rates: Rates, replica: Replica
) -> tuple[list[StageCost], list[Link]]:
    """What a step costs every stage of a replica, and the links between them, the last one back to the first."""
    teams = [replica.stage_ranks(stage) for stage in range(replica.stages)]
    speeds = [min(machine.seats[rank].speed for rank in team) for team in teams]
    links = [_between_shards(machine, team) for team in teams]
    heads = [*(team[0] for team in teams), teams[0][0]]
    hops = [machine.link(a, b) for a, b in pairwise(heads)]
    staged = model.for_stages(replica.stages, replica.shards)
    return stage_costs(staged, rates, replica.cuts, speeds, replica.shards, links), hops


def _between_shards(machine: Machine, team: Sequence[int]) -> Link:
    """The link over which shards add up; where ranks share cores, the others are not there when a message comes."""
    link = machine.slowest_link(team)
    if all(machine.seats[rank].cores >= 1 for rank in team):
        return link
    return replace(link, latency_s=link.latency_s + _TURN_S)


def _least_limit(model: ModelSummary, stages: int) -> int:
    """The smallest memory for weights with which so many stages hold the model."""
    sizes = [float(model.weight_bytes_of(block, block + 1)) for block in range(len(model.blocks))]
    cuts = partition(sizes, [1.0] * stages)
    return max(model.weight_bytes_of(*ends) for ends in pairwise(cuts))


def _up(gigabytes: float) -> float:
    """Rounded up to a figure that people type."""
    return ceil(gigabytes * 100) / 100


def _complexity(candidate: Candidate) -> tuple[int, int, float]:
    """Less is simpler: whole models before pipelines, pipelines before shards."""
    assert candidate.plan is not None
    replicas = candidate.plan.replicas
    return max(r.shards for r in replicas), max(r.stages for r in replicas), candidate.wall_s


def _verdict(candidate: Candidate, best: Candidate) -> str:
    if candidate is best:
        return "chosen"
    slower = candidate.wall_s / best.wall_s - 1 if best.wall_s else 0.0
    if slower <= _SAME:
        return f"as fast ({slower:+.1%}), less simple"
    return f"{slower:.0%} slower"
