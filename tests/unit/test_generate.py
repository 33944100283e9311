"""Decoding in one process: any cut, any batching, the same tokens as transformers."""

import itertools
import os
import threading
from pathlib import Path

import pytest
import torch

from mpinfer.errors import OutOfMemoryError
from mpinfer.generate.cache import KVCache, PackedStep
from mpinfer.generate.readout import Best, NoReadout
from mpinfer.generate.ring import DecodeRing, Finish
from mpinfer.generate.scheduler import Limits, Scheduler, Segment, Sequence, Step
from mpinfer.generate.stage import DecodeStage, encode_step
from mpinfer.generate.tasks import Generate
from mpinfer.generate.text import Text
from mpinfer.models.decoder import DecoderPart, DecoderSkeleton
from mpinfer.models.halving import Halving
from mpinfer.models.kernels import find_kernels
from mpinfer.models.linear import PackedLinear
from mpinfer.observe.account import Account
from mpinfer.pipeline.worker import Worker
from mpinfer.plan.block import vocabulary_share
from mpinfer.plan.schedule import stream
from mpinfer.spec import GenerateSpec
from mpinfer.transport.local import LocalChannel

MAX_NEW = 6


class Records:
    """A source that hands over all sequences at once and keeps what is finished."""

    def __init__(self, sequences):
        self._sequences, self.finished = list(sequences), {}

    def refill(self, scheduler):
        while self._sequences:
            scheduler.add(self._sequences.pop(0))
        return False

    def wait(self):
        raise AssertionError("there is nothing to wait for")

    def finish(self, sequences):
        self.finished.update({s.index: s for s in sequences})


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (1, 2, 30, 7, 17, 5, 40, 3)]


def reference(model, prompt, **options):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": MAX_NEW, "do_sample": False, **options}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def load(directory, cuts, stage, with_head=True):
    """The part of one of the stages between `cuts`."""
    skeleton = DecoderSkeleton(directory, "float32")
    vocabulary = vocabulary_share(skeleton.vocabulary, stage, len(cuts) - 1) if with_head else range(0)
    return skeleton.load_part(*cuts[stage : stage + 2], "cpu", 4, lambda: None, vocabulary)


def run(parts, scheduler, groups, slots, source, task, kind=Best, length=64):
    """Run the stages in threads that are linked by local channels, until all of the source's sequences are finished."""
    channels = [LocalChannel() for _ in parts]  # channel s leads from stage s to the next, the last one back
    finish = Finish(task, kind(parts[0]), parts[0].final_size, Account())
    inboxes = [DecodeRing(scheduler, groups, source, channels[-1], finish), *channels[:-1]]
    readouts = [NoReadout(parts[0]), *(kind(part) for part in parts[1:])]
    stages = [
        DecodeStage(part, KVCache(slots, length, "cpu"), readout, Halving())
        for part, readout in zip(parts, readouts, strict=True)
    ]
    workers = [Worker(*ends, Account()) for ends in zip(inboxes, stages, channels, strict=True)]
    first, *later = workers
    for worker in later:
        threading.Thread(target=worker.run, args=[stream()], daemon=True).start()
    first.run(stream())  # in this thread: it ends last, and its errors are the test's


def decode(directory, cuts, groups, micro_batch, step_tokens, kv_tokens=10_000):
    """Greedy tokens by record."""
    length = 64
    parts = [load(directory, cuts, stage) for stage in range(len(cuts) - 1)]
    limits = Limits(MAX_NEW, {2})
    source = Records(Sequence(index, index, prompt, limits) for index, prompt in enumerate(prompts()))
    scheduler = Scheduler(groups, micro_batch, step_tokens, length, kv_tokens)
    task = Generate(Text(directory, 128), GenerateSpec(), {2}, length, needs_logits=False)
    run(parts, scheduler, groups, groups * micro_batch, source, task)
    return {index: s.new_tokens for index, s in source.finished.items()}


@pytest.mark.parametrize("cuts", [(0, 6), (0, 1, 6), (0, 3, 6), (0, 5, 6), (0, 2, 3, 6), (0, 1, 2, 3, 4, 5, 6)])
def test_llama_cut_anywhere_equals_transformers(tiny_llama, cuts):
    directory, model = tiny_llama
    tokens = decode(directory, cuts, groups=len(cuts) - 1, micro_batch=2, step_tokens=16)
    assert tokens == {index: reference(model, prompt) for index, prompt in enumerate(prompts())}


@pytest.mark.parametrize(("groups", "micro_batch", "step_tokens"), [(1, 1, 1), (1, 8, 256), (3, 2, 5), (2, 3, 3)])
def test_sliding_window_and_any_batching_equal_transformers(tiny_mistral, groups, micro_batch, step_tokens):
    directory, model = tiny_mistral
    tokens = decode(directory, (0, 2, 5), groups, micro_batch, step_tokens)
    assert tokens == {index: reference(model, prompt) for index, prompt in enumerate(prompts())}


