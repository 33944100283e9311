"""Compiled kernels compute what torch computes, replace only what is equal, and are never missing silently."""

import math
import re
import subprocess
from ctypes import byref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mpinfer.errors import TransportError
from mpinfer.generate import cache as cache_module
from mpinfer.generate.cache import KVCache, PackedStep
from mpinfer.generate.scheduler import Segment
from mpinfer.models import decoder, linear
from mpinfer.models import kernels as module
from mpinfer.models.decoder import DecoderPart, DecoderSkeleton
from mpinfer.models.fused import FusedLinear, FusedMember, concatenated
from mpinfer.models.kernels import Kernels, find_kernels
from mpinfer.models.layer import ShardSums
from mpinfer.models.linear import CompiledLinear
from mpinfer.models.quantize import CompiledInt8Linear, hadamard, rotate
from mpinfer.models.quick import quicken


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found, problem = find_kernels("auto", "cpu", torch.float32)
    assert found is not None, problem
    return found


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A user who has compiled nothing yet, and a process that has loaded nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_load", module._load.__wrapped__)
    return tmp_path / "mpinfer"


# -- what they compute --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 576), (7, 13), (2, 300, 64)])
def test_norms(kernels, shape):
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    expected = functional.rms_norm(x, shape[-1:], weight, 1e-5)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gelu", [False, True])
def test_gates_of_all_sizes(kernels, gelu):
    gate = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, 1e-30, -1e30, 1e30])])
    up = torch.randn(len(gate))
    activated = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)
    found = kernels.gated(torch.cat([gate, up])[None], gelu)[0]
    torch.testing.assert_close(found, activated * up, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [64, 130, 5])  # whole panels, some and a part, a part
@pytest.mark.parametrize("inputs", [96, 200, 3])  # a piece, pieces and a rest, a rest
def test_linear_layers_of_any_shape_and_rows(kernels, inputs, outputs, bias):
    layer = nn.Linear(inputs, outputs, bias).requires_grad_(False)
    compiled = CompiledLinear(layer, kernels)
    for rows in (*range(1, 14), 24, 25, 600):
        x = torch.randn(2, rows, inputs)[:, ::2]  # a view with gaps
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 16, 24])
@pytest.mark.parametrize("rows", [1, 64, 70, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 200), (1600, 64)])
def test_linear_layers_are_as_exact_as_float32(kernels, inputs, outputs, rows, bits):
    """However they are computed: of numbers of one sign, whose errors would add up, and of such that cancel out; with
    weights that have so many bits, and then an output's that have more."""
    for x, weight in (torch.rand(2, max(rows, outputs), inputs), torch.randn(2, max(rows, outputs), inputs)):
        layer = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        layer.weight[:] = (weight[:outputs].view(torch.int32) & (-1 << 24 - bits)).view(torch.float32)
        for last in (layer.weight[-1], weight[outputs - 1]):
            layer.weight[-1] = last
            exact = functional.linear(x[:rows].double(), layer.weight.double())
            scale = x[:rows].norm(dim=1)[:, None] * layer.weight.norm(dim=1)  # what float32's error is a share of
            assert ((CompiledLinear(layer, kernels)(x[:rows]) - exact) / scale).abs().max() < 2e-6


def test_scratch_is_enough_for_smaller_widths(kernels):
    """A layer has room for its widest product only."""
    for scratch in (kernels.library.linear_scratch, kernels.library.int8_scratch):
        sizes = list(map(scratch, range(1, 300)))
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [576, 1200, 8])
@pytest.mark.parametrize("outputs", [64, 24, 200])
def test_int8_layers_of_any_shape_and_rows(kernels, inputs, outputs, bias):
    layer = nn.Linear(inputs, outputs, bias).requires_grad_(False)
    int8 = int8_layer(layer, kernels)
    for rows in (*range(1, 14), 24, 25, 600):
        x = torch.randn(1, rows, 2 * inputs)[..., ::2] * torch.logspace(-3, 3, rows)[:, None]  # a view with gaps
        x[:, 0] = 0
        expected = in_groups(layer, kernels, kernels.int8_group, x)
        # A code may be another where sums are rounded in another order.
        torch.testing.assert_close(int8(x), expected, rtol=0.01, atol=0.003 * x.abs().amax().item())


