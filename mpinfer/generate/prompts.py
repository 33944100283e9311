"""Records to token ids, and token ids to text: the model's own tokenizer and chat template."""

import json
from pathlib import Path
from typing import Any

from mpinfer.errors import ModelError, RecordError
from mpinfer.generate.scheduler import Sequence


class Prompts:
    """Turns a generate record into a `Sequence` and a finished one into its output."""

    def __init__(self, directory: Path, vocabulary: int, max_length: int) -> None:
        self._vocabulary, self._max_length = vocabulary, max_length
        self._tokenizer = _load_tokenizer(directory)

    def sequence(self, index: int, id: str | int, line: str) -> Sequence:
        """Raises `RecordError` when this record alone cannot be computed."""
        ids = self._token_ids(json.loads(line))
        if not ids:
            raise RecordError("prompt: is empty; give at least one token of text")
        if len(ids) >= self._max_length:
            raise RecordError(
                f"prompt: has {len(ids)} tokens, generate.max_length is {self._max_length} with at least one new "
                f"token; shorten it"
            )
        return Sequence(index, id, ids)

    def output(self, sequence: Sequence) -> dict[str, Any]:
        ids = sequence.new_tokens
        text = None if self._tokenizer is None else self._tokenizer.decode(ids, skip_special_tokens=True)
        return {
            "text": text,
            "token_ids": ids,
            "finish_reason": sequence.finish_reason,
            "prompt_tokens": len(sequence.prompt),
        }

    def _token_ids(self, record: dict[str, Any]) -> list[int]:
        if "token_ids" in record:
            ids = record["token_ids"]
            if ids and max(ids) >= self._vocabulary:
                raise RecordError(
                    f"token_ids: {max(ids)} is outside the model's vocabulary of {self._vocabulary}; use smaller ids"
                )
            return ids
        if self._tokenizer is None:
            raise RecordError("prompt: the model directory has no tokenizer; give token_ids or add tokenizer.json")
        if record.get("prompt") == "":
            return []
        if "messages" in record and not self._tokenizer.chat_template:
            raise RecordError("messages: the model has no chat template; give a prompt")
        try:
            if "messages" in record:
                return self._tokenizer.apply_chat_template(
                    record["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
                )
            return self._tokenizer(record["prompt"]).input_ids
        except Exception as error:  # a template may refuse the roles, a tokenizer half a surrogate pair
            raise RecordError(f"the tokenizer refuses this record ({error!r}); correct its text") from error


def stop_token_ids(directory: Path, config: Any) -> set[int]:
    """The end-of-sequence ids that transformers' `generate` would stop at."""
    try:
        generation = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        generation = {}
    except ValueError as error:
        raise ModelError(f"{directory / 'generation_config.json'}: not valid JSON ({error}); fetch it again") from None
    stop = generation.get("eos_token_id", getattr(config.get_text_config(), "eos_token_id", None))
    if stop is None:
        return set()
    return set(stop) if isinstance(stop, list) else {stop}


def _load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory, or None where there is none."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{directory}: the tokenizer cannot be loaded ({error}); fetch the model again") from None
