"""`mpinfer run-batch`: an OpenAI Batch file in, its responses out, with errors by line."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Mpi, mpirun, read_jsonl, write_jsonl


def chat(name: str, **body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, **body}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def embedding(name: str, given: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": given}}


def completion(name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": "hello", **body}}


GOOD = [
    chat("greedy", temperature=0),
    chat("sampled", n=2, model="a name"),
    chat("logprobs", temperature=0, logprobs=True, top_logprobs=2),
    completion("default length"),
    completion("completion logprobs", logprobs=1, max_tokens=3, temperature=0),
]
BAD = [chat("tools", tools=[{"type": "function"}]), chat("greedy"), chat("no messages", messages=[])]


def run_batch(mpi: Mpi, ranks: int | None, model: Path, root: Path, *options: Any) -> subprocess.CompletedProcess[str]:
    files = ["-i", root / "in.jsonl", "-o", root / "out.jsonl", "--model", model]
    return mpirun(mpi, ranks, ["mpinfer", "run-batch", *files, *options])


def without(value: Any, *keys: str) -> Any:
    """The same, but these keys left out at every depth."""
    if isinstance(value, list):
        return [without(each, *keys) for each in value]
    if isinstance(value, dict):
        return {key: without(each, *keys) for key, each in value.items() if key not in keys}
    return value


def test_good_and_bad_lines(mpi: Mpi, chatty: Path, tmp_path: Path, sample: Callable[[bool], None]) -> None:
    sample(mpi.name == "mpich")
    write_jsonl(tmp_path / "in.jsonl", [*GOOD, *BAD])
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write("\n{not JSON\n")
    outputs = []
    for ranks, options in ((None, []), (2, ["--set", "parallel.stages=2"])):
        root = tmp_path / f"{ranks} ranks"
        root.mkdir()
        shutil.copy(tmp_path / "in.jsonl", root)
        run = run_batch(mpi, ranks, chatty, root, *options)
        assert run.returncode == 1, run.stderr
        outputs.append(read_jsonl(root / "out.jsonl"))
    one, two = (without(output, "created", "logprobs") for output in outputs)  # the last digits are the layout's
    assert one == two
    good, bad = outputs[0][: len(GOOD)], outputs[0][len(GOOD) :]
    assert [line["custom_id"] for line in good] == [line["custom_id"] for line in GOOD]
    assert [line["response"]["status_code"] for line in good] == [200] * len(GOOD)
    assert len({line["id"] for line in outputs[0]}) == len(outputs[0])
    greedy, sampled, logprobs, plain, completed = (line["response"]["body"] for line in good)

    assert (greedy["object"], greedy["model"]) == ("chat.completion", "chatty")
    assert greedy["usage"]["prompt_tokens"] == len("user: hello\nassistant:")
    assert greedy["choices"][0]["message"]["role"] == "assistant"
    assert (sampled["model"], [choice["index"] for choice in sampled["choices"]]) == ("a name", [0, 1])
    entries = logprobs["choices"][0]["logprobs"]["content"]
    assert len(entries) == logprobs["usage"]["completion_tokens"]
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in entries), "greedy"
    assert logprobs["choices"][0]["message"] == greedy["choices"][0]["message"]
    assert (plain["object"], plain["usage"]["prompt_tokens"]) == ("text_completion", len("hello"))
    assert plain["usage"]["completion_tokens"] <= 16
    assert len(completed["choices"][0]["logprobs"]["tokens"]) == completed["usage"]["completion_tokens"]

    assert [(line["custom_id"], line["response"]["status_code"], line["error"]) for line in bad] == [
        ("tools", 400, None),
        ("greedy", 400, None),
        ("no messages", 400, None),
        (None, 400, None),
    ]
    messages = [line["response"]["body"]["error"]["message"] for line in bad]
    for message, words in zip(
        messages, ["tools=", "'greedy' is on lines 1 and 7", "messages must", "JSON"], strict=True
    ):
        assert words in message
    assert messages[3].startswith("line 10: ")


def test_resume_leaves_the_same_output(one_mpi: Mpi, chatty: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", GOOD)
    run = run_batch(one_mpi, None, chatty, tmp_path)
    assert run.returncode == 0, run.stderr
    first = (tmp_path / "out.jsonl").read_bytes()
    again = run_batch(one_mpi, None, chatty, tmp_path)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    for spoil in (lambda: None, (tmp_path / "out.jsonl").unlink):
        spoil()
        resumed = run_batch(one_mpi, None, chatty, tmp_path, "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert "already complete" in resumed.stderr
        assert (tmp_path / "out.jsonl").read_bytes() == first
    verdict = mpirun(one_mpi, None, ["mpinfer", "verify", tmp_path / "out.jsonl.mpinfer"])
    assert json.loads(verdict.stdout) == {"complete": True, "records": len(GOOD), "failed": 0}


def test_embeddings(one_mpi: Mpi, chatty: Path, tmp_path: Path) -> None:
    given = ["hello", [3, 4, 5], ["hello", "you"], [[3, 4, 5]], {"text": "hello"}, [300]]
    write_jsonl(tmp_path / "in.jsonl", [embedding(f"line {n}", each) for n, each in enumerate(given)])
    run = run_batch(one_mpi, 2, chatty, tmp_path, "--set", "parallel.stages=2")
    assert run.returncode == 1, run.stderr
    lines = read_jsonl(tmp_path / "out.jsonl")
    assert [line["response"]["status_code"] for line in lines] == [200, 200, 200, 200, 400, 400]
    text, tokens, both, nested = (line["response"]["body"] for line in lines[:4])
    assert text["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert both["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    assert [each["index"] for each in both["data"]] == [0, 1]
    assert both["data"][0]["embedding"] == pytest.approx(text["data"][0]["embedding"], abs=1e-5)
    assert nested["data"][0]["embedding"] == pytest.approx(tokens["data"][0]["embedding"], abs=1e-5)


def test_only_bad_lines(one_mpi: Mpi, chatty: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", BAD[:1])
    run = run_batch(one_mpi, None, chatty, tmp_path)
    assert run.returncode == 1, run.stderr
    assert [line["response"]["status_code"] for line in read_jsonl(tmp_path / "out.jsonl")] == [400]


def test_a_mixed_file_is_refused(one_mpi: Mpi, chatty: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [chat("a"), embedding("b", "hello")])
    run = run_batch(one_mpi, None, chatty, tmp_path)
    assert run.returncode == 2
    assert f"{tmp_path / 'in.jsonl'}: line 2: /v1/embeddings is of the task embed" in run.stderr
    assert not (tmp_path / "out.jsonl").exists()
