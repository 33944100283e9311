"""What a step costs a stage, from what work costs on a rank: measured on real blocks, or reckoned from its hardware.

The linear layers of a step take as long as their slowest limit: memory at few rows, arithmetic at many. That, small
operations, attention over the KV cache and messages add up.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log2
from statistics import fmean
from typing import Any

from mpinfer.plan.block import ModelSummary
from mpinfer.plan.machine import Hardware, Link

_ALIKE = 1.25  # ratio of the fastest to the slowest rank of one kind, as they are measured
_STEP_S, _LAYER_S = 300e-6, 50e-6  # of a step and of a block besides arithmetic, where nothing was measured
_MANY = 1e9  # rows: behind the last point of a curve
_SINGLE = Link(0.0, float("inf"))  # of a stage of one shard


@dataclass(frozen=True)
class Curve:
    """Seconds by size, of a few sizes in ascending order; straight lines between, in proportion behind the last."""

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __call__(self, size: float) -> float:
        if size <= 0:
            return 0.0
        place = bisect_left(self.sizes, size)
        if place == 0:
            return self.seconds[0]
        if place == len(self.sizes):
            return self.seconds[-1] * size / self.sizes[-1]
        (x0, x1), (y0, y1) = self.sizes[place - 1 : place + 1], self.seconds[place - 1 : place + 1]
        return y0 + (y1 - y0) * (size - x0) / (x1 - x0)


ZERO = Curve((1.0,), (0.0,))


@dataclass(frozen=True)
class Demand:
    """What a step asks of every stage."""

    rows: float  # tokens, or records of a batch
    samples: float = 0  # tokens whose logits are computed
    context: float = 0  # tokens in the KV cache that the decoding rows attend to, summed over them
    pairs: float = 0.0  # of a token of a prompt and one that it attends to


@dataclass(frozen=True)
class EvenCosts(Sequence[float]):
    """What each of so many records costs, where that is the same."""

    cost: float
    records: int

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, index: Any) -> Any:
        return self.cost


Mix = tuple[tuple[Demand, float], ...]
"""Kinds of steps, and how many of each a record takes."""


@dataclass(frozen=True)
class Rates:
    """What work costs on a rank of speed 1."""

    rows: Curve  # for each unit of a block's cost per token, by rows of the step: what shards divide
    serial: Curve  # likewise, what every shard does for itself
    samples: Curve  # for each unit of a block's cost per sample, by samples of the step
    context_s: float = 0.0  # for each byte of keys and values that a decoding token reads
    pair_s: float = 0.0  # for each such byte, of a token of a prompt
    step_s: float = 0.0  # for every step on every stage
    record_s: float = 0.0  # for every record, on a first stage: to prepare it

    def times(self, factor: float) -> "Rates":
        """The same where everything takes so many times as long."""
        curves = {n: Curve(c.sizes, tuple(factor * s for s in c.seconds)) for n, c in self._curves().items()}
        return Rates(**{**{name: factor * value for name, value in vars(self).items() if name not in curves}, **curves})

    @staticmethod
    def mean(rates: "Sequence[Rates]") -> "Rates":
        """Of ranks that are alike and were measured at the same sizes."""
        first = rates[0]

        def curve(name: str) -> Curve:
            columns = zip(*(getattr(each, name).seconds for each in rates), strict=True)
            return Curve(getattr(first, name).sizes, tuple(map(fmean, columns)))

        curves: dict[str, Any] = {name: curve(name) for name in first._curves()}
        numbers = {name: fmean(getattr(each, name) for each in rates) for name in vars(first) if name not in curves}
        return Rates(**{**numbers, **curves})

    def _curves(self) -> dict[str, Curve]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Curve)}

    def to_dict(self) -> dict[str, Any]:
        curves = {name: [curve.sizes, curve.seconds] for name, curve in self._curves().items()}
        return {**vars(self), **curves}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Rates":
        curves = {name: Curve(tuple(v[0]), tuple(v[1])) for name, v in tree.items() if isinstance(v, list | tuple)}
        return cls(**{**tree, **curves})


def reckoned(model: ModelSummary, hardware: Hardware) -> Rates:
    """The rates of a rank that cannot be asked, where blocks' costs are in FLOPs (a roofline)."""
    flops = sum(block.cost_per_token for block in model.blocks)
    weights = sum(block.weight_bytes for block in model.blocks if block.cost_per_token)
    read_s = weights / flops / hardware.bytes_per_s  # for each FLOP a row, whatever the number of rows
    knee = max(1.0, read_s * hardware.flops_per_s)  # rows whose arithmetic takes as long as reading the weights
    rows = Curve((knee, 2 * knee), (knee / hardware.flops_per_s, 2 * knee / hardware.flops_per_s))
    layers = sum(block.cost_per_token > 0 for block in model.blocks)
    serial = Curve((1.0, _MANY), (_LAYER_S * layers / flops,) * 2)
    byte_s = 1 / hardware.bytes_per_s
    return Rates(rows, serial, rows, byte_s, 4 / hardware.flops_per_s, _STEP_S)


