"""What a record of each task may hold."""

import re
from pathlib import Path
from typing import Any

import pytest

from mpinfer.errors import InputError
from mpinfer.records.reader import JsonlInput
from mpinfer.records.rules import RecordRules
from mpinfer.spec import spec_from_dict


def rules(task: str = "generate", **generate: Any) -> RecordRules:
    tree = {"model": {"path": "m", "task": task}, "input": {"path": "i"}, "generate": generate}
    return RecordRules(spec_from_dict(tree))


def refusal(record: dict[str, Any], task: str = "generate", **generate: Any) -> str:
    problem = rules(task, **generate).problem(record)
    assert problem is not None
    assert "\n" not in problem
    assert len(problem) < 400
    return problem


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"max_new_tokens": 1, "min_new_tokens": 1, "temperature": 0.7, "top_k": 0, "top_p": 1, "min_p": 0},
        {"temperature": 1, "n": 3, "seed": -(2**70), "repetition_penalty": 1.1},
        {"stop": "\n", "stop_token_ids": 7},
        {"stop": ["a", "b"], "stop_token_ids": [7, 8]},
        {"stop": [], "stop_token_ids": [], "logprobs": "none"},
        {"logprobs": 0},
    ],
)
def test_good_overrides(overrides: dict[str, Any]) -> None:
    assert rules().problem({"prompt": "x", "generate": overrides}) is None


