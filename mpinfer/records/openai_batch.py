"""OpenAI Batch files: a request line becomes a record, a record's result becomes a response line.

What a line leaves out is what the job says; `batch_job` is a job that says what OpenAI's API would.
"""

import json
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from mpinfer.errors import InputError, OutputError
from mpinfer.records.files import RESULTS, encode_json, output_errors, read_manifest, write_atomically
from mpinfer.records.inputs import Input
from mpinfer.spec import AUTO, JobSpec, spec_from_dict

MOST_TOP_LOGPROBS = 20  # OpenAI's limit
COMPLETION_TOKENS = 16  # of a completion that does not say how many
UNLIMITED_TOKENS = 2**20  # of an answer that does not say how many: beyond any model, so that the model's limit holds

# Sampling under the name that a record's `generate` has for it, too. The first are OpenAI's, the others vLLM's.
_SAMPLING = ("temperature", "top_p", "n", "stop", "seed", "top_k", "min_p", "repetition_penalty", "stop_token_ids")

# Keys that do not change an answer, whatever they say.
_IGNORED = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}

# Keys that may say nothing but what holds anyway.
_ONLY: dict[str, Any] = {
    "stream": False,
    "echo": False,
    "ignore_eos": False,
    "best_of": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "encoding_format": "float",
}


@dataclass(frozen=True)
class Endpoint:
    task: str
    prefix: str  # of its responses' ids; "" for responses without
    keys: tuple[str, ...]  # that a body may have
    record: Callable[[dict[str, Any]], dict[str, Any]]  # what they ask for, without the id; raises `ValueError`
    body: Callable[[dict[str, Any]], dict[str, Any]]  # of the response, from a record's output


def batch_job(input_file: str, output_file: str, model: str, overrides: Sequence[str] = ()) -> JobSpec:
    """The job of `mpinfer run-batch`; its results are kept in a directory beside `output_file`.

    Raises `SpecError`.
    """
    return spec_from_dict(
        {
            "model": {"path": model, "task": _task(Path(input_file))},
            "input": {"path": input_file, "format": "openai-batch"},
            "output": {"path": f"{output_file}.mpinfer", "responses": output_file},
            "generate": {"temperature": 1.0, "max_new_tokens": UNLIMITED_TOKENS},
        },
        overrides,
    )


def to_record(request: dict[str, Any], task: str) -> dict[str, Any]:
    """The record that a request line asks for.

    Raises `ValueError` with what is wrong with the line, `InputError` when the line belongs into another file.
    """
    url = request.get("url")
    endpoint = ENDPOINTS.get(url) if isinstance(url, str) else None
    if endpoint is None:
        raise ValueError(f"url={reprlib.repr(url)}: must be one of {', '.join(ENDPOINTS)}; correct it")
    if endpoint.task != task:
        raise InputError(
            f"{url} is of the task {endpoint.task}, but the job's is {task}, and a run has one; put the lines of each "
            "task into a file of their own"
        )
    if request.get("method", "POST") != "POST":
        raise ValueError(f"method={reprlib.repr(request['method'])}: must be 'POST'; correct it")
    name, body = request.get("custom_id"), request.get("body")
    if not isinstance(name, str):
        raise ValueError(f"custom_id={reprlib.repr(name)}: must be a string; give each line one of its own")
    if not isinstance(body, dict):
        raise ValueError(f"body={reprlib.repr(body)}: must be an object; put the request there")
    body = {key: value for key, value in body.items() if value is not None}
    for key, value in body.items():
        if key in _ONLY and value != _ONLY[key]:
            raise ValueError(f"{key}={reprlib.repr(value)}: only {json.dumps(_ONLY[key])} is built; leave it out")
        if key not in endpoint.keys and key not in _IGNORED and key not in _ONLY:
            raise ValueError(f"{key}: is not known to {url}, or not built; leave it out")
    return {"id": name, **endpoint.record(body)}


