"""Grid, partition, planner, schedule, prediction: geometry without tensors."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpinfer.errors import PlanError
from mpinfer.plan.block import Block, ModelSummary, Workload
from mpinfer.plan.grid import Coordinates, Grid
from mpinfer.plan.partition import part_costs, partition
from mpinfer.plan.planner import Plan, describe, make_plan
from mpinfer.plan.predict import StepTimes, predict_wall_s
from mpinfer.plan.schedule import Forward, Receive, Send, stream
from mpinfer.spec import ParallelSpec

GIGABYTE = 10**9


def model(layers=6, tied=True):
    """A decoder of unit-cost layers, with an embedding and a head that share their weights when tied."""
    head_name = "embed.w" if tied else "head.w"
    blocks = [Block("embed", (("embed.w", 400),), 0.0, 0.0)]
    blocks += [Block(f"layer.{i}", ((f"l{i}.w", 100),), 1.0, 0.0, kv_bytes_per_token=1) for i in range(layers)]
    blocks += [Block("head", ((head_name, 400), ("norm", 1)), 0.0, 2.0)]
    return ModelSummary(tuple(blocks))


WORK = Workload(records=100, prompt_tokens=1000.0, new_tokens=1000.0, samples=1000.0)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_grid_is_a_bijection(replicas, stages, shards):
    grid = Grid(replicas, stages, shards)
    places = [grid.coordinates(rank) for rank in range(grid.size)]
    assert len(set(places)) == grid.size
    assert all(grid.rank(p.replica, p.stage, p.shard) == rank for rank, p in enumerate(places))


def test_stages_of_a_replica_are_neighbours():
    assert [Grid(2, 2).coordinates(rank) for rank in range(4)] == [
        Coordinates(0, 0, 0),
        Coordinates(0, 1, 0),
        Coordinates(1, 0, 0),
        Coordinates(1, 1, 0),
    ]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 8))
def test_partition_equals_brute_force(costs, stages):
    if stages > len(costs):
        with pytest.raises(ValueError, match="cannot make"):
            partition(costs, stages)
        return
    cuts = partition(costs, stages)
    assert cuts[0] == 0
    assert cuts[-1] == len(costs)
    assert all(a < b for a, b in itertools.pairwise(cuts))
    brute = min(
        max(part_costs(costs, (0, *inner, len(costs))))
        for inner in itertools.combinations(range(1, len(costs)), stages - 1)
    )
    assert max(part_costs(costs, cuts)) == brute


def test_partition_charges_the_head_for_what_it_costs():
    plan = make_plan(ParallelSpec(stages=2), model(), WORK, [GIGABYTE] * 2)
    first, second = part_costs([WORK.cost(block) for block in model().blocks], plan.cuts)
    assert (first, second) == (8000.0, 6000.0)  # 4 layers against 2 layers and the head


def test_tied_weights_count_once_in_a_part_and_twice_when_cut_apart():
    tied = model()
    assert tied.weight_bytes == 400 + 600 + 1
    assert tied.weight_bytes_of(0, 4) + tied.weight_bytes_of(4, 8) == tied.weight_bytes + 400


def test_auto_takes_the_fewest_stages_that_fit():
    def stages(memory_bytes):
        return make_plan(ParallelSpec(), model(layers=8), WORK, [memory_bytes] * 4).stages

    assert stages(10_000) == 1
    assert stages(1300) == 2  # 1201 bytes do not fit 0.7 * 1300, half of them do
    with pytest.raises(PlanError, match="does not fit 4 ranks"):
        stages(500)


@pytest.mark.parametrize(
    ("parallel", "ranks", "words"),
    [
        (ParallelSpec(stages=9), 9, ["parallel.stages=9", "8 blocks", "at most 8"]),
        (ParallelSpec(stages=3), 4, ["parallel.stages=3", "does not divide 4 ranks"]),
        (ParallelSpec(replicas=3), 4, ["parallel.replicas=3", "does not divide 4 ranks"]),
        (ParallelSpec(replicas=2, stages=3), 3, ["needs 6 ranks", "the world has 3"]),
        (ParallelSpec(stages=2, in_flight=1), 2, ["parallel.in_flight=1", "at least 2"]),
    ],
)
def test_impossible_layouts_are_refused_with_figures(parallel, ranks, words):
    with pytest.raises(PlanError) as error:
        make_plan(parallel, model(), WORK, [GIGABYTE] * ranks)
    assert all(word in str(error.value) for word in words)


def test_ranks_that_share_cores_get_fewer_and_larger_groups():
    for cores_per_rank, in_flight in ((1.0, 4), (0.5, 2), (0.3, 2), (0.1, 1), (2.0, 4)):
        plan = make_plan(ParallelSpec(stages=4), model(), WORK, [GIGABYTE] * 4, cores_per_rank=cores_per_rank)
        assert plan.in_flight == in_flight


def test_plan_survives_the_wire_and_explains_itself():
    plan = make_plan(ParallelSpec(stages=2), model(), WORK, [GIGABYTE] * 4)
    assert Plan.from_dict(plan.to_dict()) == plan
    assert (plan.replicas, plan.in_flight, plan.micro_batch) == (2, 2, 32)
    text = describe(plan, model(), WORK)
    assert "embed .. layer.3" in text
    assert "micro_batch 32: 100 records over 4 groups" in text


def test_schedule_is_receive_forward_send_in_order():
    assert list(stream(2)) == [Receive(0), Forward(0), Send(0), Receive(1), Forward(1), Send(1)]
    assert list(itertools.islice(stream(), 7))[-1] == Receive(2)


def test_prediction_is_the_slowest_stage_of_the_slowest_replica():
    plan = Plan(2, 2, 1, (0, 4, 8), micro_batch=10, in_flight=2, kv_tokens=1000, reasons=())
    work = Workload(records=40, prompt_tokens=4000.0, new_tokens=400.0, samples=400.0)
    fast, slow = StepTimes(1.0, 0.1), StepTimes(2.0, 0.2)
    # a replica: 20 records, 20 prefill steps of 100 tokens, 20 decode steps of 10 sequences
    assert predict_wall_s(plan, work, 100, [fast, fast, fast, slow]) == pytest.approx(20 * 2.0 + 20 * 0.2 + 1.0)
    assert predict_wall_s(plan, work.part(0), 100, [fast] * 4) == 0.0
