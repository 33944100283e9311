"""What a job wants of a decoder: new text, the likelihood of given text, or a vector.

A task turns a record into sequences, what the pipeline found for their samples into results, and finished
sequences into the record's output. It lives on the first stage, where the books are.
"""

import json
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, Protocol

import torch

from mpinfer.errors import ModelError, RecordError
from mpinfer.generate.readout import Best, Likelihood, Logits, NoReadout, Readout, merge_best, merge_likelihood
from mpinfer.generate.sampling import Sampling, choose_tokens
from mpinfer.generate.scheduler import Limits, Sequence
from mpinfer.generate.text import Text, stop_token_ids
from mpinfer.models.decoder import DecoderSkeleton
from mpinfer.models.pooling import Pooling, pooling_of
from mpinfer.spec import EmbedSpec, GenerateSpec, JobSpec, SamplingSpec, record_sampling


class Task(Protocol):
    def sequences(self, index: int, id: str | int, line: str) -> list[Sequence]:
        """Raises `RecordError` when this record alone cannot be computed."""

    def results(self, hidden: torch.Tensor, shares: Many[torch.Tensor], sequences: Many[Sequence]) -> list[Any]:
        """One for every sample, of its final hidden state [samples, hidden] and of what the readouts found in each
        share of the vocabulary, in its order; `sequences`: of every sample."""

    def output(self, sequences: list[Sequence]) -> dict[str, Any]:
        """A record's output, of all its sequences, in their order."""


class Generate:
    """New tokens, greedy or sampled."""

    def __init__(self, text: Text, spec: GenerateSpec, stop_ids: set[int], max_length: int, needs_logits: bool) -> None:
        self._text, self._spec, self._max_length = text, spec, max_length
        self._stop_ids, self._needs_logits = stop_ids, needs_logits

    def sequences(self, index: int, id: str | int, line: str) -> list[Sequence]:
        record = json.loads(line)
        prompt = _prompt(self._text.encode(record), self._max_length - 1)
        overrides = record.get("generate", {})
        spec = record_sampling(self._spec, overrides) if overrides else self._spec
        stop_ids = self._stop_ids.union(self._text.check(list(spec.stop_token_ids), "stop_token_ids"))
        limits = Limits(spec.max_new_tokens, stop_ids, self._text.stop_at(spec.stop))
        seed = (spec.seed,) if "seed" in overrides else (spec.seed, id)
        sampling = _sampling(spec, seed, stop_ids)
        return [Sequence(index, id, prompt, limits, number, sampling) for number in range(spec.n)]

    def results(self, hidden: torch.Tensor, shares: Many[torch.Tensor], sequences: Many[Sequence]) -> list[Any]:
        if self._needs_logits:
            return choose_tokens(torch.cat(list(shares), dim=1).cpu(), sequences)
        return [(token, None) for token in merge_best(shares)]

    def output(self, sequences: list[Sequence]) -> dict[str, Any]:
        samples = [self._sample(sequence) for sequence in sequences]
        output = samples[0] if len(samples) == 1 else {"samples": samples}
        return {**output, "prompt_tokens": len(sequences[0].prompt)}

    def _sample(self, sequence: Sequence) -> dict[str, Any]:
        text = self._text.decode(sequence.new_tokens)
        assert sequence.limits is not None
        if text is not None and sequence.limits.stop_text is not None:
            text = sequence.limits.stop_text.cut(text)
        sample: dict[str, Any] = {
            "text": text,
            "token_ids": sequence.new_tokens,
            "finish_reason": sequence.finish_reason,
        }
        if sequence.sampling.logprobs is not None:
            pairs = zip(sequence.new_tokens, sequence.results, strict=True)
            sample["logprobs"] = [self._named(token, logprobs) for token, logprobs in pairs]
        return sample

    def _named(self, token: int, logprobs: dict[str, Any]) -> dict[str, Any]:
        """The log-probabilities of a token, with the texts of all tokens in them."""
        top_texts = [self._text.token(best) for best, _ in logprobs["top"]]
        return {"text": self._text.token(token), **logprobs, "top_texts": top_texts}