@dataclass(frozen=True)
class Timed:
    """A step that a stage was timed with."""

    demand: Demand
    seconds: float


@dataclass(frozen=True)
class StageCost:
    """What a step costs a stage of a replica, on its ranks."""

    rates: Rates
    row_units: float
    sample_units: float
    kv_bytes: float  # of a token
    speed: float = 1.0  # of its slowest rank
    shards: int = 1
    reductions: int = 0  # all-reduces of a row's activations, of a step
    row_bytes: float = 0.0  # of a row's activations
    link: Link = _SINGLE  # between shards
    records: bool = False  # whether it prepares them
    correction: Curve | None = None  # factor by rows, where the stage itself has been timed

    def seconds(self, demand: Demand) -> float:
        rates, rows = self.rates, demand.rows
        divided = self.row_units * rates.rows(rows) + self.sample_units * rates.samples(demand.samples)
        divided += self.kv_bytes * (rates.context_s * demand.context + rates.pair_s * demand.pairs)
        own = self.row_units * rates.serial(rows) + rates.step_s
        if self.records:
            own += rates.record_s * rows
        busy = (divided / self.shards + own) / self.speed
        factor = 1.0 if self.correction is None else self.correction(rows)
        return factor * (busy + self.reductions * self._reduction_s(rows))

    def corrected(self, steps: Sequence[Timed]) -> "StageCost":
        """The same, so that it agrees with steps that the stage was timed with."""
        factors = sorted((step.demand.rows, step.seconds / self.seconds(step.demand)) for step in steps)
        rows, values = zip(*factors, (_MANY, factors[-1][1]), strict=True)
        return replace(self, correction=Curve(rows, values))

    def _reduction_s(self, rows: float) -> float:
        if self.shards == 1:
            return 0.0
        moved = 2 * (self.shards - 1) / self.shards * rows * self.row_bytes
        return 2 * ceil(log2(self.shards)) * self.link.latency_s + moved / self.link.bytes_per_s


def stage_costs(
    model: ModelSummary,
    rates: Rates,
    cuts: Sequence[int],
    speeds: Sequence[float],
    shards: int = 1,
    links: Sequence[Link] = (),
) -> list[StageCost]:
    """Of every stage of a replica; `model` as the pipeline's stages hold it, `speeds` and `links` by stage."""
    costs = []
    for stage, speed in enumerate(speeds):
        blocks = model.blocks[cuts[stage] : cuts[stage + 1]]
        reductions = sum(block.reductions for block in blocks)
        costs.append(
            StageCost(
                rates,
                sum(block.cost_per_token for block in blocks),
                sum(block.cost_per_sample for block in blocks),
                sum(block.kv_bytes_per_token for block in blocks),
                speed,
                shards,
                reductions if shards > 1 else 0,
                model.row_bytes,
                links[stage] if links else _SINGLE,
                stage == 0,
            )
        )
    return costs


def block_seconds(model: ModelSummary, rates: Rates, mix: Mix) -> list[float]:
    """What a record asks of each block."""
    count = len(model.blocks)
    alone = replace(rates, step_s=0.0, record_s=0.0)  # a stage's, whatever its blocks
    blocks = stage_costs(model, alone, range(count + 1), [1.0] * count)
    return [sum(steps * block.seconds(demand) for demand, steps in mix) for block in blocks]


def speeds_of(seconds: Sequence[float], reference_s: float) -> list[float]:
    """Ranks' speeds by what the same work took each, `reference_s` where speed is 1. Those that differ by no more than
    noise are alike, and get their mean: else noise would choose the cuts."""
    speeds = [reference_s / each for each in seconds]
    kinds: list[list[int]] = []
    for rank in sorted(range(len(speeds)), key=speeds.__getitem__):
        if kinds and speeds[rank] <= _ALIKE * speeds[kinds[-1][0]]:
            kinds[-1].append(rank)
        else:
            kinds.append([rank])
    for ranks in kinds:
        mean = fmean(speeds[rank] for rank in ranks)
        for rank in ranks:
            speeds[rank] = mean
    return speeds