def test_each_part_reads_only_its_own_tensors(tiny_llama):
    directory, model = tiny_llama
    whole = DecoderSkeleton(directory, "float32").summary(with_head=True)
    embedding_bytes = model.lm_head.weight.nbytes
    for cuts, stage in (((0, 6), 0), ((0, 3, 6), 0), ((0, 3, 6), 1), ((0, 2, 4, 6), 1)):
        part = load(directory, cuts, stage)
        summary = whole.for_stages(len(cuts) - 1, shards=1)
        assert part.read_bytes == summary.weight_bytes_of(*cuts[stage : stage + 2])
        # A head that is packed apart from the embedding it is tied to is held twice.
        assert part.weight_bytes - part.read_bytes in ({0, embedding_bytes} if cuts == (0, 6) else {0})


def test_packed_linear_layers_compute_the_same():
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40)
    packed = PackedLinear(layer)
    for rows in (1, 5, 64):
        x = torch.randn(1, rows, 24)
        torch.testing.assert_close(packed(x), layer(x))


def test_summary_adds_up_to_the_model(tiny_llama):
    directory, model = tiny_llama
    summary = DecoderSkeleton(directory, "float32").summary(with_head=True)
    assert [block.name for block in summary.blocks] == ["embed", *(f"layer.{i}" for i in range(4)), "head"]
    assert summary.weight_bytes == sum(p.numel() * 4 for p in model.parameters())
    assert summary.blocks[1].cost_per_token == 2 * sum(
        p.numel() for p in model.model.layers[0].parameters() if p.dim() > 1
    )


def test_progress_is_called_before_every_own_layer(tiny_llama):
    directory, _ = tiny_llama
    calls = []
    part = DecoderSkeleton(directory, "float32").load_part(0, 3, "cpu", 4, lambda: calls.append(1), range(0))
    step = PackedStep(KVCache(1, 8, "cpu"), [Segment(0, 0, 2, 1)], part.kernels)
    part(torch.tensor([3, 4]), step.positions, step)
    assert len(calls) == 2


