"""The KV cache of a stage, and attention over it for tokens packed without padding.

A slot holds one sequence: `capacity` tokens of address space per layer, of which only what is written
becomes resident memory on a CPU. Nothing is copied as a sequence grows. A slot's next sequence finds the
memory of the last, since the system takes a microsecond and more for every new page.
"""

import ctypes
import functools
import mmap
from collections.abc import Iterator, Sequence
from itertools import chain
from math import inf, prod

import numpy as np
import torch
from torch.nn import functional

from mpinfer.generate.scheduler import Segment
from mpinfer.models.kernels import Kernels
from mpinfer.models.layer import Attention, CompiledLayer, LayerCall, LayerStep, compute_layers

# Address space, not memory: Linux's flag for it, which Python names from 3.13 on.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_LIBC = ctypes.CDLL(None, use_errno=True)
_SHORTEST_RUN = 4  # sequences: fewer do not make up for a call
_SIMILAR = 0.8  # of the longest sequence's length


class KVCache:
    """Keys and values of the layers that this stage holds, for `slots` sequences of up to `capacity` tokens. Free slots
    keep no memory that would make it more than for `tokens`."""

    def __init__(self, slots: int, capacity: int, device: str, tokens: float = inf) -> None:
        self.slots, self.capacity, self.device = slots, capacity, device
        self._tokens = tokens
        self._resident = [0] * slots  # tokens whose pages a slot has
        self._free: set[int] = set()  # slots that have some
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, [slots, kv_heads, capacity, head_dim]; allocated at its first use.

        A head's keys lie side by side, since attention reads them one head after another.
        """
        if index not in self._layers:
            shape = (self.slots, kv_heads, self.capacity, head_dim)
            self._layers[index] = (_zeros(shape, dtype, self.device), _zeros(shape, dtype, self.device))
        return self._layers[index]

    def grow(self, segments: Sequence[Segment]) -> None:
        """Make room for what these will write."""
        for segment in segments:
            self._free.discard(segment.slot)
            self._resident[segment.slot] = max(self._resident[segment.slot], segment.start + segment.length)
        while self._free and sum(self._resident) > self._tokens:
            slot = self._free.pop()
            self._resident[slot] = 0
            for tensor in self._tensors():
                _give_back(tensor[slot])

    @torch.inference_mode()
    def fill(self, segments: Sequence[Segment]) -> None:
        """Write all that these tokens look at, for whoever times them: what was never written is all the same page of
        zeros, which stays in a CPU's caches."""
        self.grow(segments)
        for tensor in self._tensors():
            for segment in segments:
                tensor[segment.slot, :, : segment.start + segment.length] = 0

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """A slot's sequence has ended. Its next one starts from zeros."""
        if self.device != "cpu":
            return  # there the slots are memory of their own, used or not
        for tensor in self._tensors():
            tensor[slot, :, : self._resident[slot]] = 0
        self._free.add(slot)

    def _tensors(self) -> Iterator[torch.Tensor]:
        return chain.from_iterable(self._layers.values())


