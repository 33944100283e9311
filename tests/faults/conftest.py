"""What the tests of broken worlds share: a job that lasts, and its results when nothing happens to it."""

from pathlib import Path
from random import Random

import pytest
import yaml
from harness import NEAR_TIE, Mpi, Tiny, complete_run, generate_reference, one_thread, write_jsonl


@pytest.fixture(scope="session")
def long_job(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that runs for many seconds when told to go SLOWLY. None of its records comes near a tie, so that every
    layout must give the same bytes."""
    from transformers import AutoModelForCausalLM

    random, new_tokens = Random(1), 48
    prompts = [[random.randrange(256) for _ in range(16)] for _ in range(160)]
    model = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    with one_thread():
        references = generate_reference(model, prompts, new_tokens)
    sure = [prompt for prompt, made in zip(prompts, references, strict=True) if min(made.margins) > NEAR_TIE]
    assert len(sure) > 100
    directory = tmp_path_factory.mktemp("long")
    records = write_jsonl(directory / "records.jsonl", [{"token_ids": prompt} for prompt in sure])
    job = directory / "job.yaml"
    job.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(tiny.model)},
                "input": {"path": str(records)},
                "generate": {"max_new_tokens": new_tokens},
            }
        )
    )
    return job


@pytest.fixture(scope="session")
def unbroken(one_mpi: Mpi, long_job: Path) -> bytes:
    """The results of the long job when nothing happens to it."""
    return (complete_run(one_mpi, 2, long_job, long_job.parent / "out") / "results.jsonl").read_bytes()
