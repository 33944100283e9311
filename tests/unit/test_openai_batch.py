import json
import re
from pathlib import Path
from typing import Any

import pytest

from mpinfer.errors import InputError, OutputError, SpecError
from mpinfer.records.openai_batch import batch_job, responses_file, to_record, to_response
from mpinfer.records.reader import JsonlInput
from mpinfer.records.rules import RecordRules
from mpinfer.spec import JobSpec, spec_from_dict

CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES = [{"role": "user", "content": "hello"}]


def request(url: str, **body: Any) -> dict[str, Any]:
    given: dict[str, Any] = {CHAT: {"messages": MESSAGES}, COMPLETION: {"prompt": "x"}, EMBEDDING: {"input": "x"}}[url]
    return {"custom_id": "a", "method": "POST", "url": url, "body": {**given, **body}}


def read(tmp_path: Path, *lines: Any, **generate: Any) -> tuple[JsonlInput, RecordRules]:
    path = tmp_path / "in.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    rules = RecordRules(job(path, generate=generate))
    return JsonlInput(path, rules.problem, rules.convert), rules


def job(path: Path, **sections: Any) -> JobSpec:
    task = sections.pop("task", "generate")
    given = {"model": {"path": "m", "task": task}, "input": {"path": str(path), "format": "openai-batch"}}
    return spec_from_dict({**given, **sections})


def refusal(tmp_path: Path, line: Any) -> str:
    """What is wrong with a line that stands behind a good one."""
    records, _ = read(tmp_path, {**request(CHAT), "custom_id": "good"}, line)
    assert list(records.ids) == ["good", 1]
    assert list(records.refused) == [1]
    message = records.refused[1]
    assert message.startswith("line 2: ")
    assert "\n" not in message
    assert len(message) < 300
    return message


def test_chat() -> None:
    assert to_record(request(CHAT), "generate") == {"id": "a", "messages": MESSAGES, "generate": {}}


def test_completion() -> None:
    assert to_record(request(COMPLETION), "generate") == {"id": "a", "prompt": "x", "generate": {"max_new_tokens": 16}}
    tokens = to_record(request(COMPLETION, prompt=[1, 2]), "generate")
    assert tokens["token_ids"] == [1, 2]
    assert "prompt" not in tokens


@pytest.mark.parametrize(
    ("given", "record"),
    [
        ("x", {"prompt": "x"}),
        ([1, 2], {"token_ids": [1, 2]}),
        (["x", "y"], {"inputs": [{"prompt": "x"}, {"prompt": "y"}]}),
        ([[1], [2, 3]], {"inputs": [{"token_ids": [1]}, {"token_ids": [2, 3]}]}),
    ],
)
def test_embedding(given: Any, record: dict[str, Any]) -> None:
    made = to_record(request(EMBEDDING, input=given, encoding_format="float"), "embed")
    assert made == {"id": "a", **record}
    assert RecordRules(job(Path("i"), task="embed")).problem(made) is None


@pytest.mark.parametrize("url", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    ("body", "generate"),
    [
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"temperature": 0.5, "top_p": 0.9, "n": 2, "seed": 7}, {"temperature": 0.5, "top_p": 0.9, "n": 2, "seed": 7}),
        ({"stop": "end"}, {"stop": "end"}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2}, {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2}),
        (
            {"top_k": -1, "min_tokens": 2, "stop_token_ids": [3]},
            {"top_k": 0, "min_new_tokens": 2, "stop_token_ids": [3]},
        ),
        ({"model": "gpt", "user": "u", "metadata": {"a": "b"}, "store": True, "stream": False}, {}),
        ({"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}}, {}),
        ({"stop": None, "seed": None, "tools": None, "stream": None, "temperature": None}, {}),
    ],
)
def test_sampling(url: str, body: dict[str, Any], generate: dict[str, Any]) -> None:
    record = to_record(request(url, **body), "generate")
    default = {"max_new_tokens": 16} if url == COMPLETION else {}
    assert record["generate"] == {**default, **generate}
    assert RecordRules(job(Path("i"), generate={"temperature": 1.0})).problem(record) is None


@pytest.mark.parametrize(
    ("url", "body", "logprobs"),
    [
        (CHAT, {"logprobs": True}, 0),
        (CHAT, {"logprobs": True, "top_logprobs": 3}, 3),
        (CHAT, {"logprobs": False}, None),
        (COMPLETION, {"logprobs": 0}, 0),
        (COMPLETION, {"logprobs": 5}, 5),
    ],
)
def test_logprobs(url: str, body: dict[str, Any], logprobs: int | None) -> None:
    assert to_record(request(url, **body), "generate")["generate"].get("logprobs") == logprobs


