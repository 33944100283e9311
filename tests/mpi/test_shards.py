"""Tensor parallel worlds: 9 heads with 3 keys and values over 2 and 3 shards, alone, in stages and in replicas.

The layout with most in it runs by default, all of them with --run-slow.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import yaml
from families import save_random
from harness import (
    Mpi,
    Reference,
    assert_token_rule,
    complete_run,
    generate_reference,
    mpirun,
    one_thread,
    read_jsonl,
    read_timing,
    write_jsonl,
)

LAYOUTS = [  # replicas x stages x shards
    (1, 2, 2),
    *(pytest.param(layout, marks=pytest.mark.slow) for layout in [(1, 1, 2), (1, 1, 3), (2, 1, 2)]),
]
LENGTHS = [1, 2, 30, 7, 17, 5, 40, 3]
MAX_NEW = 8
VOCABULARY = 131  # shards of unequal size, whatever their number


@pytest.fixture(scope="module")
def nine_heads(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Reference]]:
    """A job for a small random Llama, and what transformers makes of it."""
    from transformers import LlamaConfig

    directory, random = tmp_path_factory.mktemp("nine-heads"), Random(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=72,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = save_random(directory / "model", config)
    prompts = [[random.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS]
    records = write_jsonl(directory / "records.jsonl", [{"token_ids": prompt} for prompt in prompts])
    tree = {
        "model": {"path": str(directory / "model")},
        "input": {"path": str(records)},
        "parallel": {"micro_batch": 2},
        "generate": {"max_new_tokens": MAX_NEW, "step_tokens": 16},
    }
    (directory / "job.yaml").write_text(yaml.safe_dump(tree))
    with one_thread():
        return directory / "job.yaml", generate_reference(model, prompts, MAX_NEW)


@pytest.fixture
def run(nine_heads: tuple[Path, list[Reference]], tmp_path: Path) -> Callable[..., Path]:
    def run(mpi: Mpi, layout: tuple[int, int, int], *options: str) -> Path:
        replicas, stages, shards = layout
        asked = (f"parallel.replicas={replicas}", f"parallel.stages={stages}", f"parallel.shards={shards}")
        return complete_run(mpi, replicas * stages * shards, nine_heads[0], tmp_path / "out", *asked, *options)

    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_the_same_tokens(
    mpi: Mpi, run: Callable[..., Path], nine_heads: tuple[Path, list[Reference]], layout: tuple[int, int, int]
) -> None:
    output = run(mpi, layout)
    assert_token_rule(read_jsonl(output / "results.jsonl"), nine_heads[1])
    ranks = read_timing(output)["ranks"]
    places = [rank["coordinates"] for rank in ranks]
    shards = sorted(place["shard"] for place in places if place["stage"] == 0)
    assert shards == sorted([*range(layout[2])] * layout[0])


def test_all_logits_come_together_from_the_shards(
    one_mpi: Mpi, run: Callable[..., Path], nine_heads: tuple[Path, list[Reference]]
) -> None:
    """Beside the tokens, the best of all tokens are asked for."""
    results = read_jsonl(run(one_mpi, (1, 1, 3), "generate.logprobs=2") / "results.jsonl")
    assert_token_rule(results, nine_heads[1])


def test_shards_that_find_other_products_faster_compute_alike(
    mpi: Mpi, nine_heads: tuple[Path, list[Reference]], tmp_path: Path
) -> None:
    """Timings decide whether layers are computed whole, and the last one then sums fewer rows than its modules do."""
    output, script = tmp_path / "out", Path(__file__).with_name("odd_shard.py")
    options = ["--output", output, "--set", "parallel.replicas=1", "--set", "parallel.shards=2"]
    done = mpirun(mpi, 2, ["python", script, "run", nine_heads[0], *options], timeout_s=60)
    assert done.returncode == 0, done.stderr
    first, second = (place["kernels"] for place in read_timing(output)["ranks"])
    assert first["mpinfer"]
    assert "mpinfer" not in second
    assert "layer" not in {**first, **second}
    assert_token_rule(read_jsonl(output / "results.jsonl"), nine_heads[1])