def test_only_widths_that_instructions_take_fit(kernels):
    assert not CompiledInt8Linear.fits(nn.Linear(7, 5), kernels)
    assert not CompiledInt8Linear.fits(nn.Linear(8, 5), None)


def test_int8_scales_are_those_of_their_groups(kernels):
    """Of inputs and weights that differ from group to group, where scales of a whole row, or of others, are far off."""
    layer = nn.Linear(1200, 200).requires_grad_(False)
    layer.weight *= torch.logspace(0, -2, 1200)
    int8 = int8_layer(layer, kernels)
    x = torch.randn(1, 9, 1200) * torch.logspace(-2, 0, 1200)

    def error(y):
        return ((y - expected).norm(dim=-1) / expected.norm(dim=-1)).max()

    expected = in_groups(layer, kernels, kernels.int8_group, x)
    assert error(int8(x)) < 0.002 < 0.01 < error(in_groups(layer, kernels, 1200, x))


@pytest.mark.parametrize(
    "numbers", [[1.0] * 8, [1.0, 1, 0, 0] * 2, [0, 0, -1.0, -1] * 2, [0, 1.0] * 4, [-1.0] + [0] * 7]
)
def test_int8_sums_of_the_largest_codes_fit(kernels, numbers):
    """Rotated inputs that are largest together times the largest weights: in 16 bits there is room for just these."""
    layer = nn.Linear(192, 64, bias=False).requires_grad_(False)
    layer.weight[:] = rotate(torch.ones(64, 192), hadamard(64))
    x = rotate(torch.tensor(numbers * 24).expand(7, 192), hadamard(64))[None]
    torch.testing.assert_close(int8_layer(layer, kernels)(x), layer(x), rtol=0.02, atol=1e-4)


def int8_layer(layer, kernels):
    if not kernels.int8_group:
        pytest.skip("this CPU has no int8 instructions")
    return CompiledInt8Linear(layer, kernels)


def in_groups(layer, kernels, group, x):
    """An int8 layer of which so many inputs share a scale, in each row of x and of the weights."""
    rotation = hadamard(min(64, layer.in_features & -layer.in_features))

    def rounded(rows, levels, largest):
        groups = rotate(rows, rotation).split(group, dim=1)
        steps = [largest(own).clamp_min(1e-30) / levels for own in groups]
        return torch.cat([(own / step).round() * step for own, step in zip(groups, steps, strict=True)], dim=1)

    def largest_number(rows):
        return rows.abs().amax(1, keepdim=True)

    def largest_sum(rows):
        """Of numbers of one sign that an instruction sums in 16 bits: of eight, 0, 1, 4 and 5, and 2, 3, 6 and 7."""
        fours = rows.reshape(len(rows), -1, 2, 2, 2).transpose(2, 3).flatten(3)
        return torch.maximum(fours.clamp_min(0).sum(3), -fours.clamp_max(0).sum(3)).flatten(1).amax(1, keepdim=True)

    library = kernels.library
    inputs = rounded(x[0], library.int8_levels(), largest_sum if library.int8_quads() == 2 else largest_number)
    return functional.linear(inputs, rounded(layer.weight, 127, largest_number), layer.bias)[None]


