"""Layout, partition, cost, simulation, planner, schedule: who does what, without tensors."""

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpinfer.errors import PlanError
from mpinfer.plan.block import Block, ModelSummary
from mpinfer.plan.cost import ZERO, Curve, Demand, Rates, StageCost, Timed, block_seconds, reckoned, speeds_of
from mpinfer.plan.layout import Coordinates, Plan, Replica
from mpinfer.plan.machine import Hardware, Link, Machine, Seat
from mpinfer.plan.partition import DoesNotFit, part_costs, partition
from mpinfer.plan.planner import describe, make_plan, replica_costs
from mpinfer.plan.schedule import Forward, Receive, Send, stream
from mpinfer.plan.simulate import Simulated, simulate
from mpinfer.spec import ParallelSpec

GIGABYTE = 10**9
FAST = Link(0.0, float("inf"))
PER_ROW = Curve((1.0, 100.0), (1.0, 100.0))  # seconds of a unit: as many as there are rows
RATES = Rates(PER_ROW, ZERO, PER_ROW)


def model(layers=6, tied=True, kv_bytes=1, most_shards=1):
    """A decoder of unit-cost layers, with an embedding and a head that share their weights when tied."""
    head_name = "embed.w" if tied else "head.w"
    blocks = [Block("embed", (("embed.w", 400),), 0.0, 0.0)]
    blocks += [Block(f"layer.{i}", ((f"l{i}.w", 100),), 1.0, 0.0, kv_bytes) for i in range(layers)]
    blocks += [Block("head", ((head_name, 400), ("norm", 1)), 0.0, 2.0)]
    return ModelSummary(tuple(blocks), most_shards=most_shards)


