"""Decoder families in worlds of ranks: greedy tokens are transformers', whatever the layout.

A few families stand for all by default: a tied head and two kinds of layers, learned positions, experts. With
--run-slow, all of them in all layouts.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import yaml
from families import FAMILIES, SIZES, make_config, save_random
from harness import (
    Mpi,
    Reference,
    assert_token_rule,
    complete_run,
    generate_reference,
    one_thread,
    read_jsonl,
    write_jsonl,
)

LAYOUTS = [(1, 1), (2, 1), (1, 2), (1, 3)]  # replicas x stages
BY_DEFAULT = {(family, layout) for family in ("Gemma3Text", "GPT2", "Mixtral") for layout in ((1, 2), (1, 3))}
LENGTHS = [1, 2, 30, 7, 17, 5, 40, 3]
MAX_NEW = 8
CASES = [
    pytest.param(family, layout, marks=[] if (family, layout) in BY_DEFAULT else [pytest.mark.slow])
    for family in FAMILIES
    for layout in LAYOUTS
]


@dataclass(frozen=True)
class Family:
    """A job for a small random model, and what transformers makes of it."""

    job: Path
    references: list[Reference]


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    random = Random(0)
    prompts = [[random.randrange(3, SIZES["vocab_size"]) for _ in range(length)] for length in LENGTHS]

    @functools.cache
    def build(name: str) -> Family:
        directory = tmp_path_factory.mktemp(name)
        model = save_random(directory / "model", make_config(name))
        records = write_jsonl(directory / "records.jsonl", [{"token_ids": prompt} for prompt in prompts])
        job = directory / "job.yaml"
        tree = {
            "model": {"path": str(directory / "model")},
            "input": {"path": str(records)},
            "parallel": {"micro_batch": 2},
            "generate": {"max_new_tokens": MAX_NEW, "step_tokens": 16},
        }
        job.write_text(yaml.safe_dump(tree))
        with one_thread():
            return Family(job, generate_reference(model, prompts, MAX_NEW))

    return build


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_family(
    one_mpi: Mpi, family_of: Callable[[str], Family], name: str, layout: tuple[int, int], tmp_path: Path
) -> None:
    family, (replicas, stages) = family_of(name), layout
    options = (f"parallel.replicas={replicas}", f"parallel.stages={stages}")
    output = complete_run(one_mpi, replicas * stages, family.job, tmp_path / "out", *options)
    assert_token_rule(read_jsonl(output / "results.jsonl"), family.references)
