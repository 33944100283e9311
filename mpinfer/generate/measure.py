"""What a decoder's work costs on this rank: its own layers, with weights, timed in steps of a few sizes."""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

import torch
from torch import nn

from mpinfer.generate.cache import KVCache
from mpinfer.generate.readout import NoReadout
from mpinfer.generate.scheduler import Segment, Step
from mpinfer.generate.stage import DecodeStage, encode_step
from mpinfer.models.decoder import DecoderPart, DecoderSkeleton
from mpinfer.models.linear import PackedLinear
from mpinfer.models.quantize import Int8Linear
from mpinfer.plan.block import ModelSummary
from mpinfer.plan.cost import ZERO, Curve, Rates
from mpinfer.transport.message import Message

_SIZES = (1, 4, 16, 32, 64)  # rows of decode steps, and samples
_LAYERS = 2  # that are timed together, against one alone: the difference is a layer without what a step costs
_NEAR, _FAR = 128, 640  # tokens of context
_BUDGET_S = 1.5  # for everything; sizes that come too late are left out
_PACE_S = 0.2  # of steady work, which shows whether this rank is made to pause
_PRODUCTS = (nn.Linear, PackedLinear, Int8Linear)
_VOCABULARY = 16384  # tokens of the output embedding that are timed; it costs in proportion


def measure(skeleton: DecoderSkeleton, model: ModelSummary, step_tokens: int, device: str) -> Rates:
    """Seconds for each unit of the blocks' costs. `skeleton` is not used up. Raises `ModelError`."""
    started = time.perf_counter()
    layers = min(_LAYERS, len(skeleton.layers))
    one, several = (_Bench(_part(skeleton, 1, 1 + count, device), skeleton, device) for count in (1, layers))
    units = model.blocks[1].cost_per_token
    sizes: list[int] = []
    whole, linear = [], []
    step_s = 0.0
    for rows in sorted({*_SIZES, step_tokens}):
        if sizes and time.perf_counter() - started > _BUDGET_S:
            break
        alone_s, together_s = (bench.step_s(rows, step_tokens, _NEAR) for bench in (one, several))
        layer_s = max((together_s - alone_s) / (layers - 1), 0.1 * alone_s) if layers > 1 else 0.9 * alone_s
        step_s = step_s or max(0.0, alone_s - layer_s)
        sizes.append(rows)
        whole.append(layer_s)
        linear.append(min(layer_s, one.linear_s(rows)))
    context_s = pair_s = 0.0
    kv_bytes = max(1, layers * model.blocks[1].kv_bytes_per_token)
    if skeleton.max_length > _FAR + step_tokens:
        rows = min(16, sizes[-1])
        near, far = (several.step_s(rows, step_tokens, length) for length in (_NEAR, _FAR))
        context_s = max(0.0, far - near) / (rows * (_FAR - _NEAR) * kv_bytes)
        if step_tokens in sizes and step_tokens > 1:
            near, far = (several.chunk_s(start, step_tokens) for start in (0, _FAR))
            pair_s = max(0.0, far - near) / (step_tokens * _FAR * kv_bytes)
    pace = several.pace(min(32, sizes[-1]), step_tokens)
    # What attention took of the steps that were timed is counted by itself.
    layer_kv = model.blocks[1].kv_bytes_per_token
    for place, rows in enumerate(sizes):
        is_chunk = rows == step_tokens
        own = pair_s * rows * rows / 2 if is_chunk else context_s * rows * _NEAR
        whole[place] = max(linear[place], whole[place] - own * layer_kv)
    serial = [max(0.0, w - part) for w, part in zip(whole, linear, strict=True)]
    return Rates(
        rows=_curve(sizes, linear, pace / units),
        serial=_curve(sizes, serial, pace / units),
        samples=_samples(skeleton, model, device, pace),
        context_s=context_s * pace,
        pair_s=pair_s * pace,
        step_s=step_s * pace,
    )


