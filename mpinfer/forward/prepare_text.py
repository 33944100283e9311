"""Text to tokens, by the tokenizer of a model directory."""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch

from mpinfer.errors import ModelError, RecordError
from mpinfer.forward.prepare_common import Sample, load_processor, reason

_SHORTEST = 2  # tokens of a batch: torch.export takes a size of 1 as fixed
_UNKNOWN_LENGTH = 10**6  # and more: what tokenizers say that know no limit
# Families that number positions from behind the padding token's id: their tables are that much longer than a text.
_OFFSET_POSITIONS = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}


class TextPreparer:
    """Fields `text` (or `prompt`) and, of models that compare texts, `text_pair`."""

    def __init__(self, directory: Path, trust: bool) -> None:
        self._tokenizer = load_processor("AutoTokenizer", directory, trust)
        if self._tokenizer.pad_token_id is None:
            raise ModelError(
                f"{directory}: its tokenizer has no padding token, and texts of a batch are padded to the longest; set "
                f"pad_token in tokenizer_config.json"
            )
        self._limit = _longest_text(directory, trust, self._tokenizer.model_max_length)
        self._cut = _cut_at(directory, self._limit)
        given = self._encode("a", None)
        names = [name for name in self._tokenizer.model_input_names if name in given]
        self._masked = "attention_mask" in names
        padding = {"input_ids": self._tokenizer.pad_token_id, "token_type_ids": self._tokenizer.pad_token_type_id}
        self._padding = {name: padding.get(name, 0) for name in names}
        self.longest = dict.fromkeys(names, self._cut or self._limit)

    def sample(self, fields: dict[str, Any]) -> Sample:
        """[tokens] of each input; raises `RecordError`."""
        text, pair = fields.get("text", fields.get("prompt")), fields.get("text_pair")
        if not isinstance(text, str):
            raise RecordError(
                f"text: is {type(text).__name__ if text is not None else 'missing'}, and the model takes text; give "
                f"every record a field text (input.columns can rename one)"
            )
        if pair is not None and not isinstance(pair, str):
            raise RecordError(f"text_pair: is {type(pair).__name__}, not text; give text, or leave it out")
        try:
            encoding = self._encode(text, pair)
        except Exception as error:  # half a surrogate pair, say
            raise RecordError(f"text: the tokenizer refuses it ({reason(error)}); correct it") from error
        sample = {name: torch.tensor(encoding[name], dtype=torch.int64) for name in self._padding}
        tokens = self.size(sample)
        if tokens > self._limit:
            raise RecordError(f"text: has {tokens} tokens, but the model takes {self._limit} at most; shorten it")
        if tokens < (1 if self._masked else _SHORTEST):  # without a mask the padding would change the result
            raise RecordError(f"text: has {tokens} tokens, which are too few for the model; give more text")
        return sample

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """[records, tokens] of each input, padded behind the text: positions count from its first token."""
        batch = {}
        for name, padding in self._padding.items():
            rows = torch.nn.utils.rnn.pad_sequence([s[name] for s in samples], batch_first=True, padding_value=padding)
            missing = max(_SHORTEST - rows.shape[1], 0)
            batch[name] = torch.nn.functional.pad(rows, (0, missing), value=padding)
        return batch

    def key(self, sample: Sample) -> Hashable:
        return () if self._masked else self.size(sample)

    def size(self, sample: Sample) -> int:
        """Tokens."""
        return len(next(iter(sample.values())))

    def _encode(self, text: str, pair: str | None) -> Any:
        return self._tokenizer(text, pair, truncation=self._cut is not None, max_length=self._cut, verbose=False)


def _longest_text(directory: Path, trust: bool, of_tokenizer: int) -> int:
    """In tokens; raises `ModelError` when neither the model nor its tokenizer knows a limit."""
    config = load_processor("AutoConfig", directory, trust).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in _OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    limits = [limit for limit in (positions, of_tokenizer) if limit and 0 < limit < _UNKNOWN_LENGTH]
    if not limits:
        raise ModelError(
            f"{directory}: neither its config.json nor its tokenizer says how long a text may be; set model_max_length "
            f"in tokenizer_config.json"
        )
    return int(min(limits))


def _cut_at(directory: Path, limit: int) -> int | None:
    """Tokens at which the model's own rule, that of sentence-transformers, cuts a text off; None: it has no such rule.

    Raises `ModelError` for a file that is damaged.
    """
    file = directory / "sentence_bert_config.json"
    if not file.is_file():
        return None
    try:
        length = json.loads(file.read_text(encoding="utf-8")).get("max_seq_length")
        return None if length is None else min(int(length), limit)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); fetch the model again") from None