def responses_file(spec: JobSpec) -> Path | None:
    """Where the responses of a job go, checked before there are any; None for a job without.

    Raises `OutputError`.
    """
    if spec.input.format != "openai-batch":
        return None
    given = spec.output.responses
    path = Path(spec.output.path, "responses.jsonl") if given == AUTO else Path(given)
    if path.is_dir():
        raise OutputError(f"{path}: is a directory, but responses go to a file; choose another name")
    if path.resolve() == Path(spec.input.path).resolve():
        raise OutputError(f"{path}: is the input, which the responses would replace; choose another name")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_responses(path: Path, spec: JobSpec, records: Input) -> None:
    """Write the responses of a complete run, in the order of the input. The same whenever they are written."""
    directory = Path(spec.output.path)
    created = (read_manifest(directory) or {}).get("finished_unix_s", 0)
    model = Path(spec.model.path).name

    def lines() -> Iterator[bytes]:
        with (directory / RESULTS).open("rb") as results:
            for index, line in enumerate(results):
                tag = f"{records.sha256[:16]}-{index}"
                response = to_response(records.source(index), json.loads(line), tag, model, created)
                yield encode_json(response) + b"\n"

    write_atomically(path, lines())


def to_response(source: bytes, result: dict[str, Any], tag: str, model: str, created: int) -> dict[str, Any]:
    """The response to the request on a line. `tag` makes its ids unique, `model` names what the request does not."""
    try:
        request = json.loads(source)
    except (ValueError, RecursionError):
        request = None
    name = request.get("custom_id") if isinstance(request, dict) else None
    if "error" in result:
        status = 400
        error = {"message": result["error"]["message"], "type": "invalid_request_error", "param": None, "code": None}
        body: dict[str, Any] = {"error": error}
    else:
        status = 200
        endpoint, asked = ENDPOINTS[request["url"]], request["body"].get("model")
        head = {"id": f"{endpoint.prefix}-{tag}", "created": created} if endpoint.prefix else {}
        body = {**head, "model": asked if isinstance(asked, str) else model, **endpoint.body(result["output"])}
    return {
        "id": f"batch_req_{tag}",
        "custom_id": name if isinstance(name, str) else None,
        "response": {"status_code": status, "request_id": f"req_{tag}", "body": body},
        "error": None,
    }


def _task(path: Path) -> str:
    """Of the first line that has one. What is wrong with the file is told by who reads all of it."""
    if path.is_file():  # opening a pipe would wait for its writer
        with path.open("rb") as file:
            for line in file:
                try:
                    return ENDPOINTS[json.loads(line)["url"]].task
                except (ValueError, LookupError, TypeError, RecursionError):
                    continue
    return "generate"


def _chat_record(body: dict[str, Any]) -> dict[str, Any]:
    generate = _sampling(body)
    for key in ("max_tokens", "max_completion_tokens"):  # the second is the newer name
        if key in body:
            generate["max_new_tokens"] = _integer(body, key, 1)
    if type(body.get("logprobs", False)) is not bool:
        raise ValueError(f"logprobs={reprlib.repr(body['logprobs'])}: must be true or false; correct it")
    if body.get("logprobs"):
        generate["logprobs"] = _integer(body, "top_logprobs", 0, MOST_TOP_LOGPROBS) if "top_logprobs" in body else 0
    elif "top_logprobs" in body:
        raise ValueError(f"top_logprobs={reprlib.repr(body['top_logprobs'])}: needs logprobs; add logprobs: true")
    messages = body.get("messages")
    if isinstance(messages, list):
        messages = [_plain(message, f"messages[{number}]") for number, message in enumerate(messages)]
    return {"messages": messages, "generate": generate}


