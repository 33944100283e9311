"""What timing.json says of weights, seconds and cores."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import Mpi, Tiny, read_timing

RunLayout = Callable[..., Path]
PHASES = ("compute", "send_wait", "receive_wait", "idle", "overhead")


@pytest.mark.parametrize(("replicas", "stages"), [(1, 1), (1, 2), (2, 2), (1, 3), (1, 4)], ids=str)
def test_every_weight_is_read_once_a_replica(
    one_mpi: Mpi, replicas: int, stages: int, tiny: Tiny, run_layout: RunLayout, sample: Callable[[bool], None]
) -> None:
    """Once, but for the tied embedding: the first and the last stage each read it. A rank that is both may hold it
    twice all the same, as rows for the embedding and in the layout that multiplies fastest for the head."""
    sample(stages < 3)
    ranks = read_timing(run_layout(one_mpi, replicas, stages))["ranks"]
    sizes = tensor_bytes(tiny.model)
    once, embedding = sum(sizes.values()), sizes["model.embed_tokens.weight"]
    for replica in range(replicas):
        members = [rank for rank in ranks if rank["coordinates"]["replica"] == replica]
        assert [rank["coordinates"]["stage"] for rank in members] == list(range(stages))
        read, held = (sum(rank[key] for rank in members) for key in ("read_bytes", "weight_bytes"))
        assert read == once + (stages > 1) * embedding
        assert held in ({once, once + embedding} if stages == 1 else {once + embedding})


def test_no_rank_reads_the_whole_model(one_mpi: Mpi, tiny: Tiny, run_layout: RunLayout) -> None:
    whole = sum(tensor_bytes(tiny.model).values())
    for rank in read_timing(run_layout(one_mpi, 1, 2))["ranks"]:
        assert 0 < rank["read_bytes"] < whole
        assert 0 < rank["weight_bytes"] < whole


@pytest.mark.parametrize(("replicas", "stages"), [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_every_second_belongs_to_one_phase(mpi: Mpi, replicas: int, stages: int, run_layout: RunLayout) -> None:
    timing = read_timing(run_layout(mpi, replicas, stages))
    assert len(timing["ranks"]) == replicas * stages
    for rank in timing["ranks"]:
        seconds = [rank[f"{phase}_s"] for phase in PHASES]
        assert min(seconds) >= 0
        assert rank["compute_s"] > 0
        assert sum(seconds) == pytest.approx(timing["wall_s"], rel=0.02, abs=0.05)


@pytest.mark.parametrize(("replicas", "stages"), [(1, 2), (2, 2)], ids=str)
def test_totals_agree_with_the_results(
    one_mpi: Mpi, replicas: int, stages: int, tiny: Tiny, run_layout: RunLayout
) -> None:
    timing = read_timing(run_layout(one_mpi, replicas, stages))
    assert timing["records"] == len(tiny.prompts)
    assert timing["prompt_tokens"] == sum(map(len, tiny.prompts))
    assert timing["new_tokens"] == sum(len(reference.tokens) for reference in tiny.references)
    assert timing["tokens_per_s"] == pytest.approx(timing["new_tokens"] / timing["wall_s"])
    sent, received = (sum(rank[key] for rank in timing["ranks"]) for key in ("bytes_sent", "bytes_received"))
    # What is sent is received, but for the last messages: a rank closes its account before it sends it.
    assert sent == pytest.approx(received, abs=2048 * len(timing["ranks"]))


def test_ranks_of_a_node_share_its_cores(mpi: Mpi, run_layout: RunLayout) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs 2 cores")
    first, second = read_timing(run_layout(mpi, 1, 2))["ranks"]
    assert not set(first["cores"]) & set(second["cores"])
    for rank in (first, second):
        assert set(rank["cores"]) <= allowed
        assert len(rank["cores"]) >= len(allowed) // 2
        assert 1 <= rank["threads"] <= len(rank["cores"])  # fewer under a CPU quota


def tensor_bytes(model: Path) -> dict[str, int]:
    """What the safetensors files of a model hold, by name."""
    from safetensors import safe_open

    def size(tensor: Any) -> int:
        return tensor.numel() * tensor.element_size()

    files: Sequence[Path] = sorted(model.glob("*.safetensors"))
    assert len(files) > 1, "a model in one file shows less"
    sizes = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            sizes |= {name: size(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    return sizes