class Score:
    """The log-likelihood of given continuations, token by token, as evaluation harnesses want it.

    A prompt and a continuation are tokenized together, and the continuation's tokens are those behind the prompt's
    own; blanks at the prompt's end belong to the continuation (after lm-evaluation-harness).
    """

    def __init__(self, text: Text, max_length: int) -> None:
        self._text, self._max_length = text, max_length

    def sequences(self, index: int, id: str | int, line: str) -> list[Sequence]:
        record = json.loads(line)
        return [
            self._sequence(index, id, number, *self._tokens(record, continuation))
            for number, continuation in enumerate(record["continuations"])
        ]

    def results(self, hidden: torch.Tensor, shares: Many[torch.Tensor], sequences: Many[Sequence]) -> list[Any]:
        return merge_likelihood(shares)

    def output(self, sequences: list[Sequence]) -> dict[str, Any]:
        return {
            "scores": [self._score(sequence) for sequence in sequences],
            "prompt_tokens": sequences[0].sample_from + 1,
        }

    def _score(self, sequence: Sequence) -> dict[str, Any]:
        logprobs = [logprob for logprob, _ in sequence.results]
        best = [token for _, token in sequence.results]
        return {
            "logprob": sum(logprobs),
            "token_logprobs": logprobs,
            "token_ids": sequence.targets,
            "is_greedy": best == sequence.targets,
        }

    def _sequence(self, index: int, id: str | int, number: int, prompt: list[int], targets: list[int]) -> Sequence:
        if not targets:
            raise RecordError(f"continuations: number {number} is empty; give at least one token of text")
        tokens = _prompt(prompt + targets[:-1], self._max_length)
        return Sequence(index, id, tokens, number=number, sample_from=len(prompt) - 1, targets=targets)

    def _tokens(self, record: dict[str, Any], continuation: Any) -> tuple[list[int], list[int]]:
        if "token_ids" in record:
            prompt, targets = self._text.encode(record), self._text.check(continuation, "continuations")
        else:
            prompt, targets = self._split(record["prompt"], continuation)
        return prompt or self._text.beginning, targets

    def _split(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        own = self._text.encode_text(prompt.rstrip())
        if not own:  # `beginning` stands before it: not that token twice
            return own, self._text.encode_text(prompt + continuation, whole=False)
        return own, self._text.encode_text(prompt + continuation)[len(own) :]


class Embed:
    """A vector for each text: its tokens' final hidden states, pooled."""

    def __init__(self, text: Text, spec: EmbedSpec, pooling: Pooling, max_length: int) -> None:
        """Raises `ModelError` for a pooling that makes no sense of a decoder."""
        if pooling == "first":
            raise ModelError(
                "embed.pooling=first: the first token of a decoder has seen no other; use mean or last, or an encoder"
            )
        self._text, self._spec, self._pooling, self._max_length = text, spec, pooling, max_length

    def sequences(self, index: int, id: str | int, line: str) -> list[Sequence]:
        record = json.loads(line)
        inputs = record.get("inputs", [record])
        return [self._sequence(index, id, number, self._text.encode(each)) for number, each in enumerate(inputs)]

    def results(self, hidden: torch.Tensor, shares: Many[torch.Tensor], sequences: Many[Sequence]) -> list[Any]:
        return list(hidden.to("cpu", copy=True).unbind())  # they outlive the step, whose memory the next one gets

    def output(self, sequences: list[Sequence]) -> dict[str, Any]:
        vectors = [self._vector(sequence) for sequence in sequences]
        output = {"embedding": vectors[0]} if len(vectors) == 1 else {"embeddings": vectors}
        return {**output, "prompt_tokens": sum(len(sequence.prompt) for sequence in sequences)}

    def _sequence(self, index: int, id: str | int, number: int, tokens: list[int]) -> Sequence:
        prompt = _prompt(tokens, self._max_length)
        sample_from = len(prompt) - 1 if self._pooling == "last" else 0
        return Sequence(index, id, prompt, number=number, sample_from=sample_from)

    def _vector(self, sequence: Sequence) -> list[float]:
        vector = torch.stack(sequence.results).mean(0)
        if self._spec.normalize:
            vector = torch.nn.functional.normalize(vector, dim=0)
        return vector.tolist()


def make_task(spec: JobSpec, skeleton: DecoderSkeleton, max_length: int, needs_logits: bool) -> Task:
    """The books' side of the job's task."""
    directory = Path(spec.model.path)
    text = Text(directory, skeleton.vocabulary)
    match spec.model.task:
        case "score":
            return Score(text, max_length)
        case "embed":
            return Embed(text, spec.embed, pooling_of(directory, spec.embed.pooling), max_length)
    return Generate(text, spec.generate, stop_token_ids(directory, skeleton.config), max_length, needs_logits)


def readout_kind(spec: JobSpec, needs_logits: bool) -> type[Readout]:
    """What every share of the vocabulary has to find out for the job's task."""
    match spec.model.task:
        case "score":
            return Likelihood
        case "embed":
            return NoReadout
    return Logits if needs_logits else Best


def _prompt(ids: list[int], longest: int) -> list[int]:
    if not ids:
        raise RecordError("prompt: is empty; give at least one token of text")
    if len(ids) > longest:
        raise RecordError(
            f"prompt: has {len(ids)} tokens, but {longest} is the most that generate.max_length, the model and the KV "
            f"cache allow; shorten it"
        )
    return ids


def _sampling(spec: SamplingSpec, seed: tuple[int | str, ...], stop_ids: set[int]) -> Sampling:
    return Sampling(
        seed,
        spec.temperature,
        spec.top_k,
        spec.top_p,
        spec.min_p,
        spec.repetition_penalty,
        spec.min_new_tokens,
        tuple(stop_ids),
        None if spec.logprobs == "none" else spec.logprobs,
    )