def _plain(message: Any, where: str) -> Any:
    """A message with its content as one string. What is no message is left for the rules of records to refuse."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError(
                f"{where}.content[{number}]={reprlib.repr(part)}: only parts of text are built; give "
                '{"type": "text", "text": string}'
            )
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


def _completion_record(body: dict[str, Any]) -> dict[str, Any]:
    generate = _sampling(body)
    generate["max_new_tokens"] = _integer(body, "max_tokens", 1) if "max_tokens" in body else COMPLETION_TOKENS
    if "logprobs" in body:
        generate["logprobs"] = _integer(body, "logprobs", 0, MOST_TOP_LOGPROBS)
    return {**_text("prompt", body.get("prompt")), "generate": generate}


def _embedding_record(body: dict[str, Any]) -> dict[str, Any]:
    given = body.get("input")
    if isinstance(given, list) and given and isinstance(given[0], str | list):
        return {"inputs": [_text(f"input[{number}]", each) for number, each in enumerate(given)]}
    return _text("input", given)


def _text(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, list) and all(type(token) is int and token >= 0 for token in value):
        return {"token_ids": value}
    raise ValueError(
        f"{name}={reprlib.repr(value)}: must be a string or a list of token ids; give every prompt a line of its own"
    )


def _sampling(body: dict[str, Any]) -> dict[str, Any]:
    """What needs no look here: the rules of records have one."""
    generate = {key: body[key] for key in _SAMPLING if key in body}
    if generate.get("top_k") == -1:  # vLLM's word for all
        generate["top_k"] = 0
    if "min_tokens" in body:
        generate["min_new_tokens"] = _integer(body, "min_tokens", 0)
    return generate


def _integer(body: dict[str, Any], key: str, least: int, most: int | None = None) -> int:
    value = body[key]
    if type(value) is not int or value < least or (most is not None and value > most):
        end = "up" if most is None else f"to {most}"
        raise ValueError(f"{key}={reprlib.repr(value)}: must be an integer from {least} {end}; correct it")
    return value


def _chat_body(output: dict[str, Any]) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": sample["text"] or "", "refusal": None},
            "logprobs": _chat_logprobs(sample["logprobs"]) if "logprobs" in sample else None,
            "finish_reason": sample["finish_reason"],
        }
        for index, sample in enumerate(_samples(output))
    ]
    return {"object": "chat.completion", "choices": choices, "usage": _usage(output)}


def _completion_body(output: dict[str, Any]) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": sample["text"] or "",
            "logprobs": _completion_logprobs(sample["logprobs"]) if "logprobs" in sample else None,
            "finish_reason": sample["finish_reason"],
        }
        for index, sample in enumerate(_samples(output))
    ]
    return {"object": "text_completion", "choices": choices, "usage": _usage(output)}


def _embedding_body(output: dict[str, Any]) -> dict[str, Any]:
    vectors = output["embeddings"] if "embeddings" in output else [output["embedding"]]
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    tokens = output["prompt_tokens"]
    return {"object": "list", "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _samples(output: dict[str, Any]) -> list[dict[str, Any]]:
    return output.get("samples", [output])


def _usage(output: dict[str, Any]) -> dict[str, Any]:
    prompt, new = output["prompt_tokens"], sum(len(sample["token_ids"]) for sample in _samples(output))
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _chat_logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    content = [
        {
            **_chat_token(entry["text"], entry["logprob"]),
            "top_logprobs": [
                _chat_token(text, logprob) for text, (_, logprob) in zip(entry["top_texts"], entry["top"], strict=True)
            ],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat_token(text: str, logprob: float) -> dict[str, Any]:
    partial = "\ufffd" in text  # a piece of a character, whose bytes the tokenizer does not tell
    return {"token": text, "logprob": logprob, "bytes": None if partial else list(text.encode())}


def _completion_logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    texts = [entry["text"] for entry in entries]
    *offsets, _ = accumulate(map(len, texts), initial=0)
    return {
        "tokens": texts,
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {text: logprob for text, (_, logprob) in zip(entry["top_texts"], entry["top"], strict=True)}
            for entry in entries
        ],
        "text_offset": offsets,
    }


ENDPOINTS = {
    "/v1/chat/completions": Endpoint(
        "generate",
        "chatcmpl",
        ("messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "min_tokens", *_SAMPLING),
        _chat_record,
        _chat_body,
    ),
    "/v1/completions": Endpoint(
        "generate",
        "cmpl",
        ("prompt", "max_tokens", "logprobs", "min_tokens", *_SAMPLING),
        _completion_record,
        _completion_body,
    ),
    "/v1/embeddings": Endpoint("embed", "", ("input",), _embedding_record, _embedding_body),
}