def test_the_newer_name_of_max_tokens_wins() -> None:
    record = to_record(request(CHAT, max_tokens=3, max_completion_tokens=4), "generate")
    assert record["generate"] == {"max_new_tokens": 4}


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    record = to_record(request(CHAT, messages=[{"role": "user", "content": parts, "name": "n"}]), "generate")
    assert record["messages"] == [{"role": "user", "content": "a\nb", "name": "n"}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"url": "/v1/responses"}, "url='/v1/responses': must be one of /v1/chat/completions, "),
        ({"url": ["x"]}, "url=['x']: must be one of"),
        ({"method": "GET"}, "method='GET': must be 'POST'"),
        ({"custom_id": None}, "custom_id=None: must be a string"),
        ({"custom_id": 5}, "custom_id=5: must be a string"),
        ({"custom_id": "good"}, "id 'good' is on lines 1 and 2"),
        ({"body": None}, "body=None: must be an object"),
        ({"body": {}}, "messages must be a non-empty list"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, {**request(CHAT), **change})


@pytest.mark.parametrize(
    ("url", "body", "words"),
    [
        (CHAT, {"tools": [{"type": "function"}]}, "tools=[{'type': 'function'}]: only [] is built; leave it out"),
        (CHAT, {"response_format": {"type": "json_schema"}}, 'only {"type": "text"} is built'),
        (CHAT, {"frequency_penalty": 0.5}, "frequency_penalty=0.5: only 0 is built"),
        (CHAT, {"stream": True}, "stream=True: only false is built"),
        (CHAT, {"logit_bias": {"5": 1}}, "logit_bias="),
        (CHAT, {"no_such_key": 1}, f"no_such_key: is not known to {CHAT}, or not built; leave it out"),
        (CHAT, {"prompt": "x"}, f"prompt: is not known to {CHAT}"),
        (CHAT, {"max_tokens": 0}, "max_tokens=0: must be an integer from 1 up"),
        (CHAT, {"max_tokens": "5"}, "max_tokens='5': must be an integer from 1 up"),
        (CHAT, {"min_tokens": -1}, "min_tokens=-1: must be an integer from 0 up"),
        (CHAT, {"logprobs": 1}, "logprobs=1: must be true or false"),
        (CHAT, {"top_logprobs": 1}, "top_logprobs=1: needs logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs=21: must be an integer from 0 to 20"),
        (CHAT, {"temperature": "hot"}, "generate.temperature='hot'"),
        (CHAT, {"temperature": -1}, "generate.temperature=-1.0: must be at least 0"),
        (CHAT, {"temperature": 0, "n": 2}, "generate.n=2: greedy samples are all the same"),
        (CHAT, {"stop": ""}, "generate.stop=''"),
        (CHAT, {"messages": "hello"}, "messages must be a non-empty list"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages must be a non-empty list"),
        (
            CHAT,
            {"messages": [*MESSAGES, {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[1].content[0]={'image_url': 'x', 'type': 'image_url'}: only parts of text are built",
        ),
        (COMPLETION, {"prompt": None}, "prompt=None: must be a string or a list of token ids"),
        (COMPLETION, {"prompt": ["x", "y"]}, "prompt=['x', 'y']: must be a string or a list of token ids; give every"),
        (COMPLETION, {"prompt": [-1]}, "prompt=[-1]: must be"),
        (COMPLETION, {"echo": True}, "echo=True: only false is built"),
        (COMPLETION, {"logprobs": True}, "logprobs=True: must be an integer from 0 to 20"),
        (COMPLETION, {"suffix": "x"}, "suffix: is not known"),
    ],
)
def test_bodies_that_are_refused(tmp_path: Path, url: str, body: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, request(url, **body))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": None}, "input=None: must be"),
        ({"input": ["x", 5]}, "input[1]=5: must be"),
        ({"dimensions": 5}, "dimensions: is not known"),
        ({"encoding_format": "base64"}, 'only "float" is built'),
    ],
)
def test_embeddings_that_are_refused(body: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        to_record(request(EMBEDDING, **body), "embed")


@pytest.mark.parametrize("line", ["{", "[]", '{"custom_id": NaN}', "x" * 100, '{"x": ' * 100_000])
def test_lines_that_are_no_object(tmp_path: Path, line: str) -> None:
    assert "JSON" in refusal(tmp_path, line)


def test_blank_lines_are_skipped_and_good_lines_converted(tmp_path: Path) -> None:
    records, rules = read(tmp_path, "", request(CHAT, max_tokens=7, n=2, temperature=1), " ", "{")
    assert (len(records), list(records.ids), list(records.refused)) == (2, ["a", 1], [1])
    assert json.loads(records.line(0)) == to_record(json.loads(records.source(0)), "generate")
    assert records.source(1) == b"{"
    assert (rules.needs_logits, rules.new_tokens) == (True, 14)


def test_logits_are_needed_only_where_a_line_needs_them(tmp_path: Path) -> None:
    greedy = request(CHAT, temperature=0)
    assert not read(tmp_path, greedy, temperature=1.0)[1].needs_logits
    assert read(tmp_path, greedy, {**request(CHAT), "custom_id": "b"}, temperature=1.0)[1].needs_logits


def test_a_mixed_file_is_refused_as_a_whole(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"in\.jsonl: line 2: /v1/embeddings is of the task embed.* file of their own"):
        read(tmp_path, request(CHAT), request(EMBEDDING))


@pytest.mark.parametrize(("url", "task"), [(CHAT, "generate"), (COMPLETION, "generate"), (EMBEDDING, "embed")])
def test_the_job_of_a_batch(tmp_path: Path, url: str, task: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('\n[1]\n{"url": []}\n{\n' + json.dumps(request(url)) + "\n")
    spec = batch_job(str(path), "o.jsonl", "m", ["generate.temperature=0.5", "parallel.stages=2"])
    assert (spec.model.path, spec.model.task, spec.input.path, spec.parallel.stages) == ("m", task, str(path), 2)
    assert (spec.output.path, spec.output.responses) == ("o.jsonl.mpinfer", "o.jsonl")
    assert spec.generate.temperature == 0.5
    assert batch_job(str(path), "o.jsonl", "m").generate.temperature == 1.0


def test_where_responses_go(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    assert responses_file(spec_from_dict({"model": {"path": "m"}, "input": {"path": str(path)}})) is None
    assert responses_file(job(path, output={"path": str(tmp_path / "o")})) == tmp_path / "o" / "responses.jsonl"
    with pytest.raises(OutputError, match="is a directory, but responses go to a file"):
        responses_file(batch_job(str(path), str(tmp_path), "m"))
    with pytest.raises(OutputError, match="is the input, which the responses would replace"):
        responses_file(batch_job(str(path), str(path), "m"))
    with pytest.raises(SpecError, match=r"output\.responses='r': input\.format auto has no responses"):
        spec_from_dict({"model": {"path": "m"}, "input": {"path": "i"}, "output": {"responses": "r"}})


def respond(asked: dict[str, Any] | str, **result: Any) -> dict[str, Any]:
    source = asked if isinstance(asked, str) else json.dumps(asked)
    line = to_response(source.encode(), {"index": 3, "id": "a", **result}, "t-3", "served", 17)
    assert (line["id"], line["error"], line["response"]["request_id"]) == ("batch_req_t-3", None, "req_t-3")
    assert list(line) == ["id", "custom_id", "response", "error"]
    return line


SAMPLE = {"text": "hi", "token_ids": [1, 2], "finish_reason": "stop"}
LOGPROBS = [
    {"text": "h", "logprob": -1.0, "top": [[1, -1.0], [5, -2.0]], "top_texts": ["h", "\ufffd"]},
    {"text": "é", "logprob": -0.5, "top": [[2, -0.5]], "top_texts": ["é"]},
]


def test_chat_response() -> None:
    line = respond(request(CHAT), output={**SAMPLE, "prompt_tokens": 4})
    assert (line["custom_id"], line["response"]["status_code"]) == ("a", 200)
    message = {"role": "assistant", "content": "hi", "refusal": None}
    assert line["response"]["body"] == {
        "id": "chatcmpl-t-3",
        "object": "chat.completion",
        "created": 17,
        "model": "served",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6},
    }


def test_chat_logprobs() -> None:
    output = {**SAMPLE, "logprobs": LOGPROBS, "prompt_tokens": 4}
    content = respond(request(CHAT), output=output)["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"] == [
        {"token": "h", "logprob": -1.0, "bytes": [104]},
        {"token": "\ufffd", "logprob": -2.0, "bytes": None},
    ]
    assert (content[1]["token"], content[1]["logprob"], content[1]["bytes"]) == ("é", -0.5, [195, 169])


def test_completion_response() -> None:
    output = {"samples": [SAMPLE, {**SAMPLE, "text": None, "finish_reason": "length"}], "prompt_tokens": 4}
    body = respond(request(COMPLETION, model="gpt"), output=output)["response"]["body"]
    assert body == {
        "id": "cmpl-t-3",
        "object": "text_completion",
        "created": 17,
        "model": "gpt",
        "choices": [
            {"index": 0, "text": "hi", "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "text": "", "logprobs": None, "finish_reason": "length"},
        ],
        "usage": {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8},
    }


def test_completion_logprobs() -> None:
    output = {**SAMPLE, "logprobs": LOGPROBS, "prompt_tokens": 4}
    choice = respond(request(COMPLETION), output=output)["response"]["body"]["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["h", "é"],
        "token_logprobs": [-1.0, -0.5],
        "top_logprobs": [{"h": -1.0, "\ufffd": -2.0}, {"é": -0.5}],
        "text_offset": [0, 1],
    }


def test_embedding_response() -> None:
    body = respond(request(EMBEDDING), output={"embeddings": [[0.5], [1.5]], "prompt_tokens": 4})["response"]["body"]
    assert body == {
        "object": "list",
        "model": "served",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5]},
            {"object": "embedding", "index": 1, "embedding": [1.5]},
        ],
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }


@pytest.mark.parametrize(
    ("asked", "name"), [(request(CHAT), "a"), ("{", None), ("[]", None), ('{"custom_id": 5}', None)]
)
def test_error_response(asked: Any, name: str | None) -> None:
    line = respond(asked, error={"type": "RecordError", "message": "why"})
    assert line["custom_id"] == name
    error = {"message": "why", "type": "invalid_request_error", "param": None, "code": None}
    assert line["response"] == {"status_code": 400, "request_id": "req_t-3", "body": {"error": error}}