@pytest.mark.parametrize(
    ("overrides", "value", "rule", "fix"),
    [
        ({"temprature": 1}, "temprature", "unknown key", "valid keys here are max_new_tokens, .*seed$"),
        ({"step_tokens": 1}, "step_tokens", "unknown key", "valid keys here are"),  # of the job, not of a record
        ({"a\nb": 1}, r"a\\nb", "unknown key", "valid keys here are"),
        ({"a" * 1000: 1}, "aaa", "unknown key", "valid keys here are"),
        ({"temperature": -1}, "temperature=-1", "at least 0", "raise it"),
        ({"temperature": "hot"}, "temperature='hot'", "must be float", "correct the value"),
        ({"temperature": "hot" * 1000}, "temperature='hot", "must be float", "correct the value"),
        ({"temperature": None}, "temperature=None", "must be float", "correct the value"),
        ({"temperature": True}, "temperature=True", "must be float", "correct the value"),
        ({"temperature": [0.5]}, r"temperature=\[0.5\]", "must be float", "correct the value"),
        ({"max_new_tokens": 0}, "max_new_tokens=0", "at least 1", "raise it"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5", "must be int", "correct the value"),
        ({"max_new_tokens": {}}, "max_new_tokens={}", "must be int", "correct the value"),
        ({"top_k": -1}, "top_k=-1", "at least 0", "raise it"),
        ({"top_p": 1.01}, "top_p=1.01", "at most 1", "lower it"),
        ({"top_p": 0}, "top_p=0", "leaves no token", "use a value above 0"),
        ({"min_p": 2}, "min_p=2", "at most 1", "lower it"),
        ({"repetition_penalty": 0}, "repetition_penalty=0", "at least 0.01", "raise it"),
        ({"stop": ""}, "stop=''", "must not be empty", "give a value"),
        ({"stop": ["a", 1]}, "stop=1", "must be str", "correct the value"),
        ({"stop": None}, "stop=None", "must be str", "correct the value"),
        ({"stop": {"a": 1}}, r"stop=\{'a': 1\}", "must be str", "correct the value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids=-1", "at least 0", "raise it"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids='a'", "must be int", "correct the value"),
        ({"logprobs": -1}, "logprobs=-1", "at least 0", "raise it"),
        ({"logprobs": True}, "logprobs=True", "must be int or 'none'", "correct the value"),
        ({"seed": "a"}, "seed='a'", "must be int", "correct the value"),
        ({"n": 0}, "n=0", "at least 1", "raise it"),
        ({"n": 2}, "n=2", "greedy samples are all the same", "raise generate.temperature"),
        ({"min_new_tokens": 99}, "min_new_tokens=99", "above generate.max_new_tokens=64", "lower it"),
    ],
)
def test_bad_overrides(overrides: dict[str, Any], value: str, rule: str, fix: str) -> None:
    problem = refusal({"prompt": "x", "generate": overrides})
    assert problem.startswith("generate.")
    for words in (value, rule, fix):
        assert re.search(words, problem), problem


@pytest.mark.parametrize("overrides", [None, [], "greedy", 1, True])
def test_overrides_are_an_object(overrides: Any) -> None:
    problem = refusal({"prompt": "x", "generate": overrides})
    assert problem == f"generate must be an object of its keys, not {overrides!r}"


def test_overrides_are_checked_together_with_the_jobs_own_keys() -> None:
    assert rules(temperature=1.0, n=4).problem({"prompt": "x", "generate": {"n": 2}}) is None
    assert "n=4: greedy" in refusal({"prompt": "x", "generate": {"temperature": 0}}, temperature=1.0, n=4)
    assert "min_new_tokens=5" in refusal({"prompt": "x", "generate": {"max_new_tokens": 4}}, min_new_tokens=5)


@pytest.mark.parametrize("task", ["score", "embed"])
def test_overrides_are_for_the_task_that_generates(task: str) -> None:
    record = {"prompt": "x", "continuations": ["y"], "generate": {}}
    assert refusal(record, task) == f"generate is for the task generate, not for {task}"


@pytest.mark.parametrize(
    ("record", "task"),
    [
        ({"prompt": "x", "continuations": ["y", ""]}, "score"),
        ({"prompt": "", "continuations": ["y"]}, "score"),
        ({"token_ids": [1], "continuations": [[2, 3], []]}, "score"),
        ({"prompt": "x"}, "embed"),
        ({"messages": [{"role": "user", "content": "x"}]}, "embed"),
        ({"token_ids": [1]}, "embed"),
        ({"inputs": [{"prompt": "x"}, {"token_ids": [1]}]}, "embed"),
    ],
)
def test_good_records_of_other_tasks(record: dict[str, Any], task: str) -> None:
    assert rules(task).problem(record) is None


@pytest.mark.parametrize(
    ("record", "task", "words"),
    [
        ({"prompt": "x"}, "score", "continuations must be a non-empty list of strings"),
        ({"prompt": "x", "continuations": []}, "score", "a non-empty list of strings"),
        ({"prompt": "x", "continuations": "y"}, "score", "a non-empty list of strings"),
        ({"prompt": "x", "continuations": ["y", 1]}, "score", "a non-empty list of strings"),
        ({"prompt": "x", "continuations": [[1]]}, "score", "a non-empty list of strings"),
        ({"token_ids": [1], "continuations": ["y"]}, "score", "a non-empty list of lists of integers from 0 up"),
        ({"token_ids": [1], "continuations": [1]}, "score", "a non-empty list of lists of integers from 0 up"),
        ({"token_ids": [1], "continuations": [[-1]]}, "score", "a non-empty list of lists of integers from 0 up"),
        ({"token_ids": [1], "continuations": [[True]]}, "score", "a non-empty list of lists of integers from 0 up"),
        ({"continuations": ["y"]}, "score", "missing field: one of prompt, token_ids is needed"),
        ({"messages": [{"role": "user", "content": "x"}], "continuations": ["y"]}, "score", "missing field"),
        ({"prompt": "x", "token_ids": [1], "continuations": ["y"]}, "score", "prompt and token_ids are given together"),
        ({}, "embed", "missing field: one of prompt, messages, token_ids, inputs is needed"),
        ({"prompt": "x", "inputs": []}, "embed", "prompt and inputs are given together"),
        ({"inputs": []}, "embed", "inputs must be a non-empty list"),
        ({"inputs": ["x"]}, "embed", "inputs must be a non-empty list"),
        ({"inputs": [{"inputs": []}]}, "embed", "inputs must be a non-empty list"),
    ],
)
def test_bad_records_of_other_tasks(record: dict[str, Any], task: str, words: str) -> None:
    assert words in refusal(record, task)


def test_continuations_that_are_wrong_are_named() -> None:
    assert "not 'yes'" in refusal({"prompt": "x", "continuations": "yes"}, "score")
    assert "not None" in refusal({"prompt": "x"}, "score")


def test_the_rules_know_what_the_good_records_ask_for() -> None:
    greedy = rules(max_new_tokens=10)
    greedy.problem({"prompt": "x"})
    assert (greedy.needs_logits, greedy.new_tokens) == (False, 10)
    greedy.problem({"prompt": "x", "generate": {"max_new_tokens": 3, "top_p": 0.5}})
    assert (greedy.needs_logits, greedy.new_tokens) == (False, 13)
    greedy.problem({"prompt": "x", "generate": {"temperature": 1, "n": 3}})
    assert (greedy.needs_logits, greedy.new_tokens) == (True, 43)
    scoring = rules("score")
    scoring.problem({"prompt": "x", "continuations": ["y"]})
    assert (scoring.needs_logits, scoring.new_tokens) == (False, 0)


def test_a_bad_record_does_not_change_how_the_good_ones_are_computed() -> None:
    own = rules()
    own.problem({"prompt": 1, "generate": {"temperature": 1}})
    own.problem({"prompt": "x", "generate": {"temperature": 1, "top_p": 2}})
    assert (own.needs_logits, own.new_tokens) == (False, 0)


def test_an_input_with_a_bad_override_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": "x", "generate": {"top_p": 2}}\n')
    with pytest.raises(InputError) as caught:
        JsonlInput(path, rules().problem)
    assert str(caught.value) == f"{path}: line 2: generate.top_p=2.0: must be at most 1; lower it; correct that line"
