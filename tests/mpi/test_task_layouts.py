"""Sampling, scoring and embedding give the same in every layout."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Mpi, Tiny, complete_run, mpirun, read_jsonl, write_jsonl

from mpinfer.records.journal import Journal
from mpinfer.records.reader import JsonlInput
from mpinfer.records.rules import RecordRules
from mpinfer.spec import load_spec

ALONE = (1, 1)
LAYOUTS = [pytest.param((2, 1), marks=pytest.mark.slow), (1, 2)]  # replicas x stages
OPTIONS = {
    "generate": ("generate.temperature=2", "generate.top_p=0.95", "generate.n=2"),
    "score": ("model.task=score",),
    "embed": ("model.task=embed",),
}
NEAR = {"rel": 1e-5, "abs": 1e-4}  # differences of logits, which are some tens: their rounding stays
OWN_SAMPLING = [{}, {"n": 3}, {"seed": 5}, {"temperature": 0, "n": 1}, {"min_new_tokens": 6, "top_k": 9}]
RunTask = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def job_of(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A job file for a task, with records of its own."""

    @functools.cache
    def make(task: str) -> Path:
        directory = tmp_path_factory.mktemp(task)
        records: list[dict[str, Any]] = [{"id": f"r{n}", "token_ids": ids} for n, ids in enumerate(tiny.prompts)]
        for n, record in enumerate(records):
            if task == "generate":
                record["generate"] = OWN_SAMPLING[n % len(OWN_SAMPLING)]
            if task == "score":
                record["continuations"] = [tiny.references[n].tokens, [n], tiny.prompts[n - 1][:40]]
        tree = yaml.safe_load(tiny.job.read_text())
        tree["input"] = {"path": str(write_jsonl(directory / "records.jsonl", records))}
        job = directory / "job.yaml"
        job.write_text(yaml.safe_dump(tree))
        return job

    return make


@pytest.fixture(scope="module")
def outputs_of(
    one_mpi: Mpi, job_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, tuple[int, int]], list[dict[str, Any]]]:
    """What a task computes under a layout; run once."""

    @functools.cache
    def run(task: str, layout: tuple[int, int]) -> list[dict[str, Any]]:
        replicas, stages = layout
        options = (f"parallel.replicas={replicas}", f"parallel.stages={stages}", *OPTIONS[task])
        output = complete_run(one_mpi, replicas * stages, job_of(task), tmp_path_factory.mktemp(task) / "out", *options)
        results = read_jsonl(output / "results.jsonl")
        assert [result["id"] for result in results] == [f"r{n}" for n in range(len(results))]
        return [result["output"] for result in results]

    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sampled_tokens(layout: tuple[int, int], outputs_of: RunTask, tiny: Tiny) -> None:
    alone, outputs = outputs_of("generate", ALONE), outputs_of("generate", layout)
    assert outputs == alone
    for n, output in enumerate(outputs):
        own = OWN_SAMPLING[n % len(OWN_SAMPLING)]
        samples = output.get("samples", [output])
        assert len(samples) == own.get("n", 2)
        assert len({tuple(sample["token_ids"]) for sample in samples}) == len(samples)
        if own.get("temperature") == 0:
            assert output["token_ids"] == tiny.references[n].tokens


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores(layout: tuple[int, int], outputs_of: RunTask) -> None:
    alone, outputs = outputs_of("score", ALONE), outputs_of("score", layout)
    for one, other in zip(alone, outputs, strict=True):
        assert one["prompt_tokens"] == other["prompt_tokens"]
        for score, expected in zip(other["scores"], one["scores"], strict=True):
            near = {key: pytest.approx(expected[key], **NEAR) for key in ("logprob", "token_logprobs")}
            assert score == {**expected, **near}
        assert other["scores"][0]["is_greedy"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_embeddings(layout: tuple[int, int], outputs_of: RunTask) -> None:
    alone, outputs = outputs_of("embed", ALONE), outputs_of("embed", layout)
    for one, other in zip(alone, outputs, strict=True):
        assert other == {**one, "embedding": pytest.approx(one["embedding"], rel=1e-5, abs=1e-6)}


def test_a_sampled_run_that_goes_on_gives_the_same_tokens(
    one_mpi: Mpi, job_of: Callable[[str], Path], outputs_of: RunTask, tmp_path: Path
) -> None:
    """Half of the results are there from one layout, the others come from another."""
    job, output = job_of("generate"), tmp_path / "out"
    spec = load_spec(job, OPTIONS["generate"])
    records = JsonlInput(spec.input.path, RecordRules(spec).problem)
    expected = outputs_of("generate", ALONE)
    journal = Journal.open(output, spec.identity(), records.sha256, records.ids, resume=False)
    for index in range(0, len(records), 2):
        journal.append({"index": index, "id": records.ids[index], "output": expected[index]})
    journal.close()
    records.close()
    complete_run(one_mpi, 2, job, output, *OPTIONS["generate"], "parallel.stages=2", resume=True)
    assert [result["output"] for result in read_jsonl(output / "results.jsonl")] == expected


def test_a_record_that_cannot_be_scored_fails_alone(one_mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    good = {"token_ids": [1, 2], "continuations": [[3]]}
    path = write_jsonl(tmp_path / "records.jsonl", [good, {**good, "continuations": [[3], []]}, good])
    options = ["--set", "model.task=score", "--set", f"input.path={path}", "--output", tmp_path / "out"]
    run = mpirun(one_mpi, None, ["mpinfer", "run", tiny.job, *options])
    assert run.returncode == 1, run.stderr
    first, second, third = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert first["output"] == third["output"]
    assert "number 1 is empty" in second["error"]["message"]


def test_a_bad_override_is_refused_at_the_start(one_mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    records = [{"token_ids": [1]}, {"token_ids": [1], "generate": {"top_p": 2}}]
    path = write_jsonl(tmp_path / "records.jsonl", records)
    options = ["--set", f"input.path={path}", "--output", tmp_path / "out"]
    run = mpirun(one_mpi, 2, ["mpinfer", "run", tiny.job, *options])
    assert run.returncode == 2
    assert f"mpinfer: error: {path}: line 2: generate.top_p=2.0: must be at most 1; lower it" in run.stderr
    assert run.stderr.count("generate.top_p") == 1
    assert not (tmp_path / "out" / "results.jsonl").exists()