class PackedStep:
    """The tokens of one step: where each stands in its sequence, and how they attend. Same for all layers."""

    def __init__(self, cache: KVCache, segments: Sequence[Segment], kernels: Kernels | None = None) -> None:
        self._cache, self._kernels = cache, kernels
        device = cache.device
        slots, starts, counts, _ = np.array(segments, dtype=np.int64).T
        ends = counts.cumsum()
        positions = np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
        self.positions = torch.from_numpy(positions).to(device)  # [tokens]
        self._slots = torch.from_numpy(np.repeat(slots, counts)).to(device)  # [tokens]
        last = zip(ends.tolist(), segments, strict=True)
        samples = [row for end, s in last for row in range(end - s.samples, end)]
        self.samples = torch.tensor(samples, dtype=torch.long, device=device)  # rows, [samples]
        self._decoding = decoding = next((i for i, s in enumerate(segments) if s.length > 1), len(segments))
        self._alone = segments[:decoding]
        self._chunks = list(zip((ends - counts)[decoding:].tolist(), segments[decoding:], strict=True))
        self._places_of: dict[int, torch.Tensor] = {}
        self._head_places: dict[int, torch.Tensor] = {}
        self._layer_steps: dict[int, LayerStep] = {}
        self._calls: list[LayerCall] = []  # of layers that are computed together with the next
        self._before: tuple[CompiledLayer, torch.Tensor, torch.Tensor] | None = None  # a layer, its output and a copy
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    @functools.cached_property
    def _runs(self) -> list[tuple[int, list[Segment]]]:
        return _runs(self._alone)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,  # [tokens, heads, head_dim]
        key: torch.Tensor,  # [tokens, kv_heads, head_dim]
        value: torch.Tensor,  # [tokens, kv_heads, head_dim]
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Store keys and values, then attend from every token to its own sequence. [tokens, heads, head_dim]."""
        _, kv_heads, head_dim = key.shape
        keys, values = self._cache.layer(layer, kv_heads, head_dim, key.dtype)
        places = self._places_of_heads(kv_heads)
        keys.view(-1, head_dim).index_copy_(0, places, key.reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, places, value.reshape(-1, head_dim))
        return self._look_up(query, keys, values, scaling, sliding_window, softcap)

    def attend_projected(
        self,
        facts: Attention,
        projected: torch.Tensor,  # [tokens, (heads + 2 * kv_heads) * head_dim]
        cosines: torch.Tensor,  # [tokens, head_dim]
        sines: torch.Tensor,
    ) -> torch.Tensor:
        """The same from queries, keys and values side by side, before norms and rotary embeddings. Needs kernels."""
        assert self._kernels is not None
        keys, values = self._cache.layer(facts.layer, facts.kv_heads, facts.head_dim, projected.dtype)
        places = self._places(facts.kv_heads)
        query = self._kernels.rotate_and_store(projected, cosines, sines, facts.norms, keys, values, places)
        return self._look_up(query, keys, values, facts.scaling, facts.window, facts.softcap)

    def compute(
        self,
        layer: CompiledLayer,
        x: torch.Tensor,  # [tokens, hidden]
        cosines: torch.Tensor,  # [tokens, head_dim]
        sines: torch.Tensor,
    ) -> torch.Tensor:
        """A whole layer; [tokens, hidden], or of a last one [samples, hidden]. One whose output the next layer takes as
        it is gives x back: it is computed together with that."""
        facts = layer.attention
        keys, values = self._cache.layer(facts.layer, facts.kv_heads, facts.head_dim, x.dtype)
        step = self._layer_step(facts.kv_heads)
        self._find_next(layer, x)
        self._calls.append(LayerCall(layer, step, keys, values, cosines.contiguous(), sines.contiguous()))
        if layer.next is not None and layer.next.whole:
            return x
        y = self.catch_up(x)
        if not layer.is_settled:
            layer.is_settled, self._before = True, (layer, y, y.clone())
        return y

    def catch_up(self, x: torch.Tensor) -> torch.Tensor:
        """What the layers that wait for the next, if any, make of x."""
        calls, self._calls = self._calls, []
        return compute_layers(calls, x) if calls else x

    def _find_next(self, layer: CompiledLayer, x: torch.Tensor) -> None:
        """In the first step of all: whether x is what the layer before has made."""
        if self._before is not None:
            before, y, copy = self._before
            before.next = layer if x.data_ptr() == y.data_ptr() and torch.equal(x, copy) else None
            self._before = None

    def sampled(self, y: torch.Tensor) -> torch.Tensor:
        """The rows of samples, [samples, hidden], of what a last stage has made of all tokens, or of them alone."""
        return y if len(y) == len(self.samples) else y[self.samples]

    def _look_up(
        self,
        query: torch.Tensor,  # [tokens, heads, head_dim]
        keys: torch.Tensor,  # [slots, kv_heads, capacity, head_dim]
        values: torch.Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention to what is stored, that of this step included. [tokens, heads, head_dim]"""
        output = query.new_empty(query.shape)
        if self._kernels is not None and softcap is None:
            self._look_up_compiled(self._kernels, query, keys, values, output, scaling, sliding_window)
            return output
        for row, run in self._runs:
            # One token each of sequences in neighbouring slots. The heads that share a key form the query rows.
            rows = slice(row, row + len(run))
            slots, length = slice(run[0].slot, run[-1].slot + 1), max(s.start for s in run) + 1
            k, v = keys[slots, :, :length], values[slots, :, :length]  # [sequences, kv_heads, length, head_dim]
            q = query[rows].unflatten(1, (k.shape[1], -1))  # [sequences, kv_heads, heads / kv_heads, head_dim]
            padded = any(s.start + 1 < length for s in run) or (sliding_window is not None and length > sliding_window)
            positions = self.positions[rows, None, None, None]
            mask = self._mask(row, positions, length, sliding_window, query.dtype) if padded else None
            output[rows] = _attention(q, k, v, mask, False, scaling, softcap).flatten(1, 2)
        for row, segment in self._chunks:
            # A chunk of one sequence's prompt against all of the prompt so far.
            rows = slice(row, row + segment.length)
            slot, length = segment.slot, segment.start + segment.length
            k, v = keys[slot, None, :, :length], values[slot, None, :, :length]  # [1, kv_heads, length, head_dim]
            q = query[rows].transpose(0, 1)[None]
            plain = sliding_window is None or length <= sliding_window
            if plain and softcap is None and _has_flash(q):
                output[rows] = _flash(q, k, v, segment.start, scaling)[0].transpose(0, 1)
                continue
            whole = plain and segment.start == 0
            positions = self.positions[rows, None]
            mask = None if whole else self._mask(row, positions, length, sliding_window, query.dtype)
            output[rows] = _attention(q, k, v, mask, whole, scaling, softcap)[0].transpose(0, 1)
        return output

    def _look_up_compiled(
        self,
        kernels: Kernels,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> None:
        if query.stride()[1:] != (query.shape[2], 1):
            query = query.contiguous()
        if self._decoding:
            rows, places = slice(self._decoding), self._places(keys.shape[1])
            kernels.attend_tokens(query[rows], keys, values, places, self.positions, output, scaling, window)
        for row, segment in self._chunks:
            rows, slot = slice(row, row + segment.length), segment.slot
            kernels.attend_chunk(query[rows], keys[slot], values[slot], segment.start, output[rows], scaling, window)

    def _layer_step(self, kv_heads: int) -> LayerStep:
        """The same for layers that are computed whole."""
        if kv_heads not in self._layer_steps:
            # Chunks' samples are attended one by one, which is slow for many.
            few = all(segment.samples <= 1 for _, segment in self._chunks)
            chunks = [(row, s.length, s.slot, s.start) for row, s in self._chunks]
            self._layer_steps[kv_heads] = LayerStep(
                self._places(kv_heads),
                self.positions,
                self._decoding,
                torch.tensor(chunks, dtype=torch.int64).view(-1, 4),
                self.samples if few else None,
            )
        return self._layer_steps[kv_heads]

    def _places(self, kv_heads: int) -> torch.Tensor:
        """Where keys and values of every token's first head go, in a layer seen as rows of head_dim. [tokens]"""
        if kv_heads not in self._places_of:
            self._places_of[kv_heads] = self._slots * kv_heads * self._cache.capacity + self.positions
        return self._places_of[kv_heads]

    def _places_of_heads(self, kv_heads: int) -> torch.Tensor:
        """The same of every token and head. [tokens * kv_heads]"""
        if kv_heads not in self._head_places:
            heads = torch.arange(kv_heads, device=self._slots.device) * self._cache.capacity
            self._head_places[kv_heads] = (self._places(kv_heads)[:, None] + heads).flatten()
        return self._head_places[kv_heads]

    def _mask(
        self, row: int, positions: torch.Tensor, length: int, window: int | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """0 where a token may look: itself and before, within the window; -inf elsewhere. Computed once for all layers,
        and as what is added to scores, since kernels would convert a mask of booleans at every call."""
        if (row, window) not in self._masks:
            past = torch.arange(length, device=positions.device)
            mask = past <= positions
            if window is not None:
                mask &= past > positions - window
            hidden = torch.full(mask.shape, float("-inf"), dtype=dtype, device=mask.device)
            self._masks[row, window] = hidden.masked_fill_(mask, 0.0)
        return self._masks[row, window]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros, because what is masked is still multiplied by 0 and must be finite. On a CPU they are the kernel's
    own zero pages, which take memory only once they are written; not huge ones, of which a few tokens in every
    slot would take all."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    pages = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=flags)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _give_back(tensor: torch.Tensor) -> None:
    """Hand the whole pages of a contiguous part of `_zeros` back to the kernel: they are read as zeros again."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0 and _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise cannot release KV cache pages")


def _attention(
    query: torch.Tensor,  # [sequences, heads, rows, head_dim]
    key: torch.Tensor,  # [sequences, kv_heads, length, head_dim]
    value: torch.Tensor,
    mask: torch.Tensor | None,  # 0 where a row may look, else -inf; None: everywhere, or where `causal` lets it
    causal: bool,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap))
    if causal:
        mask = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _has_flash(query: torch.Tensor) -> bool:
    return query.device.type == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def _flash(
    query: torch.Tensor,  # [1, heads, rows, head_dim]
    key: torch.Tensor,  # [1, kv_heads, start + rows, head_dim]
    value: torch.Tensor,
    start: int,
    scaling: float,
) -> torch.Tensor:
    """Causal attention of a chunk that begins at `start`: to all that is before it, and causally to itself, merged by
    their sums of exponentials (as in Flash-Decoding). Without a mask, whose dead half would be computed too."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    groups, rows = query.shape[1] // key.shape[1], query.shape[2]
    own_key, own_value = (x[:, :, start:].repeat_interleave(groups, 1) for x in (key, value))
    own, own_sum = flash(query, own_key, own_value, 0.0, True, scale=scaling)
    if not start:
        return own
    # The past looks the same from every row: heads that share a key are rows of one, which reads it once for all.
    folded = query.unflatten(1, (-1, groups)).flatten(2, 3)
    past, past_sum = flash(folded, key[:, :, :start], value[:, :, :start], 0.0, False, scale=scaling)
    past, past_sum = (x.unflatten(2, (groups, rows)).flatten(1, 2) for x in (past, past_sum))
    share = torch.sigmoid(past_sum - own_sum)[..., None].to(own.dtype)  # of the past in the sum of exponentials
    return own.lerp(past, share)


def _runs(segments: Sequence[Segment]) -> list[tuple[int, list[Segment]]]:
    """(first row, segments) of every run that is attended in one call, without a gather.

    A run is neighbouring slots of similar length: a call reads all its caches up to the longest one.
    """
    runs: list[tuple[int, list[Segment]]] = []
    for row, segment in enumerate(segments):
        run = runs[-1][1] if runs else []
        if run and run[-1].slot + 1 == segment.slot and not _worth_a_call(run, segment):
            run.append(segment)
        else:
            runs.append((row, [segment]))
    return runs


def _worth_a_call(run: Sequence[Segment], segment: Segment) -> bool:
    """Whether padding would cost more than the overhead of another call."""
    longest = max(s.start for s in run)
    shorter, longer = sorted((segment.start, longest))
    return len(run) >= _SHORTEST_RUN and shorter < _SIMILAR * longer
