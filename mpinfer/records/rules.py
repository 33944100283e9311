"""What a record of a task may hold, told before anything is computed."""

import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mpinfer.errors import SpecError
from mpinfer.records.openai_batch import to_record
from mpinfer.spec import JobSpec, record_sampling

_INPUTS = {
    "generate": ("prompt", "messages", "token_ids"),
    "score": ("prompt", "token_ids"),
    "embed": ("prompt", "messages", "token_ids", "inputs"),
}


class RecordRules:
    """The rules of a job's records.

    Of the records that were found good, `new_tokens` is the most that they ask for, and `needs_logits` whether choosing
    any of their tokens takes more than knowing the best one.
    """

    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # to a record, from a line of another format

    def __init__(self, spec: JobSpec, decodes: bool = True) -> None:
        """`decodes`: whether the model is a decoder; to another one any fields may go."""
        self._spec, self._task, self._decodes = spec, spec.model.task, decodes
        self.needs_logits, self.new_tokens = False, 0
        if spec.input.format == "openai-batch":
            self.convert = partial(to_record, task=self._task)

    def problem(self, record: dict[str, Any]) -> str | None:
        """What is wrong with a record, in words; None when nothing is.

        An empty prompt or an empty list of tokens passes: it cannot be computed, but that is an error of the one
        record and not of the input.
        """
        if not self._decodes:
            return None if record.keys() - {"id"} else "has no field but its id; give what the model takes"
        inputs = _INPUTS[self._task]
        problem = _input_problem(record, inputs)
        if problem is None and self._task == "score":
            problem = _continuations_problem(record)
        if problem is None:
            problem = self._sampling_problem(record)
        return problem

    def _sampling_problem(self, record: dict[str, Any]) -> str | None:
        if self._task != "generate":
            return f"generate is for the task generate, not for {self._task}" if "generate" in record else None
        overrides = record.get("generate", {})
        if not isinstance(overrides, dict):
            return f"generate must be an object of its keys, not {reprlib.repr(overrides)}"
        try:
            sampling = record_sampling(self._spec.generate, overrides) if overrides else self._spec.generate
        except SpecError as error:
            return str(error)
        self.needs_logits |= sampling.needs_logits
        self.new_tokens += sampling.n * sampling.max_new_tokens
        return None


def _input_problem(record: dict[str, Any], names: Sequence[str]) -> str | None:
    given = [name for name in names if name in record]
    if not given:
        return f"missing field: one of {', '.join(names)} is needed"
    if len(given) > 1:
        return f"{' and '.join(given)} are given together, but exactly one is allowed"
    value = record[given[0]]
    match given[0]:
        case "prompt" if not isinstance(value, str):
            return f"prompt must be a string, not {reprlib.repr(value)}"
        case "messages" if not isinstance(value, list) or not value or not all(map(_is_message, value)):
            return 'messages must be a non-empty list of {"role": string, "content": string}'
        case "token_ids" if not _are_token_ids(value):
            return "token_ids must be a list of integers from 0 up"
        case "inputs" if not isinstance(value, list) or not value or not all(map(_is_input, value)):
            return 'inputs must be a non-empty list of {"prompt": string} or {"token_ids": list of integers from 0 up}'
    return None


def _continuations_problem(record: dict[str, Any]) -> str | None:
    given = record.get("continuations")
    if "prompt" in record:
        kind, ok = "strings", lambda each: isinstance(each, str)
    else:
        kind, ok = "lists of integers from 0 up", _are_token_ids
    if not isinstance(given, list) or not given or not all(map(ok, given)):
        return f"continuations must be a non-empty list of {kind}, not {reprlib.repr(given)}"
    return None


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int} and min(value, default=0) >= 0


def _is_input(value: Any) -> bool:
    return isinstance(value, dict) and _input_problem(value, ("prompt", "token_ids")) is None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
