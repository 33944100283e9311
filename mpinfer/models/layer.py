"""Decoder layers computed in one call of a kernel (`decoder_layers` in kernels.c).

Between the products of a layer, Python and torch take as long as its attention does: what they need themselves has left
the caches each time, pushed out by weights. Between layers it was 4 to 8 % of a step.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import byref
from itertools import chain
from typing import NamedTuple

import torch

from mpinfer.models.kernels import Callback, Kernels, Norm, PackedWeights
from mpinfer.models.linear import CompiledLinear
from mpinfer.models.quantize import CompiledInt8Linear
from mpinfer.models.tensor_parallel import SumMemory

Product = CompiledLinear | CompiledInt8Linear


class Attention(NamedTuple):
    """What an attention module does with its projections."""

    layer: int
    kv_heads: int
    head_dim: int
    scaling: float
    window: int | None
    softcap: float | None
    norms: tuple[Norm, Norm] | None  # of queries and keys


class Parts(NamedTuple):
    """What a layer is made of: x += attention(x), x += mlp(x), with norms around each, where there are any."""

    attention: Attention
    projections: Product  # queries, keys and values side by side
    output: Product
    gates: Product  # gate and up side by side
    down: Product
    gelu: bool  # else SiLU
    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None


class LayerStep:
    """What layers must know of the tokens of a step, the first of which are alone of their sequences."""

    def __init__(
        self,
        places: torch.Tensor,  # [tokens]: slot * kv_heads * capacity + position
        positions: torch.Tensor,  # [tokens]
        alone: int,
        chunks: torch.Tensor,  # of the others, int64 [chunks, 4]: first row, tokens, slot, first position
        samples: torch.Tensor | None,  # the only rows of the last layer that are used; None: all
    ) -> None:
        self.samples = samples
        self.whole = _step(places, positions, alone, chunks)
        self.late = None if samples is None else _step(places[samples], positions[samples], len(samples), chunks[:0])
        self._scratch = torch.empty(0)

    def scratch(self, values: int) -> torch.Tensor:
        """Memory for what a layer needs on the way; all layers get the same."""
        if len(self._scratch) < values:
            self._scratch = torch.empty(values)
        return self._scratch


class CompiledLayer:
    """A layer of these parts; `last` if of its output only samples are used."""

    def __init__(self, kernels: Kernels, parts: Parts, last: bool) -> None:
        attention = parts.attention
        self.attention, self.last = attention, last
        self.products = [parts.projections, parts.output, parts.gates, parts.down]
        self.library, self._parts = kernels.library, parts
        self.whole = True  # else its module computes
        self.next: CompiledLayer | None = None  # a layer that always takes this one's output as it is
        self.is_settled = False  # whether `next` is known
        self.progress = Callback(lambda: None)  # called before it, whoever computes
        self.reduce: Callable[[torch.Tensor], torch.Tensor] | None = None  # sums over the shards of the layer, if any
        self.sums: ShardSums | None = None  # does so inside the kernel
        query_norm, key_norm = attention.norms or (None, None)
        norms = [parts.before_attention, query_norm, key_norm, parts.after_attention, parts.before_mlp, parts.after_mlp]
        self.struct = _Layer(
            *(product.packed() for product in self.products),
            *(_Norm() if norm is None else _Norm(norm.weight.data_ptr(), norm.epsilon) for norm in norms),
            parts.output.in_features // attention.head_dim,
            *(attention.kv_heads, attention.head_dim, attention.window or 0, parts.gelu, attention.scaling),
        )
        self.scratch_per_token = self.library.layer_scratch(byref(self.struct))


class LayerCall(NamedTuple):
    """A layer, and what it needs besides hidden states."""

    layer: CompiledLayer
    step: LayerStep
    keys: torch.Tensor  # [slots, kv_heads, capacity, head_dim]
    values: torch.Tensor
    cosines: torch.Tensor  # [tokens, head_dim], contiguous
    sines: torch.Tensor

    @property
    def samples(self) -> torch.Tensor | None:
        """The only rows that it computes to the end; None: all."""
        return self.step.samples if self.layer.last else None


def compute_layers(calls: Sequence[LayerCall], x: torch.Tensor) -> torch.Tensor:
    """Layers one after another, each of what the one before has made of x [tokens, hidden]; [tokens, hidden], or of a
    last layer [samples, hidden]. Raises what progress between layers, or a wait for other shards, has raised."""
    x = x.contiguous()
    y, added = torch.empty_like(x), torch.empty_like(x)
    layer, samples = calls[0].layer, calls[-1].samples
    scratch = calls[0].step.scratch(len(x) * max(call.layer.scratch_per_token for call in calls))
    passes = (_Pass * len(calls))(*map(_pass, calls))
    first, residual, *rest = (tensor.data_ptr() for tensor in (x, y, added, scratch))
    sums = layer.sums if layer.sums is not None and x.numel() <= layer.sums.most else None
    if layer.reduce is None or sums is not None:
        struct = None if sums is None else byref(sums.struct)
        if layer.library.decoder_layers(passes, len(calls), first, residual, *rest, struct, layer.progress.pointer):
            layer.progress.check()
            assert sums is not None
            sums.wait.check()
        return y if samples is None else y[: len(samples)]
    for call, each in zip(calls, passes, strict=True):
        library, own = call.layer.library, byref(call.layer.struct)
        terms = added if call.samples is None else added[: len(call.samples)]
        call.layer.progress()
        library.layer_attention(byref(each), first, residual, *rest)
        layer.reduce(terms)
        library.layer_mlp(own, len(terms), residual, *rest)
        layer.reduce(terms)
        library.layer_end(own, len(terms), residual, rest[0])
        first = residual
    return y if samples is None else y[: len(samples)]


class ShardSums:
    """Sums of kernels over the shards of this rank's stage."""

    def __init__(self, memory: SumMemory) -> None:
        self.most = memory.most
        self.wait = Callback(memory.wait)
        shards = len(memory.counters)
        counters = (ctypes.c_void_p * shards)(*memory.counters)
        slots = (ctypes.c_void_p * (len(memory.slots) * shards))(*chain(*memory.slots))
        self._held = memory, counters, slots
        state = memory.state.ctypes.data
        self.struct = _Sums(
            *(shards, memory.place, memory.spins, state),
            *(ctypes.addressof(counters), ctypes.addressof(slots), self.wait.pointer),
        )


