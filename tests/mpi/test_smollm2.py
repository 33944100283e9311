"""A real model and its tokenizer: the text and the tokens are transformers'."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import (
    LAYOUTS,
    REPO,
    Mpi,
    Reference,
    assert_token_rule,
    complete_run,
    generate_reference,
    read_jsonl,
    write_jsonl,
)
from stories import DECODER_JOBS

from mpinfer.spec import load_spec

MODEL_VARIABLE, REFERENCE_VARIABLE = "MPINFER_SMOLLM2", "MPINFER_REFERENCE"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The model directory."""
    if named := os.environ.get(MODEL_VARIABLE):
        assert Path(named, "config.json").is_file(), f"{MODEL_VARIABLE}={named}: no model there"
        return Path(named).resolve()
    usual = REPO / "models" / "smollm2-135m"
    if not usual.is_dir():
        pytest.skip(f"no SmolLM2: neither {MODEL_VARIABLE} nor models/smollm2-135m")
    return usual


@pytest.fixture(scope="session")
def refer(smollm2: Path) -> Callable[..., tuple[Path, list[Reference], list[str]]]:
    """A job on the first records of a file, and what transformers makes of it: tokens and text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2).float().eval()

    def ids(record: dict[str, Any]) -> list[int]:
        if "messages" in record:
            return tokenizer.apply_chat_template(record["messages"], add_generation_prompt=True, return_dict=False)
        return tokenizer(record["prompt"]).input_ids

    def refer(
        source: Path, count: int | None, new_tokens: int, directory: Path
    ) -> tuple[Path, list[Reference], list[str]]:
        records = read_jsonl(source)[:count]
        write_jsonl(directory / "records.jsonl", records)
        job = directory / "job.yaml"
        job.write_text(
            yaml.safe_dump(
                {
                    "model": {"path": str(smollm2)},
                    "input": {"path": str(directory / "records.jsonl")},
                    "generate": {"max_new_tokens": new_tokens},
                }
            )
        )
        references = generate_reference(model, [ids(record) for record in records], new_tokens)
        return job, references, [tokenizer.decode(made.tokens, skip_special_tokens=True) for made in references]

    return refer


def assert_equal(output: Path, references: list[Reference], texts: list[str]) -> None:
    results = read_jsonl(output / "results.jsonl")
    assert_token_rule(results, references)
    for result, reference, text in zip(results, references, texts, strict=True):
        if result["output"]["token_ids"] == reference.tokens:
            assert result["output"]["text"] == text


@pytest.mark.parametrize("name", DECODER_JOBS)
def test_the_jobs_of_the_repository(
    one_mpi: Mpi, smollm2: Path, refer: Callable[..., Any], name: str, tmp_path: Path
) -> None:
    """With fewer tokens."""
    job = load_spec(REPO / "jobs" / f"{name}.yaml")
    _, references, texts = refer(REPO / job.input.path, None, 8, tmp_path)
    overrides = (f"model.path={smollm2}", "generate.max_new_tokens=8")
    ranks = job.parallel.replicas * job.parallel.stages
    output = complete_run(one_mpi, ranks, REPO / "jobs" / f"{name}.yaml", tmp_path / "out", *overrides, cwd=REPO)
    assert_equal(output, references, texts)


@pytest.fixture(scope="session")
def long_reference(refer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    named = os.environ.get(REFERENCE_VARIABLE)
    if not named:
        pytest.skip(f"{REFERENCE_VARIABLE} names no file of prompts")
    return refer(Path(named), 32, 32, tmp_path_factory.mktemp("smollm2"))


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "stages"), LAYOUTS, ids=str)
def test_every_layout(mpi: Mpi, replicas: int, stages: int, long_reference: Any, tmp_path: Path) -> None:
    job, references, texts = long_reference
    layout = (f"parallel.replicas={replicas}", f"parallel.stages={stages}")
    assert_equal(complete_run(mpi, replicas * stages, job, tmp_path / "out", *layout), references, texts)