@pytest.mark.parametrize("tokens", [41, 200])
@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 128), (20, 2, 96), (40, 2, 80), (120, 1, 20)]
)
def test_tokens_and_chunks_attend_alike(kernels, heads, kv_heads, size, window, tokens):
    """Over more keys than a block has, by the two kernels and by torch; behind the last token there may be anything."""
    start, capacity = 150, 512
    keys, values = torch.randn(2, 1, kv_heads, capacity, size)
    keys[:, :, start + tokens :] = values[:, :, start + tokens :] = math.nan
    wide = torch.randn(tokens, 2 * heads * size)  # queries beside something else
    query = wide[:, : heads * size].unflatten(1, (heads, size))
    positions = torch.arange(start, start + tokens)
    one_by_one, together = torch.empty(2, tokens, heads, size)
    kernels.attend_tokens(query, keys, values, positions, positions, one_by_one, 0.1, window)
    kernels.attend_chunk(query, keys[0], values[0], start, together, 0.1, window)
    past = torch.arange(start + tokens)
    mask = (past <= positions[:, None]) & (past > positions[:, None] - (window or capacity))
    k, v = (x[:, :, : start + tokens] for x in (keys, values))
    expected = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], k, v, attn_mask=mask, scale=0.1, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(one_by_one, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


def test_a_row_does_not_depend_on_the_others(kernels):
    keys, values = torch.randn(2, 5, 2, 64, 32)
    query, positions = torch.randn(5, 4, 32), torch.tensor([3, 60, 9, 17, 0])
    places = torch.arange(5) * 2 * 64 + positions
    together, alone = torch.empty(2, 5, 4, 32)
    kernels.attend_tokens(query, keys, values, places, positions, together, 0.2, None)
    for row in (slice(i, i + 1) for i in range(5)):
        kernels.attend_tokens(query[row], keys, values, places[row], positions[row], alone[row], 0.2, None)
    assert torch.equal(together, alone)
    layer = CompiledLinear(nn.Linear(200, 130).requires_grad_(False), kernels)
    x = torch.randn(27, 200)
    assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))


# -- what they replace --------------------------------------------------------------------------------------------


def load(directory, family: str, save_random, on_layer=lambda: None, **options) -> DecoderPart:
    """A tiny random model of a family."""
    import transformers

    common = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "vocab_size": 128,
        "sliding_window": 30,
    }
    save_random(directory, getattr(transformers, f"{family}Config")(**common))
    return DecoderSkeleton(directory, "float32", **options).load_part(0, 4, "cpu", 4, on_layer, range(128))


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("Llama", (5, 2, 2, 2)),
        ("Qwen2", (5, 2, 2, 2)),
        ("Qwen3", (9, 2, 2, 2)),  # norms of queries and keys, too
        ("Gemma2", (9, 2, 2, 0)),  # weights that are added to 1, GELU; capped scores
        ("Gemma3Text", (13, 2, 2, 2)),  # norms behind attention and MLP, too
        ("Olmo2", (9, 2, 0, 0)),  # queries of all heads have one norm
        ("GPTNeoX", (0, 0, 0, 0)),
    ],
)
def test_families(tmp_path, family, counts, save_random, monkeypatch):
    monkeypatch.setattr(linear, "_seconds", lambda layers, _: dict.fromkeys(layers, 1.0))  # none is faster
    used = load(tmp_path, family, save_random).used
    assert tuple(used.get(kind, 0) for kind in ("norm", "gated MLP", "attention", "layer")) == counts