class Batches:
    """Records that pass once, and each sample one token: what an engine tells the planner."""

    def __init__(self, tokens_per_record=20.0):
        self.tokens_per_record = tokens_per_record

    def mix(self, micro_batch):
        return ((Demand(micro_batch, micro_batch), 1 / micro_batch),)

    def work(self, replica, records):
        return -(-records // replica.micro_batch)

    def estimate(self, replica, stages, records):
        return records * max(stage.seconds(Demand(1, 1)) for stage in stages)

    def simulate(self, replica, stages, hops, records):
        return simulate(Stream(records, replica.micro_batch), stages, hops, 0.0)


class Stream:
    def __init__(self, records, micro_batch):
        self._left, self._micro_batch = records, micro_batch

    def next(self):
        rows = min(self._left, self._micro_batch)
        self._left -= rows
        return Demand(rows, rows) if rows else None

    def commit(self):
        """Nothing waits for it."""


def machine(ranks, memory_bytes=GIGABYTE, nodes=1, speeds=None, cores=1.0):
    each = ranks // nodes
    speeds = speeds or [1.0] * ranks
    memories = memory_bytes if isinstance(memory_bytes, list) else [memory_bytes] * ranks
    seats = [Seat(rank // each, memories[rank], speeds[rank], cores) for rank in range(ranks)]
    return Machine(tuple(seats), FAST, FAST)


def choose(parallel=None, blocks=None, on=None, records=100, **options):
    estimator = options.pop("estimator", Batches())
    return make_plan(
        parallel or ParallelSpec(), blocks or model(), on or machine(4), RATES, estimator, records, **options
    )


def shape(plan):
    return [(r.stages, r.shards) for r in plan.replicas]


# -- layout --------------------------------------------------------------------------------------------------------


def test_every_rank_has_one_place():
    first = Replica((0, 1, 2, 3), 2, 2, (0, 1, 2), 1, 1, 0, 0.5)
    second = Replica((4, 5, 6), 3, 1, (0, 1, 2, 3), 1, 1, 0, 0.5)
    plan = Plan((first, second))
    assert [plan.coordinates(rank) for rank in range(7)] == [
        Coordinates(0, 0, 0),
        Coordinates(0, 0, 1),
        Coordinates(0, 1, 0),
        Coordinates(0, 1, 1),
        Coordinates(1, 0, 0),
        Coordinates(1, 1, 0),
        Coordinates(1, 2, 0),
    ]
    assert first.rank(1, 1) == 3
    assert first.stage_ranks(1) == (2, 3)
    assert plan.replica_of(5).leader == 4
    assert str(plan) == "1 replicas x 2 stages x 2 shards + 1 replicas x 3 stages x 1 shards"
    assert Plan.from_dict(plan.to_dict()) == plan


# -- partition -----------------------------------------------------------------------------------------------------


def slowest(costs, speeds, cuts):
    return max(cost / speed for cost, speed in zip(part_costs(costs, cuts), speeds, strict=True))


def brute_force(costs, speeds, bytes_of, limits):
    """The least bottleneck over all cuts, None where no cut fits."""
    blocks, stages = len(costs), len(speeds)
    every = ((0, *inner, blocks) for inner in itertools.combinations(range(1, blocks), stages - 1))
    fit = (c for c in every if all(bytes_of(*e) <= m for e, m in zip(itertools.pairwise(c), limits, strict=True)))
    return min((slowest(costs, speeds, cuts) for cuts in fit), default=None)


@pytest.mark.parametrize("ranks", ["equal", "unequal"])
def test_partition_equals_brute_force_on_1000_cases(ranks):
    draw = random.Random(ranks)
    refused = 0
    for _ in range(1000):
        blocks = draw.randint(1, 9)
        stages = draw.randint(1, blocks)
        costs = [draw.choice([0, 1, 2, 5, 10, draw.randint(0, 50)]) for _ in range(blocks)]
        speeds = (
            [1.0] * stages if ranks == "equal" else [draw.choice([1, 0.5, 3, 1 / 3, 100, 0.01]) for _ in range(stages)]
        )
        names, sizes = [draw.randint(0, blocks) for _ in range(blocks)], [draw.randint(0, 9) for _ in range(blocks + 1)]

        def bytes_of(start, stop, names=names, sizes=sizes):  # blocks of one name share their weights
            return sum(sizes[name] for name in set(names[start:stop]))

        limits = [draw.choice([float("inf"), draw.randint(3, 25)]) for _ in range(stages)]
        best = brute_force(costs, speeds, bytes_of, limits)
        if best is None:
            refused += 1
            with pytest.raises(DoesNotFit, match="no cut"):
                partition(costs, speeds, bytes_of, limits)
            continue
        cuts = partition(costs, speeds, bytes_of, limits)
        assert (cuts[0], cuts[-1], len(cuts)) == (0, blocks, stages + 1)
        assert all(a < b for a, b in itertools.pairwise(cuts))
        assert all(bytes_of(*e) <= m for e, m in zip(itertools.pairwise(cuts), limits, strict=True))
        assert slowest(costs, speeds, cuts) == pytest.approx(best, rel=1e-9)
    assert 50 < refused < 800


def test_a_thousand_blocks_over_64_unequal_ranks():
    draw = random.Random(0)
    costs, speeds = [draw.random() for _ in range(1000)], [draw.choice([1, 0.3, 2]) for _ in range(64)]
    cuts = partition(costs, speeds, lambda start, stop: stop - start, [40] * 64)
    ideal = sum(costs) / sum(speeds)
    assert ideal <= slowest(costs, speeds, cuts) <= 1.5 * ideal
    assert max(b - a for a, b in itertools.pairwise(cuts)) <= 40


def test_earlier_stages_are_fullest_and_more_stages_than_blocks_are_refused():
    assert partition([1, 0, 0, 1], [1, 1]) == (0, 3, 4)
    assert partition([2, 1, 1, 2], [1, 1]) == (0, 2, 4)
    with pytest.raises(DoesNotFit, match="2 blocks cannot make 3"):
        partition([1, 1], [1, 1, 1])


# -- cost ----------------------------------------------------------------------------------------------------------


def test_curve_is_straight_between_points_and_in_proportion_behind_them():
    curve = Curve((2.0, 4.0), (1.0, 3.0))
    assert [curve(size) for size in (0, 1, 2, 3, 4, 8)] == [0.0, 1.0, 1.0, 2.0, 3.0, 6.0]


def test_a_stage_adds_up_its_work_and_shards_divide_what_they_can():
    rates = Rates(PER_ROW, Curve((1.0,), (0.5,)), PER_ROW, context_s=0.01, pair_s=0.001, step_s=2.0)
    stage = StageCost(rates, row_units=3.0, sample_units=4.0, kv_bytes=5.0, speed=2.0)
    demand = Demand(rows=10, samples=2, context=100, pairs=1000.0)
    shared, own = 3 * 10 + 4 * 2 + 5 * (0.01 * 100 + 0.001 * 1000), 3 * 0.5 * 10 + 2.0
    assert stage.seconds(demand) == pytest.approx((shared + own) / 2)
    link = Link(0.25, 10.0)
    two = StageCost(rates, 3.0, 4.0, 5.0, 2.0, shards=2, reductions=4, row_bytes=1.0, link=link)
    assert two.seconds(demand) == pytest.approx((shared / 2 + own) / 2 + 4 * (2 * 0.25 + 10 / 10))


def test_a_timed_stage_costs_what_was_measured():
    stage = StageCost(RATES, 1.0, 0.0, 0.0)
    corrected = stage.corrected([Timed(Demand(10), 20.0), Timed(Demand(100), 100.0)])
    assert [corrected.seconds(Demand(rows)) for rows in (1, 10, 100, 200)] == [2.0, 20.0, 100.0, 200.0]


def test_reckoned_rates_read_weights_at_few_rows_and_multiply_at_many():
    whole = ModelSummary((Block("a", (("w", 400),), 200.0, 0.0), Block("b", (("v", 400),), 200.0, 0.0)))
    rates = reckoned(whole, Hardware(flops_per_s=1000.0, bytes_per_s=100.0))
    assert 200.0 * rates.rows(1) == pytest.approx(400 / 100)  # one block, limited by its bytes
    assert 200.0 * rates.rows(1000) == pytest.approx(200.0 * 1000 / 1000)


def test_speeds_that_differ_by_noise_are_alike():
    assert speeds_of([1.0, 1.0, 0.9, 3.0, 3.3], 1.0) == pytest.approx([1.037] * 3 + [0.318] * 2, abs=1e-3)


# -- simulation ----------------------------------------------------------------------------------------------------


def test_a_stream_through_two_stages_is_a_staircase():
    stages = [StageCost(RATES, 1.0, 0.0, 0.0), StageCost(RATES, 2.0, 0.0, 0.0)]
    run = simulate(Stream(3, 1), stages, [Link(0.5, 1.0), Link(0.0, float("inf"))], row_bytes=0.0)
    # stage 0: 0-1, 1-2, 2-3; stage 1 from 1.5 on, without a pause: 1.5-3.5, 3.5-5.5, 5.5-7.5
    assert run == Simulated(7.5, (3.0, 6.0), 3)
    assert run.bubble == pytest.approx(1 - 9 / 15)
    assert run.on_cores(2.0, 1) == run
    assert run.on_cores(1.0, 1).wall_s == 9.0


class Ring:
    """Groups that go round so many times each: what a decoder's first stage does."""

    def __init__(self, groups, rounds):
        self._left, self._idle, self._flying = [rounds] * groups, list(range(groups)), []

    def next(self):
        if not self._idle:
            return None
        group = self._idle.pop(0)
        self._left[group] -= 1
        self._flying.append(group)
        return Demand(1)

    def commit(self):
        group = self._flying.pop(0)
        if self._left[group]:
            self._idle.append(group)


@pytest.mark.parametrize(("groups", "wall_s"), [(1, 8.0), (2, 9.0)])
def test_a_ring_with_a_group_for_every_stage_keeps_all_of_them_busy(groups, wall_s):
    stages = [StageCost(RATES, 1.0, 0.0, 0.0)] * 2
    run = simulate(Ring(groups, rounds=4), stages, [FAST, FAST], 0.0)
    assert run.wall_s == wall_s  # one group: 4 rounds of 2 s; two: the second begins 1 s later
    assert run.steps == 4 * groups


# -- planner -------------------------------------------------------------------------------------------------------


def test_the_head_is_charged_for_what_it_costs():
    (replica,) = choose(ParallelSpec(stages=2), on=machine(2)).plan.replicas
    assert part_costs([0, 1, 1, 1, 1, 1, 1, 2], replica.cuts) == [4, 4]


def test_tied_weights_count_once_in_a_part_and_twice_when_cut_apart():
    tied = model()
    assert tied.weight_bytes == 400 + 600 + 1
    assert tied.weight_bytes_of(0, 4) + tied.weight_bytes_of(4, 8) == tied.weight_bytes + 400


def test_auto_takes_whole_models_where_they_fit_and_stages_where_not():
    def stages(memory_bytes):
        return {r.stages for r in choose(blocks=model(layers=8), on=machine(4, memory_bytes)).plan.replicas}

    assert stages(10_000) == {1}
    assert stages(1300) == {2}  # 1201 bytes do not fit 0.7 * 1300, half of them do
    with pytest.raises(PlanError, match="does not fit 4 ranks"):
        stages(500)


def test_cuts_follow_speed_and_memory():
    (replica,) = choose(ParallelSpec(stages=2), on=machine(2, speeds=[3.0, 1.0])).plan.replicas
    assert part_costs([0, 1, 1, 1, 1, 1, 1, 2], replica.cuts) == [6, 2]
    (replica,) = choose(ParallelSpec(stages=2), on=machine(2, [GIGABYTE, 900])).plan.replicas
    assert model().weight_bytes_of(*replica.blocks_of(1)) <= 0.7 * 900


def test_a_fast_rank_alone_beside_two_slow_ones_that_share_a_replica():
    on = machine(3, [3000, 1300, 1300], speeds=[2.0, 1.0, 1.0], nodes=3)
    plan = choose(blocks=model(layers=8), on=on).plan
    assert [replica.ranks for replica in plan.replicas] == [(0,), (1, 2)]
    assert [replica.stages for replica in plan.replicas] == [1, 2]
    assert plan.replicas[0].share == pytest.approx(0.5, abs=0.1)


def test_slow_replicas_are_expected_to_do_less():
    plan = choose(ParallelSpec(stages=1), on=machine(4, speeds=[1.0, 1.0, 1.0, 1 / 3])).plan
    assert [replica.share for replica in plan.replicas] == pytest.approx([0.3, 0.3, 0.3, 0.1], abs=0.02)


def test_shards_stay_inside_a_node():
    choice = choose(ParallelSpec(shards=2), model(most_shards=3), machine(4, nodes=2))
    assert {r.shards for r in choice.plan.replicas} == {2}
    with pytest.raises(PlanError, match="across nodes") as error:
        choose(ParallelSpec(shards=2), model(most_shards=3), machine(4, nodes=4))
    assert "parallel.shards=1" in str(error.value)


@pytest.mark.parametrize(
    ("parallel", "ranks", "words"),
    [
        (ParallelSpec(stages=9), 9, ["parallel.stages=9", "8 blocks", "at most 8"]),
        (ParallelSpec(stages=3), 4, ["parallel.stages=3", "does not divide 4 ranks", "parallel.stages=2"]),
        (ParallelSpec(replicas=3), 4, ["parallel.replicas=3", "does not divide 4 ranks", "parallel.replicas=4"]),
        (ParallelSpec(replicas=2, stages=3, shards=1), 3, ["needs 6 ranks", "the world has 3", "parallel.stages=3"]),
        (
            ParallelSpec(replicas=2, stages=3),
            3,
            ["parallel.replicas=2 x parallel.stages=3", "needs 6", "the world has 3"],
        ),
        (ParallelSpec(replicas=1, stages=1), 2, ["needs 1 ranks", "the world has 2", "parallel.replicas=2"]),
        (ParallelSpec(stages=2, in_flight=1), 2, ["parallel.in_flight=1", "2 stages that have a core"]),
        (ParallelSpec(shards=2), 2, ["parallel.shards=2", "at most 1", "nearest", "parallel.shards=1"]),
    ],
)
def test_impossible_layouts_are_refused_with_the_nearest_that_works(parallel, ranks, words):
    with pytest.raises(PlanError) as error:
        choose(parallel, on=machine(ranks))
    assert all(word in str(error.value) for word in words), error.value


def test_memory_that_nothing_fits_is_refused_with_what_would_do():
    with pytest.raises(PlanError) as error:
        choose(blocks=model(layers=8), on=machine(2, 1000))
    assert "does not fit 2 ranks" in str(error.value)
    assert "start at least 3 ranks" in str(error.value)
    assert "MB a rank (parallel.memory_limit_gb=" in str(error.value)
    # and it is true
    assert {r.stages for r in choose(blocks=model(layers=8), on=machine(3, 1000)).plan.replicas} == {3}


def test_a_kv_cache_without_room_is_refused():
    with pytest.raises(PlanError, match="has no room for a token"):
        choose(ParallelSpec(stages=1), kv_cache_bytes=1, on=machine(1))


def test_ranks_that_share_cores_get_fewer_and_larger_groups():
    for cores, in_flight in ((1.0, (4, 5)), (0.5, (2, 3)), (0.3, (2, 3)), (0.1, (1, 2)), (2.0, (4, 5))):
        (replica,) = choose(ParallelSpec(stages=4), on=machine(4, cores=cores)).plan.replicas
        assert replica.in_flight in in_flight


def test_the_plan_explains_itself():
    choice = choose(ParallelSpec(stages=2))
    assert len(choice.plan.replicas) == 2
    text = describe(choice, model())
    assert "embed .. layer.3" in text
    assert "2 replicas x 2 stages x 1 shards" in text
    assert "chosen" in text
    free = choose(blocks=model(layers=8), on=machine(4, 1300))
    verdicts = {candidate.name: candidate.verdict for candidate in free.candidates}
    assert verdicts["2 replicas x 2 stages x 1 shards"] == "chosen"
    assert verdicts["4 replicas x 1 stages x 1 shards"].startswith("refused: largest stage")
    assert "slower" in verdicts["1 replicas x 4 stages x 1 shards"]
    assert free.to_dict()["candidates"][0]["predicted_wall_s"] == free.wall_s


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 40))
def test_whatever_is_chosen_holds_every_block_once_on_every_rank(stages, ranks, records):
    try:
        plan = choose(ParallelSpec(stages=stages), on=machine(ranks), records=records).plan
    except PlanError:
        assert ranks % stages
        return
    assert sorted(rank for replica in plan.replicas for rank in replica.ranks) == list(range(ranks))
    for replica in plan.replicas:
        assert (replica.cuts[0], replica.cuts[-1]) == (0, len(model().blocks))
    assert sum(replica.share for replica in plan.replicas) == pytest.approx(1.0)


def test_costs_of_a_replica_follow_its_ranks():
    on = machine(2, speeds=[2.0, 1.0])
    replica = Replica((0, 1), 2, 1, (0, 4, 8), 1, 2, 10, 1.0)
    (fast, slow), hops = replica_costs(model(), on, RATES, replica)
    assert (fast.seconds(Demand(1, 1)), slow.seconds(Demand(1, 1))) == (1.5, 5.0)
    assert hops == [FAST, FAST]
    assert block_seconds(model(), RATES, ((Demand(10, 10), 0.1),)) == [0, 1, 1, 1, 1, 1, 1, 2]


def test_shards_that_share_cores_wait_for_their_turns():
    blocks = tuple(replace(block, reductions=2) for block in model().blocks)
    replica = Replica((0, 1), 1, 2, (0, 8), 1, 1, 10, 1.0)
    alone, sharing = (
        replica_costs(ModelSummary(blocks, most_shards=2), machine(2, cores=cores), RATES, replica)[0][0].seconds(
            Demand(1, 1)
        )
        for cores in (1.0, 0.5)
    )
    assert sharing - alone == pytest.approx(2 * len(blocks) * 2 * 0.2e-3)  # there and back, for every sum


# -- schedule ------------------------------------------------------------------------------------------------------


def test_schedule_is_receive_forward_send_in_order():
    assert list(stream(2)) == [Receive(0), Forward(0), Send(0), Receive(1), Forward(1), Send(1)]
    assert list(itertools.islice(stream(), 7))[-1] == Receive(2)
