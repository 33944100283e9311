"""Shards: how units are divided, what a shard reads, and that shards together compute what one rank does."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, MODERN, SIZES, save_random
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mpinfer.errors import ModelError, PlanError
from mpinfer.generate.cache import KVCache, PackedStep
from mpinfer.generate.scheduler import Segment
from mpinfer.models.checkpoint import Checkpoint
from mpinfer.models.decoder import DecoderPart, DecoderSkeleton
from mpinfer.models.fused import FusedLinear
from mpinfer.models.sources import Slice, Source
from mpinfer.models.tensor_parallel import Shard
from mpinfer.plan.block import vocabulary_share
from mpinfer.plan.shards import split, split_evenly

HEADS = {**MODERN, "hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 2}
UNEVEN = {
    **dict.fromkeys(("Llama", "Phi", "Phi3", "Granite", "Cohere", "Starcoder2"), HEADS),
    "Qwen2": {**HEADS, "head_dim": 16, "tie_word_embeddings": True},
    "Qwen3": {**HEADS, "head_dim": 8},
    "Gemma2": {**HEADS, "head_dim": 16, "sliding_window": 8},
    "Gemma3Text": {**HEADS, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "GPT2": {**FAMILIES["GPT2"], "n_embd": 45, "n_head": 5, "n_layer": 2},
    "GPTNeoX": {**FAMILIES["GPTNeoX"], "hidden_size": 40, "num_attention_heads": 5},
    "OPT": {**FAMILIES["OPT"], "hidden_size": 45, "num_attention_heads": 5},
}
REFUSED = {
    "Mixtral": ({**HEADS, "num_local_experts": 4}, "experts"),
    "Olmo2": (HEADS, "q_norm.weight .* spans several heads"),
}


class Threads:
    """Shards that are threads of this process."""

    def __init__(self, count: int) -> None:
        self.calls = [0] * count
        self._gate = threading.Barrier(count, timeout=60)
        self._given: list[torch.Tensor] = [torch.empty(0)] * count

    def shard(self, index: int) -> Shard:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            self.calls[index] += 1
            self._given[index] = tensor.clone()
            self._gate.wait()
            tensor.copy_(torch.stack(self._given).sum(0))
            self._gate.wait()
            return tensor

        return Shard(index, len(self._given), reduce)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: dict[int, Any] = {}

        def one(index: int) -> None:
            try:
                results[index] = work(index)
            except Exception:
                self._gate.abort()
                raise

        threads = [threading.Thread(target=one, args=[index]) for index in range(len(self._given))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[index] for index in range(len(threads))]


def compute(part: DecoderPart, ids: list[int]) -> torch.Tensor:
    """Logits of the part's vocabulary for a prompt in two chunks, then a token that is decoded."""
    cache = KVCache(1, 64, "cpu")
    rows = []
    for start, length in ((0, 10), (10, len(ids) - 11), (len(ids) - 1, 1)):
        step = PackedStep(cache, [Segment(0, start, length, length)], part.kernels)
        rows.append(part(torch.tensor(ids[start : start + length]), step.positions, step))
    return part.logits(torch.cat(rows))


def load(directory, shard: Shard | None = None, dtype: str = "float32") -> DecoderPart:
    skeleton = DecoderSkeleton(directory, dtype)
    place = (shard.index, shard.count) if shard else (0, 1)
    vocabulary = vocabulary_share(skeleton.vocabulary, 0, 1, *place)
    return skeleton.load_part(0, len(skeleton.layers) + 2, "cpu", 4, lambda: None, vocabulary, shard)


def save(directory, name: str, sizes) -> None:
    import transformers

    model = save_random(directory, getattr(transformers, f"{name}Config")(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.3)  # biases and norms of a random model would be 0 and 1
    model.save_pretrained(directory, max_shard_size="50KB")


# -- how units are divided ----------------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.lists(st.floats(0, 100), min_size=1, max_size=9), st.sampled_from([1, 16, 64]))
def test_a_split_covers_all_units_in_order_and_leaves_nobody_without(units, shares, align):
    shares = [*shares, 1.0]
    if -(-units // align) < len(shares):
        with pytest.raises(PlanError, match=f"use at most {-(-units // align)} shards"):
            split(units, shares, align)
        return
    parts = split(units, shares, align)
    assert [unit for part in parts for unit in part] == list(range(units))
    assert len(parts) == len(shares)
    assert all(len(part) >= 1 for part in parts)
    assert all(part.start % align == 0 for part in parts)


@given(st.integers(1, 500), st.integers(1, 20))
def test_even_shares_differ_by_at_most_one_unit(units, count):
    if units >= count:
        lengths = [len(part) for part in split(units, [1] * count)]
        assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 5000), st.integers(1, 20))