STEPS = (
    [Segment(0, 0, 9, 0), Segment(1, 0, 70, 1)],
    [Segment(1, 70, 1, 1), Segment(0, 9, 100, 1), Segment(2, 0, 2, 0)],
    [Segment(1, 71, 1, 1), Segment(0, 109, 1, 1)],
    [Segment(2, 2, 3, 0)],  # nothing is sampled
    [Segment(2, 5, 3, 2)],
)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3Text"])
def test_whole_layers_compute_what_their_modules_do(tmp_path, family, quantize, save_random, monkeypatch):
    """Of tokens alone and in chunks, with a window among the layers of Gemma; of a last layer only what is sampled."""
    monkeypatch.setattr(linear, "_seconds", lambda layers, _: dict.fromkeys(layers, 1.0))  # none is faster
    part = load(tmp_path, family, save_random, quantize=quantize)
    if quantize == "int8" and not part.kernels.int8_group:
        pytest.skip("this CPU has no int8 instructions for whole layers")
    assert part.used["layer"] == 2
    other = DecoderSkeleton(tmp_path, "float32", quantize=quantize)
    monkeypatch.setattr(
        decoder, "quicken", lambda model, kernels, layers, **_: quicken(model, kernels)._replace(layers=[None, None])
    )
    modules = other.load_part(0, 4, "cpu", 4, lambda: None, range(128))
    assert "layer" not in modules.used
    caches = [KVCache(3, 256, "cpu") for _ in range(2)]
    torch.manual_seed(1)  # with some tokens a code of int8 is on the edge between two, and falls either way
    for segments in STEPS:
        tokens = torch.randint(3, 128, (sum(s.length for s in segments),))
        steps = [PackedStep(cache, segments, part.kernels) for cache in caches]
        found, expected = (p(tokens, step.positions, step) for p, step in zip((part, modules), steps, strict=True))
        samples = sum(s.samples for s in segments)
        assert len(found) == (len(tokens) if segments[-1].samples == 2 else samples)
        torch.testing.assert_close(steps[0].sampled(found), steps[1].sampled(expected), rtol=1e-5, atol=1e-5)


def take_step(part, cache):
    """One that begins two sequences, one of them to be sampled."""
    packed = PackedStep(cache, STEPS[0], part.kernels)
    return part(torch.arange(79), packed.positions, packed)


def test_layers_are_computed_together_from_the_second_step_on(tmp_path, save_random, monkeypatch):
    monkeypatch.setattr(linear, "_seconds", lambda layers, _: dict.fromkeys(layers, 1.0))  # none is faster
    calls, run = [], cache_module.compute_layers
    monkeypatch.setattr(cache_module, "compute_layers", lambda layers, x: calls.append(len(layers)) or run(layers, x))
    seen = []
    part = load(tmp_path, "Llama", save_random, on_layer=lambda: seen.append(len(calls)))
    cache = KVCache(3, 256, "cpu")
    first = take_step(part, cache)
    assert torch.equal(take_step(part, cache), first)
    assert calls == [1, 1, 2]
    assert seen == [1, 2, 3, 3]  # before each layer, together with others or not
    _, second = part.compiled
    # Its module computes, of what the first layer has put off; in the next step the first one is not put off.
    part.model.model.layers[1].register_forward_pre_hook(lambda *_: setattr(second, "whole", False))
    for _ in range(2):
        torch.testing.assert_close(take_step(part, cache)[[-1]], first, rtol=1e-5, atol=1e-5)


def test_layers_are_computed_alone_where_a_model_does_something_in_between(tmp_path, save_random, monkeypatch):
    monkeypatch.setattr(linear, "_seconds", lambda layers, _: dict.fromkeys(layers, 1.0))  # none is faster
    part = load(tmp_path, "Llama", save_random)
    part.model.model.layers[0].register_forward_hook(lambda _, inputs, output: output.mul_(2))
    cache = KVCache(3, 256, "cpu")
    first = take_step(part, cache)
    assert part.compiled[0].next is None
    assert torch.equal(take_step(part, cache), first)


@pytest.mark.parametrize("failing", [1, 4])
def test_what_fails_between_layers_is_raised(tmp_path, save_random, monkeypatch, failing):
    monkeypatch.setattr(linear, "_seconds", lambda layers, _: dict.fromkeys(layers, 1.0))  # none is faster
    calls = []

    def fail():
        calls.append(1)
        if len(calls) == failing:
            raise TransportError("rank 1 has died")

    part = load(tmp_path, "Llama", save_random, on_layer=fail)
    cache = KVCache(3, 256, "cpu")
    if failing > 2:
        take_step(part, cache)
    with pytest.raises(TransportError, match="rank 1 has died"):
        take_step(part, cache)
    assert len(calls) == failing