def naive_attention(q, k, v, scaling, window):
    """One sequence, one loop over queries: [tokens, heads, head_dim] each, queries being the last tokens."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = []
    for i in range(len(q)):
        position = len(k) - len(q) + i
        first = 0 if window is None else max(0, position - window + 1)
        scores = torch.einsum("hd,thd->ht", q[i], k[first : position + 1]) * scaling
        out.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v[first : position + 1]))
    return torch.stack(out)


@pytest.mark.parametrize("by", ["flash", "plain", "kernels"])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_attention_equals_a_loop(window, by, monkeypatch):
    monkeypatch.setattr("mpinfer.generate.cache._has_flash", lambda _: by == "flash")
    kernels, _ = find_kernels("auto" if by == "kernels" else "torch", "cpu", torch.float32)
    assert (kernels is not None) == (by == "kernels")
    torch.manual_seed(0)
    heads, kv_heads, dim = 6, 2, 8
    cache = KVCache(slots=5, capacity=16, device="cpu")
    history = {slot: [torch.empty(0, kv_heads, dim), torch.empty(0, kv_heads, dim)] for slot in range(5)}
    steps = [
        [Segment(0, 0, 4, 1), Segment(1, 0, 7, 1), Segment(3, 0, 2, 0)],
        [Segment(0, 4, 1, 1), Segment(1, 7, 1, 1), Segment(3, 2, 5, 1), Segment(4, 0, 1, 1)],
        [Segment(1, 8, 1, 1), Segment(3, 7, 1, 1), Segment(4, 1, 1, 1)],
        [Segment(0, 0, 3, 1)],  # the slot of a sequence that has left
    ]
    for segments in steps:
        step = PackedStep(cache, segments, kernels)
        total = sum(s.length for s in segments)
        q = torch.randn(total, heads, dim)
        k, v = torch.randn(total, kv_heads, dim), torch.randn(total, kv_heads, dim)
        out = step.attend(0, q, k, v, 0.5, window)
        row = 0
        for s in segments:
            rows = slice(row, row + s.length)
            past_k, past_v = history[s.slot]
            history[s.slot] = [torch.cat([past_k[: s.start], k[rows]]), torch.cat([past_v[: s.start], v[rows]])]
            expected = naive_attention(q[rows], *history[s.slot], 0.5, window)
            torch.testing.assert_close(out[rows], expected, rtol=1e-5, atol=1e-6)
            row += s.length
        assert step.samples.tolist() == [
            end - 1
            for end, s in zip(itertools.accumulate(x.length for x in segments), segments, strict=True)
            if s.samples
        ]


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_cache_takes_memory_only_for_what_is_written():
    before = resident_bytes()
    cache = KVCache(slots=64, capacity=1 << 20, device="cpu")  # 128 GiB of keys and as much of values
    step = PackedStep(cache, [Segment(slot, 0, 3, 1) for slot in range(64)])
    kv = torch.randn(192, 4, 128)
    output = step.attend(0, kv, kv, kv, 1.0)
    assert torch.isfinite(output).all()
    assert resident_bytes() - before < 64e6


def written(cache, layer, lengths):
    """A cache whose slots have sequences of ones, that long."""
    cache.grow([Segment(slot, 0, length, 1) for slot, length in lengths.items()])
    for tensor in layer:
        for slot, length in lengths.items():
            tensor[slot, :, :length] = 1


def ones(layer):
    return [[int(tensor[slot].sum().item() / tensor[slot][:, 0].numel()) for slot in range(4)] for tensor in layer]


def test_a_released_slot_reads_as_zeros_and_keeps_its_memory():
    cache = KVCache(slots=4, capacity=4096, device="cpu", tokens=4 * 4096)
    layer = cache.layer(0, 4, 128, torch.float32)  # 8 MiB of keys and as much of values for each slot
    written(cache, layer, dict.fromkeys(range(4), 4096))
    before = resident_bytes()
    cache.release(1)
    cache.release(2)
    written(cache, layer, {2: 100})
    assert before - resident_bytes() < 1e6
    assert ones(layer) == [[4096, 0, 100, 4096]] * 2


def test_free_slots_give_memory_back_for_what_others_need():
    """`tokens` at most have memory. Pages are given back whole: their neighbours are spared."""
    cache = KVCache(slots=4, capacity=4095, device="cpu", tokens=10_000)
    layer = cache.layer(0, 3, 133, torch.float32)  # slots do not begin on pages
    written(cache, layer, {0: 3000, 1: 4000, 2: 3000})
    cache.release(1)
    before = resident_bytes()
    written(cache, layer, {0: 3001})
    assert before - resident_bytes() > 0.9 * 2 * 4000 * 3 * 133 * 4
    assert ones(layer) == [[3001, 0, 3000, 0]] * 2
    cache.release(2)
    written(cache, layer, {1: 3999, 2: 1000})  # the memory of 3,000 tokens is kept
    assert ones(layer) == [[3001, 3999, 1000, 0]] * 2


@pytest.mark.parametrize("most", [1, 3, 10])
def test_steps_beyond_the_memory_are_computed_in_halves(tiny_llama, most, monkeypatch):
    """By sequences, then by tokens of one: the same tokens come out."""
    directory, model = tiny_llama
    forward, sizes = DecoderPart.forward, []

    def limited(part, x, positions, step):
        if len(x) > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        sizes.append(len(x))
        return forward(part, x, positions, step)

    monkeypatch.setattr(DecoderPart, "forward", limited)
    found = decode(directory, (0, 3, 6), groups=2, micro_batch=4, step_tokens=64)
    assert found == {index: reference(model, prompt) for index, prompt in enumerate(prompts())}
    assert max(sizes) == most


def test_what_cannot_be_halved_says_so(tiny_llama, monkeypatch):
    directory, _ = tiny_llama
    part = load(directory, (0, 6), 0)

    def none_left(*_):
        raise MemoryError

    monkeypatch.setattr(DecoderPart, "forward", none_left)
    message = encode_step(Step((Segment(0, 0, 2, 1),), (5, 6)))
    for halving, said in [
        (Halving(), "for one token"),
        (Halving("it is fixed"), "cannot be halved, since it is fixed"),
    ]:
        with pytest.raises(OutOfMemoryError, match=said):
            DecodeStage(part, KVCache(2, 64, "cpu"), NoReadout(part), halving).forward(message)


def test_a_stage_releases_the_slots_that_a_step_names(tiny_llama):
    directory, _ = tiny_llama
    part = load(directory, (0, 6), 0)
    cache = KVCache(2, 64, "cpu")  # a page for the keys of a slot, and one for its values
    stage = DecodeStage(part, cache, NoReadout(part), Halving())
    stage.forward(encode_step(Step((Segment(0, 0, 2, 1), Segment(1, 0, 2, 1)), (5, 6, 7, 8))))
    stage.forward(encode_step(Step((Segment(1, 2, 1, 1),), (9,), released=(0,))))
    for index in range(4):
        for tensor in cache.layer(index, 2, 8, torch.float32):
            assert tensor.shape == (2, 2, 64, 8)
            assert [bool(tensor[slot].any()) for slot in range(2)] == [False, True]
