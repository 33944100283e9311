"""What a decoder's work costs on this rank: its own layers, with weights, timed in steps of a few sizes."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import nn

from mpinfer.generate.cache import KVCache
from mpinfer.generate.readout import NoReadout
from mpinfer.generate.scheduler import Segment, Step
from mpinfer.generate.stage import DecodeStage, encode_step
from mpinfer.models.decoder import DecoderPart, DecoderSkeleton
from mpinfer.models.halving import Halving
from mpinfer.models.linear import CompiledLinear, PackedLinear
from mpinfer.models.quantize import CompiledInt8Linear, Int8Linear
from mpinfer.plan.block import ModelSummary
from mpinfer.plan.cost import ZERO, Curve, Rates
from mpinfer.transport.message import Message

_SIZES = (1, 4, 16, 32, 64)  # rows of decode steps, and samples
_LAYERS = 2  # that are timed together, against one alone: the difference is a layer without what a step costs
_NEAR, _FAR = 128, 640  # tokens of context
_FAR_ROWS = 16
_LEAST_ROUNDS = 2
_CACHE_BYTES = 2**27  # more than the last level of most CPUs holds
_PRODUCTS = (nn.Linear, PackedLinear, CompiledLinear, Int8Linear, CompiledInt8Linear)
_VOCABULARY = 16384  # tokens of the output embedding that are timed; it costs in proportion


def measure(skeleton: DecoderSkeleton, model: ModelSummary, step_tokens: int, device: str, least_s: float) -> Rates:
    """Seconds for each unit of the blocks' costs, in the mean over `least_s`. `skeleton` is not used up. Raises
    `ModelError`."""
    layers = min(_LAYERS, len(skeleton.layers))
    capacity = min(skeleton.max_length, 2 * _FAR + step_tokens)
    parts = (_part(skeleton, 1, 1 + count, device) for count in (1, layers))
    one, several = (_Bench(part, skeleton, KVCache(max(_SIZES), capacity, device)) for part in parts)
    sizes = sorted({*_SIZES, step_tokens})
    near = min(_NEAR, -(-skeleton.max_length // 2))  # lengths vary by half
    work: dict[tuple[str, int], Callable[[], object]] = {}
    for rows in sizes:
        is_full = rows == step_tokens > 1
        slots = range(max(_SIZES))
        step = prompt_segments(rows, slots, near) if is_full else decode_segments(rows, near, skeleton.max_length)
        work["one", rows] = one.step(step)
        work["several", rows] = several.step(step)
        work["linear", rows] = one.products(step)
    has_far = skeleton.max_length > _FAR + step_tokens
    if has_far:
        for length in (_NEAR, _FAR):
            work["decode at", length] = several.step(decode_segments(_FAR_ROWS, length, skeleton.max_length))
            work["prompt at", length] = several.step([Segment(0, length, step_tokens, 1)])
    head = model.blocks[-1].cost_per_sample
    vocabulary = range(min(skeleton.vocabulary, _VOCABULARY))
    if head:
        work |= {("samples", size): run for size, run in _readouts(skeleton, vocabulary, device).items()}
    seconds = _in_rounds(work, min(_CACHE_BYTES, model.weight_bytes), least_s)

    # What attention takes of a step is counted by itself.
    kv_bytes = max(1, model.blocks[1].kv_bytes_per_token)
    context_s = pair_s = 0.0
    if has_far:
        reach = (_FAR - _NEAR) * layers * kv_bytes
        context_s = max(0.0, seconds["decode at", _FAR] - seconds["decode at", _NEAR]) / (_FAR_ROWS * reach)
        pair_s = max(0.0, seconds["prompt at", _FAR] - seconds["prompt at", _NEAR]) / (step_tokens * reach)
    products, rest, overheads = [], [], []
    for rows in sizes:
        alone, together, linear = (seconds[kind, rows] for kind in ("one", "several", "linear"))
        layer = (together - alone) / (layers - 1) if layers > 1 else 0.9 * alone
        layer = min(max(layer, linear), alone)
        overheads.append(alone - layer)
        attention = pair_s * rows * near / 2 if rows == step_tokens else context_s * rows * near
        products.append(linear)
        rest.append(max(0.0, layer - linear - attention * kv_bytes))
    units = model.blocks[1].cost_per_token
    readouts = [seconds["samples", size] for size in _SIZES] if head else []
    return Rates(
        rows=_curve(sizes, products, 1 / units),
        serial=_curve(sizes, rest, 1 / units),
        samples=_curve(_SIZES, readouts, skeleton.vocabulary / len(vocabulary) / head) if head else ZERO,
        context_s=context_s,
        pair_s=pair_s,
        step_s=median(overheads),
    )


def _in_rounds(work: Mapping[Any, Callable[[], object]], forget_bytes: int, least_s: float) -> dict[Any, float]:
    """Seconds of each, in the mean over rounds in which all have their turn: so does a rank that is made to pause
    (by a quota, or by a neighbour on its core) spread its pauses over all, by what they take.

    In between so many other bytes are read: in a run, too, a layer's weights have left the caches by its turn.
    """
    others = torch.ones(forget_bytes // 4)
    for run in work.values():
        run()
    totals = dict.fromkeys(work, 0.0)
    started, rounds = time.perf_counter(), 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() - started < least_s:
        for key, run in work.items():
            others.sum()
            begun = time.perf_counter()
            run()
            totals[key] += time.perf_counter() - begun
        rounds += 1
    return {key: total / rounds for key, total in totals.items()}


class _Bench:
    """Layers with their weights, that run steps of any size."""

    def __init__(self, part: DecoderPart, skeleton: DecoderSkeleton, cache: KVCache) -> None:
        self._part, self._hidden, self._dtype = part, skeleton.hidden_size, skeleton.dtype
        self._stage, self._cache = DecodeStage(part, cache, NoReadout(part), Halving()), cache

    def step(self, segments: Sequence[Segment]) -> Callable[[], object]:
        """A step of these, to be called again and again."""
        rows = sum(segment.length for segment in segments)
        header = encode_step(Step(tuple(segments), (0,) * rows)).header
        message = Message(header, (torch.zeros(rows, self._hidden, dtype=self._dtype),))
        self._stage.forward(message)
        self._cache.fill(segments)
        return partial(self._stage.forward, message)

    def products(self, segments: Sequence[Segment]) -> Callable[[], object]:
        """The matrix products of such a step alone."""
        calls: list[tuple[nn.Module, torch.Tensor]] = []
        layers = [module for module in self._part.model.modules() if type(module) in _PRODUCTS]
        step = self.step(segments)
        hooks = [layer.register_forward_pre_hook(lambda m, args: calls.append((m, args[0]))) for layer in layers]
        step()
        for hook in hooks:
            hook.remove()
        rows = sum(segment.length for segment in segments)
        whole = [product for layer in self._part.compiled for product in layer.products]
        calls += [(product, torch.zeros(rows, product.in_features)) for product in whole]

        @torch.inference_mode()
        def run() -> None:
            for layer, x in calls:
                layer(x)

        return run


def decode_segments(rows: int, length: int, most: int) -> list[Segment]:
    """New tokens of sequences of about that length, which differ as they do in a run: kernels are faster where all are
    alike. None is longer than `most`."""
    lengths = [max(1, min(most, length // 2 + length * (rows - row) // rows)) for row in range(rows)]
    return [Segment(slot, each - 1, 1, 1) for slot, each in enumerate(lengths)]


def prompt_segments(rows: int, slots: range, most: int) -> list[Segment]:
    """So many tokens of prompts of typical length, of `most` tokens at most, as far as there are slots."""
    starts = range(0, rows, most)
    return [Segment(slot, 0, min(most, rows - start), 1) for slot, start in zip(slots, starts, strict=False)]


def _readouts(skeleton: DecoderSkeleton, vocabulary: range, device: str) -> dict[int, Callable[[], object]]:
    """The output embedding, or a piece of it, by samples."""
    head = len(skeleton.layers) + 1
    part = copy.deepcopy(skeleton).load_part(head, head + 1, device, max(_SIZES), lambda: None, vocabulary)
    hidden = {size: torch.zeros(size, skeleton.final_size, dtype=skeleton.dtype, device=device) for size in _SIZES}
    return {size: partial(part.logits, x) for size, x in hidden.items()}


def _part(skeleton: DecoderSkeleton, start: int, stop: int, device: str) -> DecoderPart:
    """Blocks of a copy: loading uses a skeleton up."""
    return copy.deepcopy(skeleton).load_part(start, stop, device, 32, lambda: None, range(0))


def _curve(sizes: Sequence[float], seconds: Sequence[float], factor: float) -> Curve:
    """Seconds times `factor`, by size; what noise has made dearer than more of it is not."""
    least = list(accumulate(reversed(seconds), min))[::-1]
    return Curve(tuple(map(float, sizes)), tuple(s * factor for s in least))