class Mlp(nn.Module):
    def __init__(self, activation, forward) -> None:
        super().__init__()
        layers = [nn.Linear(8, 12).requires_grad_(False) for _ in range(2)]
        group = FusedLinear(concatenated(layers), 8, [12, 12])
        self.gate_proj, self.up_proj = (FusedMember(group, member) for member in range(2))
        self.down_proj = nn.Linear(12, 8).requires_grad_(False)
        self.act_fn, self._compute = activation, forward

    def forward(self, x):
        return self._compute(self, x)


def usual(m, x):
    return m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x))


@pytest.mark.parametrize(
    ("activation", "forward", "count"),
    [
        (nn.SiLU(), usual, 1),
        (nn.GELU("tanh"), usual, 1),
        (nn.GELU(), usual, 0),
        (nn.ReLU(), usual, 0),
        (nn.SiLU(), lambda m, x: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x)), 0),
        (nn.SiLU(), lambda m, x: 1.001 * usual(m, x), 0),
    ],
)
def test_only_what_computes_the_same_is_replaced(kernels, activation, forward, count):
    mlp, x = Mlp(activation, forward), torch.randn(3, 8)
    expected = mlp(x)
    assert quicken(mlp, kernels).modules["gated MLP"] == count
    torch.testing.assert_close(mlp(x), expected)


# -- where they come from -----------------------------------------------------------------------------------------


def test_they_are_compiled_once(fresh, monkeypatch):
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: calls.append(1) or run(*args, **options))
    for _ in range(2):
        found, problem = find_kernels("auto", "cpu", torch.float32)
        assert found is not None, problem
    assert len(calls) == 1
    assert sorted(path.suffix for path in fresh.iterdir()) == [".lock", ".so"]


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("no-such-cc", "there is no C compiler 'no-such-cc'"), ("cc --no-such-flag", "cc --no-such-flag failed: .+flag")],
)
def test_where_they_cannot_be_compiled_the_reason_is_told(fresh, monkeypatch, compiler, said):
    monkeypatch.setenv("CC", compiler)
    found, problem = find_kernels("auto", "cpu", torch.float32)
    assert found is None
    assert re.search(said, problem)
    assert not [path for path in fresh.iterdir() if path.suffix != ".lock"]


def test_a_damaged_library_is_told(fresh, monkeypatch):
    monkeypatch.setattr(module, "_compile", lambda _, library: library.write_bytes(b"\x7fELF nothing"))
    found, problem = find_kernels("auto", "cpu", torch.float32)
    assert found is None
    assert str(fresh) in problem
    assert problem.endswith("; remove it")


@pytest.mark.parametrize(
    ("choice", "device", "dtype"),
    [("torch", "cpu", torch.float32), ("auto", "cuda", torch.float32), ("auto", "cpu", torch.bfloat16)],
)
def test_who_does_not_want_them_hears_nothing(choice, device, dtype):
    assert find_kernels(choice, device, dtype) == (None, "")


def test_a_failed_wait_for_other_shards_is_told(kernels):
    slots, counters, state = np.zeros((2, 2, 4), np.float32), np.zeros(2, np.int64), np.zeros(3, np.int64)

    def wait():
        raise TransportError("rank 1 has died")

    addresses = [[slot.ctypes.data for slot in turn] for turn in slots]
    own, other = (counters[shard:].ctypes.data for shard in range(2))
    memory = SimpleNamespace(place=0, counters=[own, other], slots=addresses, state=state, most=4, spins=3, wait=wait)
    sums, values = ShardSums(memory), np.ones(4, np.float32)
    assert kernels.library.sum_shards(byref(sums.struct), values.ctypes.data, 4) == 1
    with pytest.raises(TransportError, match="rank 1 has died"):
        sums.wait.check()
    counters[1] = 2  # it has said something in the next turn, too
    slots[0, 1] = 5
    assert kernels.library.sum_shards(byref(sums.struct), values.ctypes.data, 4) == 0
    assert values.tolist() == [6] * 4
    assert state.tolist() == [0, 2, 4]
