"""A rank that dies or raises takes the world with it, at once; the run goes on where it was."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from random import Random

import pytest
import yaml
from harness import (
    FAULTY_RANK,
    NEAR_TIE,
    Mpi,
    Tiny,
    World,
    complete_run,
    generate_reference,
    mpirun,
    one_thread,
    read_jsonl,
    read_timing,
    write_jsonl,
)

END_S = 5  # a broken world has to be gone after this
START_S = 120  # until the first results: imports, mostly
SLOWLY = ("--set", "parallel.micro_batch=1", "--set", "parallel.in_flight=2", "--set", "generate.step_tokens=1")


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


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_killed_rank(mpi: Mpi, victim: int, long_job: Path, unbroken: bytes, tmp_path: Path) -> None:
    output, total = tmp_path / "out", len(unbroken.splitlines())
    with World(
        mpi, 4, ["mpinfer", "run", long_job, "--output", output, "--set", "parallel.stages=2", *SLOWLY]
    ) as world:
        world.wait_until(lambda: journaled(output), START_S)
        os.kill(world.ranks()[victim], signal.SIGKILL)
        assert world.wait(END_S).returncode != 0
    kept = journaled(output)
    assert 0 < kept < total
    assert verify(mpi, output) == (False, kept)

    complete_run(mpi, 2, long_job, output, "parallel.stages=2", resume=True)
    assert read_timing(output)["records"] == total - kept, "what was done is not done again"
    assert (output / "results.jsonl").read_bytes() == unbroken
    assert [result["index"] for result in read_jsonl(output / "results.jsonl")] == list(range(total))
    assert journaled(output) == total, "each result is kept once"
    assert verify(mpi, output) == (True, total)

    begun = time.monotonic()
    again = mpirun(mpi, None, ["mpinfer", "run", long_job, "--output", output, "--resume"])
    assert again.returncode == 0, again.stderr
    assert "already complete" in again.stderr
    assert time.monotonic() - begun < 5
    assert (output / "results.jsonl").read_bytes() == unbroken


@pytest.mark.parametrize("culprit", [0, 1])
def test_raising_rank(mpi: Mpi, culprit: int, long_job: Path, tmp_path: Path) -> None:
    options = ["run", long_job, "--output", tmp_path / "out", "--set", "parallel.stages=2", *SLOWLY]
    run = mpirun(mpi, 2, ["python", FAULTY_RANK, culprit, 50, "raise", *options], timeout_s=START_S)
    ended = time.time()
    assert run.returncode != 0
    place = f"rank {culprit} node {socket.gethostname()} replica 0 stage {culprit}"
    assert len(re.findall(f"mpinfer: fatal on {place}", run.stderr)) == 1
    assert run.stderr.count("mpinfer: fatal") == 1
    assert "Traceback (most recent call last)" in run.stderr
    [raised] = re.findall(r"^RuntimeError: injected at ([0-9.]+)$", run.stderr, re.MULTILINE)
    assert ended - float(raised) < END_S
    assert verify(mpi, tmp_path / "out")[0] is False


def journaled(output: Path) -> int:
    """Results that the journal holds, in whole lines; the first line is its header."""
    journal = output / "journal.jsonl"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def verify(mpi: Mpi, output: Path) -> tuple[bool, int]:
    """What `mpinfer verify` says: whether the run is complete, and of how many records."""
    verified = mpirun(mpi, None, ["mpinfer", "verify", output])
    verdict = json.loads(verified.stdout.splitlines()[-1])
    assert (verified.returncode == 0) == verdict["complete"]
    return verdict["complete"], verdict["records"]
