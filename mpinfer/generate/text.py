"""Text to token ids and back: the model's own tokenizer and chat template."""

import json
from pathlib import Path
from typing import Any

from mpinfer.errors import ModelError, RecordError


class Text:
    """The tokenizer of a model directory, if it has one. Raises `ModelError` for one that cannot be loaded."""

    def __init__(self, directory: Path, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = _load_tokenizer(directory)

    def encode(self, record: dict[str, Any]) -> list[int]:
        """Token ids of a record's `prompt`, `messages` or `token_ids`; raises `RecordError`."""
        if "token_ids" in record:
            return self.check(record["token_ids"])
        if "messages" not in record:
            return self.encode_text(record["prompt"])
        tokenizer = self._needed()
        if not tokenizer.chat_template:
            raise RecordError("messages: the model has no chat template; give a prompt")
        try:
            return tokenizer.apply_chat_template(
                record["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # a template may refuse the roles
            raise RecordError(f"the chat template refuses this record ({error!r}); correct its messages") from error

    def encode_text(self, text: str, whole: bool = True) -> list[int]:
        """Of a whole text with the tokens that begin or end texts, if the model wants any."""
        if text == "":
            return []
        try:
            return self._needed()(text, add_special_tokens=whole).input_ids
        except RecordError:
            raise
        except Exception as error:  # half a surrogate pair, say
            raise RecordError(f"the tokenizer refuses this record ({error!r}); correct its text") from error

    def check(self, ids: list[int], name: str = "token_ids") -> list[int]:
        """The ids that were given as `name`; raises `RecordError` when the model does not have one of them."""
        if ids and max(ids) >= self._vocabulary:
            raise RecordError(
                f"{name}: {max(ids)} is outside the model's vocabulary of {self._vocabulary}; use smaller ids"
            )
        return ids

    def decode(self, ids: list[int]) -> str | None:
        """None where there is no tokenizer."""
        return None if self._tokenizer is None else self._tokenizer.decode(ids, skip_special_tokens=True)

    def token(self, id: int) -> str:
        """The text of one token, blanks and special tokens included; its number where there is no tokenizer."""
        if self._tokenizer is None:
            return f"token_id:{id}"
        once, twice = self._tokenizer.decode([id]), self._tokenizer.decode([id, id])
        return twice[len(once) :]  # the second: some tokenizers drop the blank of a text's first token

    @property
    def beginning(self) -> list[int]:
        """What stands before a text that has nothing before it: the token that begins or ends texts, if any."""
        tokenizer = self._needed()
        ids = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
        return ids[:1]

    def stop_at(self, strings: tuple[str, ...]) -> "StopStrings | None":
        """Raises `RecordError` when there is no tokenizer to find them with."""
        if strings and self._tokenizer is None:
            raise RecordError(
                f"stop: {strings[0]!r} cannot be found without a tokenizer, and the model directory has none; give "
                f"stop_token_ids or add tokenizer.json"
            )
        return StopStrings(self, strings) if strings else None

    def _needed(self) -> Any:
        if self._tokenizer is None:
            raise RecordError("text: the model directory has no tokenizer; give token_ids or add tokenizer.json")
        return self._tokenizer


class StopStrings:
    """Ends a sequence at the first of some strings."""

    def __init__(self, text: Text, strings: tuple[str, ...]) -> None:
        self._text, self._strings = text, strings
        self._window = 4 * max(map(len, strings)) + 8  # tokens: one may be as little as a byte of a character

    def __call__(self, new_tokens: list[int]) -> bool:
        """Whether the last of these tokens completes one of the strings."""
        tail = self._text.decode(new_tokens[-self._window :])
        return tail is not None and any(string in tail for string in self._strings)

    def cut(self, text: str) -> str:
        """The text before the first of the strings."""
        ends = [text.index(string) for string in self._strings if string in text]
        return text[: min(ends)] if ends else text


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
