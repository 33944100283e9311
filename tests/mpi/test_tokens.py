"""Greedy tokens are transformers', whatever the layout, the MPI and the way of sending."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    LAYOUTS,
    MAX_NEW_TOKENS,
    Mpi,
    Tiny,
    assert_token_rule,
    complete_run,
    mpirun,
    read_jsonl,
    read_timing,
)

RunLayout = Callable[..., Path]


@pytest.mark.parametrize(("replicas", "stages"), LAYOUTS, ids=str)
def test_layout(
    mpi: Mpi, replicas: int, stages: int, tiny: Tiny, run_layout: RunLayout, sample: Callable[[bool], None]
) -> None:
    sample(stages < 3 or (mpi.name, stages) in [("openmpi", 3), ("mpich", 4)])
    output = run_layout(mpi, replicas, stages)
    results = read_jsonl(output / "results.jsonl")
    assert_token_rule(results, tiny.references)
    assert [result["id"] for result in results] == [record["id"] for record in read_jsonl(tiny.records)]
    for result, prompt in zip(results, tiny.prompts, strict=True):
        assert result["output"]["prompt_tokens"] == len(prompt)
    verified = mpirun(mpi, None, ["mpinfer", "verify", output])
    assert verified.returncode == 0, verified.stdout


def test_finish_reasons(one_mpi: Mpi, tiny: Tiny, run_layout: RunLayout) -> None:
    """Some sequences stop, the others reach the limit, and each says which."""
    outputs = [result["output"] for result in read_jsonl(run_layout(one_mpi, 1, 2) / "results.jsonl")]
    assert {output["finish_reason"] for output in outputs} == {"stop", "length"}
    stops = {output["token_ids"][-1] for output in outputs if output["finish_reason"] == "stop"}
    assert len(stops) == 1
    for output in outputs:
        if output["finish_reason"] == "length":
            assert len(output["token_ids"]) == MAX_NEW_TOKENS
            assert not stops & set(output["token_ids"])


def test_untied_embeddings(one_mpi: Mpi, tiny_untied: Tiny, tmp_path: Path) -> None:
    output = complete_run(one_mpi, 2, tiny_untied.job, tmp_path / "out", "parallel.stages=2")
    assert_token_rule(read_jsonl(output / "results.jsonl"), tiny_untied.references)


def test_blocking_transport(mpi: Mpi, tiny: Tiny, run_layout: RunLayout) -> None:
    output = run_layout(mpi, 1, 2, "transport.blocking=true")
    assert_token_rule(read_jsonl(output / "results.jsonl"), tiny.references)


@pytest.mark.parametrize(
    ("wire", "most_bytes", "least_equal", "progress"), [("bf16", 0.55, 0.99, "thread"), ("int8", 0.35, 0.7, "points")]
)
def test_wire(
    one_mpi: Mpi, tiny: Tiny, run_layout: RunLayout, wire: str, most_bytes: float, least_equal: float, progress: str
) -> None:
    """Fewer bytes from stage to stage, and mostly the same tokens. What the second stage receives is activations; the
    samples that it sends are as they are."""
    exact = run_layout(one_mpi, 1, 2)
    output = run_layout(one_mpi, 1, 2, f"transport.wire={wire}", f"transport.progress={progress}")
    before, now = (read_timing(path)["ranks"][1] for path in (exact, output))
    assert now["bytes_received"] < most_bytes * before["bytes_received"]
    assert now["bytes_sent"] > 0.9 * before["bytes_sent"]
    tokens = [result["output"]["token_ids"] for result in read_jsonl(output / "results.jsonl")]
    expected = [reference.tokens for reference in tiny.references]
    equal = sum(
        a == b for ours, theirs in zip(tokens, expected, strict=True) for a, b in zip(ours, theirs, strict=False)
    )
    assert equal > least_equal * sum(map(len, expected))


def test_bfloat16_completes(one_mpi: Mpi, tiny: Tiny, run_layout: RunLayout) -> None:
    """In 8 bits of mantissa ties are common, so the tokens may be others; each record still gets some."""
    results = read_jsonl(run_layout(one_mpi, 1, 2, "model.dtype=bfloat16") / "results.jsonl")
    assert len(results) == len(tiny.prompts)
    assert all(1 <= len(result["output"]["token_ids"]) <= MAX_NEW_TOKENS for result in results)


def test_relative_paths(one_mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    """Paths in the job and on the command line are taken from the working directory."""
    os.symlink(tiny.directory, tmp_path / "here")
    options = ["--set", "model.path=here/model", "--set", "input.path=here/records.jsonl", "--output", "out"]
    run = mpirun(one_mpi, None, ["mpinfer", "run", "here/job.yaml", *options], cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert_token_rule(read_jsonl(tmp_path / "out" / "results.jsonl"), tiny.references)