def test_columns_are_divided_evenly_to_an_aligned_block(units, parts):
    if units < parts:
        return
    lengths = [len(part) for part in split_evenly(units, parts)]
    assert sum(lengths) == units
    # The last block may hold less than the others; a block is at most a quarter of a part.
    assert max(lengths) - min(lengths) < max(2, 2 * units / (4 * parts))


def test_three_heads_over_two_shards_are_uneven_and_columns_are_not():
    assert [len(part) for part in split(3, [1, 1])] == [2, 1]
    assert [len(part) for part in split_evenly(1536, 2)] == [768, 768]


def test_the_vocabulary_belongs_to_the_shards_of_the_last_stage():
    shares = [vocabulary_share(100, stage, 2, shard, 3) for stage in range(2) for shard in range(3)]
    assert shares[:3] == [range(0)] * 3
    assert [token for share in shares[3:] for token in share] == list(range(100))


# -- what a shard reads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("axis", "ranges"), [(0, (range(2, 5),)), (1, (range(1, 4),)), (1, (range(2), range(5, 7)))])
def test_a_slice_is_read_alone(tmp_path, dtype, axis, ranges):
    whole = torch.arange(42.0).view(6, 7).to(dtype)
    save_file({"a": torch.ones(3), "w": whole, "z": torch.ones(5)}, tmp_path / "model.safetensors")
    part = Slice(axis, ranges, (6, 7))
    target = torch.empty(part.shape)
    read = Source({"": ["w"]}, part=part).load(Checkpoint(tmp_path), target)
    assert torch.equal(target, part.of(whole).float())
    assert read == target.numel() * whole.element_size()


def test_a_slice_of_a_tensor_of_another_shape_is_refused(tmp_path):
    save_file({"w": torch.ones(6, 7)}, tmp_path / "model.safetensors")
    part = Slice(0, (range(2),), (6, 8))
    with pytest.raises(ModelError, match=r"has shape \[6, 7\], config.json asks for \[6, 8\]"):
        Source({"": ["w"]}, part=part).load(Checkpoint(tmp_path), torch.empty(2, 8))


# -- what shards compute together ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNEVEN)
def test_shards_compute_what_one_rank_does(tmp_path, name):
    save(tmp_path, name, UNEVEN[name])
    ids = torch.randint(3, 128, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    whole = load(tmp_path)
    expected = compute(whole, ids)
    for count in (2, 3):
        threads = Threads(count)
        parts = [load(tmp_path, threads.shard(index)) for index in range(count)]
        threads.run(lambda index, parts=parts: parts[index].agree())
        found = torch.cat(threads.run(lambda index, parts=parts: compute(parts[index], ids)), dim=1)
        assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
        layers = len(DecoderSkeleton(tmp_path, "float32").layers)
        assert threads.calls == [1 + 3 * (1 + 2 * layers)] * count  # to agree, and in each of three steps
        assert max(part.weight_bytes for part in parts) < 1.3 * whole.weight_bytes / count + 30_000  # replicated norms
        assert sum(part.read_bytes for part in parts) < 1.3 * whole.read_bytes


def test_local_slices_are_still_fused(tmp_path):
    save(tmp_path, "Llama", HEADS)
    part = load(tmp_path, Threads(2).shard(0))
    widths = [module.widths for module in part.modules() if isinstance(module, FusedLinear)]
    assert widths == [[96, 32, 32], [widths[1][0]] * 2] * 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sharded_is_refused_with_the_reason(tmp_path, name):
    sizes, words = REFUSED[name]
    save(tmp_path, name, sizes)
    summary = DecoderSkeleton(tmp_path, "float32").summary(with_head=True)
    assert summary.most_shards == 1
    with pytest.raises(ModelError, match=rf"cannot be sharded \(.*{words}.*\); use parallel.shards=1"):
        load(tmp_path, Threads(2).shard(0))


def test_a_model_makes_no_more_shards_than_it_has_kv_heads(tmp_path):
    save(tmp_path, "Llama", {**MODERN, "num_key_value_heads": 4, "num_hidden_layers": SIZES["num_hidden_layers"]})
    summary = DecoderSkeleton(tmp_path, "float32").summary(with_head=True)
    assert (summary.most_shards, summary.shards_problem) == (4, "it has 4 KV heads")