class _Bench:
    """Layers with their weights, that run steps of any size."""

    def __init__(self, part: DecoderPart, skeleton: DecoderSkeleton, device: str) -> None:
        self._part, self._hidden, self._dtype = part, skeleton.hidden_size, skeleton.dtype
        self._length = min(skeleton.max_length, _FAR + 1024)
        self._stage = DecodeStage(part, KVCache(max(_SIZES), self._length, device), NoReadout(part))

    def step_s(self, rows: int, step_tokens: int, length: int) -> float:
        """Of a step of so many rows: a chunk of a prompt if that fills a step, else sequences of about that length."""
        if rows == step_tokens and rows > 1:
            return self.chunk_s(0, rows)
        return _best_s(lambda: self._stage.forward(self._decode(rows, length)))

    def chunk_s(self, start: int, rows: int) -> float:
        rows = min(rows, self._length - start)
        message = self._message([Segment(0, start, rows, 1)])
        return _best_s(lambda: self._stage.forward(message))

    def linear_s(self, rows: int) -> float:
        """Of the matrix products of such a step alone."""
        calls: list[tuple[nn.Module, torch.Tensor]] = []
        layers = [module for module in self._part.model.modules() if type(module) in _PRODUCTS]
        hooks = [layer.register_forward_pre_hook(lambda m, args: calls.append((m, args[0]))) for layer in layers]
        self._stage.forward(
            self._decode(rows, _NEAR) if rows <= max(_SIZES) else self._message([Segment(0, 0, rows, 1)])
        )
        for hook in hooks:
            hook.remove()

        @torch.inference_mode()
        def run() -> None:
            for layer, x in calls:
                layer(x)

        return _best_s(run)

    def pace(self, rows: int, step_tokens: int) -> float:
        """Mean over best time of steps of steady work: 1 on a rank that is never made to pause."""
        message = self._decode(rows, _NEAR)
        times = []
        until = time.perf_counter() + _PACE_S
        while (started := time.perf_counter()) < until:
            self._stage.forward(message)
            times.append(time.perf_counter() - started)
        return fmean(times) / min(times)

    def _decode(self, rows: int, length: int) -> Message:
        # Neighbours differ in length, as they do in a run.
        lengths = [min(self._length, length // 2 + length * (rows - row) // rows) for row in range(rows)]
        return self._message([Segment(slot, each - 1, 1, 1) for slot, each in enumerate(lengths)])

    def _message(self, segments: list[Segment]) -> Message:
        rows = sum(segment.length for segment in segments)
        header = encode_step(Step(tuple(segments), (0,) * rows)).header
        return Message(header, (torch.zeros(rows, self._hidden, dtype=self._dtype),))


def _samples(skeleton: DecoderSkeleton, model: ModelSummary, device: str, pace: float) -> Curve:
    """Of the output embedding, where the job needs it."""
    whole = model.blocks[-1].cost_per_sample
    if not whole:
        return ZERO
    vocabulary = range(min(skeleton.vocabulary, _VOCABULARY))
    head = len(skeleton.layers) + 1
    part = copy.deepcopy(skeleton).load_part(head, head + 1, device, max(_SIZES), lambda: None, vocabulary)
    hidden = [torch.zeros(size, skeleton.final_size, dtype=skeleton.dtype, device=device) for size in _SIZES]
    seconds = [_best_s(partial(part.logits, x)) for x in hidden]
    return _curve(_SIZES, seconds, pace * skeleton.vocabulary / len(vocabulary) / whole)


def _part(skeleton: DecoderSkeleton, start: int, stop: int, device: str) -> DecoderPart:
    """Blocks of a copy: loading uses a skeleton up."""
    return copy.deepcopy(skeleton).load_part(start, stop, device, 32, lambda: None, range(0))


def _curve(sizes: Sequence[float], seconds: Sequence[float], factor: float) -> Curve:
    return Curve(tuple(map(float, sizes)), tuple(s * factor for s in seconds))


def _best_s(run: Callable[[], object], repeats: int = 5) -> float:
    run()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best