class _Sums(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("shards", "place", "spins")),
        *((name, ctypes.c_void_p) for name in ("state", "counters", "slots")),
        ("wait", Callback.TYPE),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, PackedWeights) for name in ("projections", "output", "gates", "down")),
        *((name, _Norm) for name in ("before_attention", "query", "key", "after_attention", "before_mlp", "after_mlp")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "size", "window", "gelu")),
        ("scaling", ctypes.c_float),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "alone", "chunks")),
        *((name, ctypes.c_void_p) for name in ("places", "positions", "chunk")),
    ]
    held: tuple[torch.Tensor, ...]  # what it points to


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layer", "step", "late", "kept", "cosines", "sines", "keys", "values")),
        ("capacity", ctypes.c_int64),
    ]


def _pass(call: LayerCall) -> _Pass:
    late, samples = (call.step.late, call.step.samples) if call.layer.last else (None, None)
    return _Pass(
        *(ctypes.addressof(call.layer.struct), ctypes.addressof(call.step.whole)),
        *((None, None) if late is None or samples is None else (ctypes.addressof(late), samples.data_ptr())),
        *(tensor.data_ptr() for tensor in (call.cosines, call.sines, call.keys, call.values)),
        call.keys.shape[2],
    )


def _step(places: torch.Tensor, positions: torch.Tensor, alone: int, chunks: torch.Tensor) -> _Step:
    held = (places, positions, chunks)
    step = _Step(len(places), alone, len(chunks), *(tensor.data_ptr() for tensor in held))
    step.held = held
    return step
