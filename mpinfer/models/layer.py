"""A decoder layer computed in one call of a kernel (`decoder_layer` in kernels.c).

Between the products of a layer, Python and torch take as long as its attention does: what they need themselves has left
the caches each time, pushed out by weights.
"""

import ctypes
from collections.abc import Callable
from ctypes import byref
from itertools import chain
from typing import NamedTuple

import torch

from mpinfer.models.kernels import Kernels, Norm, PackedWeights
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
        self.attention = attention
        self.products = [parts.projections, parts.output, parts.gates, parts.down]
        self._library, self._parts, self._last = kernels.library, parts, last
        self.whole = True  # else its module computes
        self.reduce: Callable[[torch.Tensor], torch.Tensor] | None = None  # sums over the shards of the layer, if any
        self.sums: ShardSums | None = None  # does so inside the kernel
        query_norm, key_norm = attention.norms or (None, None)
        norms = [parts.before_attention, query_norm, key_norm, parts.after_attention, parts.before_mlp, parts.after_mlp]
        self._layer = _Layer(
            *(product.packed() for product in self.products),
            *(_Norm() if norm is None else _Norm(norm.weight.data_ptr(), norm.epsilon) for norm in norms),
            parts.output.in_features // attention.head_dim,
            *(attention.kv_heads, attention.head_dim, attention.window or 0, parts.gelu, attention.scaling),
        )
        self._scratch_per_token = self._library.layer_scratch(byref(self._layer))

    def __call__(
        self,
        step: LayerStep,
        keys: torch.Tensor,  # [slots, kv_heads, capacity, head_dim]
        values: torch.Tensor,
        cosines: torch.Tensor,  # [tokens, head_dim]
        sines: torch.Tensor,
        x: torch.Tensor,  # [tokens, hidden]
    ) -> torch.Tensor:
        """[tokens, hidden], or [samples, hidden]."""
        x, cosines, sines = x.contiguous(), cosines.contiguous(), sines.contiguous()
        late, samples = (step.late, step.samples) if self._last else (None, None)
        y = torch.empty_like(x) if samples is None else x.new_empty(len(samples), x.shape[1])
        added, scratch = torch.empty_like(y), step.scratch(len(x) * self._scratch_per_token)
        layer, rows = byref(self._layer), len(y)
        arguments = (
            *(layer, byref(step.whole)),
            *((None, None) if late is None or samples is None else (byref(late), samples.data_ptr())),
            *(tensor.data_ptr() for tensor in (cosines, sines, keys, values)),
            keys.shape[2],
            *(tensor.data_ptr() for tensor in (x, y, added, scratch)),
        )
        sums = self.sums if self.sums is not None and y.numel() <= self.sums.most else None
        if self.reduce is None or sums is not None:
            if self._library.decoder_layer(*arguments, None if sums is None else byref(sums.struct)):
                assert sums is not None
                raise sums.failure
            return y
        self._library.layer_attention(*arguments)
        self.reduce(added)
        self._library.layer_mlp(layer, rows, y.data_ptr(), added.data_ptr(), scratch.data_ptr())
        self.reduce(added)
        self._library.layer_end(layer, rows, y.data_ptr(), added.data_ptr())
        return y


class ShardSums:
    """Sums of kernels over the shards of this rank's stage."""

    def __init__(self, memory: SumMemory) -> None:
        self.most = memory.most
        self.failure: BaseException = AssertionError("no wait has failed")
        self._memory = memory
        shards = len(memory.counters)
        counters = (ctypes.c_void_p * shards)(*memory.counters)
        slots = (ctypes.c_void_p * (len(memory.slots) * shards))(*chain(*memory.slots))
        self._held = counters, slots, _WAIT(self._wait)
        state = memory.state.ctypes.data
        self.struct = _Sums(
            *(shards, memory.place, memory.spins, state),
            *(ctypes.addressof(counters), ctypes.addressof(slots), self._held[2]),
        )

    def _wait(self) -> int:
        """For C, which nothing may be raised through; whether it failed."""
        try:
            self._memory.wait()
        except BaseException as failure:
            self.failure = failure
            return 1
        return 0


_WAIT = ctypes.CFUNCTYPE(ctypes.c_int)


class _Sums(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("shards", "place", "spins")),
        *((name, ctypes.c_void_p) for name in ("state", "counters", "slots")),
        ("wait", _WAIT),
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


def _step(places: torch.Tensor, positions: torch.Tensor, alone: int, chunks: torch.Tensor) -> _Step:
    held = (places, positions, chunks)
    step = _Step(len(places), alone, len(chunks), *(tensor.data_ptr() for tensor in held))
    step.held = held
    return step
