"""What a job wants of a model's outputs, on the last stage: labels, vectors, or the outputs themselves."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from mpinfer.errors import ModelError, RecordError
from mpinfer.spec import AUTO, JobSpec

Output = dict[str, Any] | RecordError
"""Of a record: what is written, or why there is nothing to write."""


class Task(Protocol):
    """Makes the outputs of records of those of a model."""

    def outputs(self, batch: dict[str, torch.Tensor], records: int) -> Sequence[Output]:
        """One a record. `batch`: the model's outputs by name, [records, ...]; rows behind those are padding.

        Raises `ModelError` for outputs that the task cannot use.
        """


class Classify:
    """The best labels of a record, by the softmax of the first output, [records, classes]."""

    def __init__(self, labels: Sequence[str] | None, top_k: int) -> None:
        self._labels, self._top_k = labels, top_k

    def outputs(self, batch: dict[str, torch.Tensor], records: int) -> list[Output]:
        name, logits = next(iter(batch.items()))
        classes = logits.shape[-1] if logits.dim() == 2 else 1
        if classes < 2:
            raise ModelError(
                f"{name}: has shape {list(logits.shape)}, and model.task=classify needs [records, 2 or more classes]; "
                f"use model.task=forward"
            )
        labels = self._labels or [str(number) for number in range(classes)]
        if len(labels) != classes:
            raise ModelError(
                f"{name}: the model has {classes} classes, but there are {len(labels)} labels; correct classify.labels"
            )
        best = _rows(name, logits, records).float().softmax(-1).topk(min(self._top_k, classes))
        numbers, scores = best.indices.tolist(), best.values.tolist()
        return [self._output(name, labels, *row) for row in zip(numbers, scores, strict=True)]

    def _output(self, name: str, labels: Sequence[str], numbers: list[int], scores: list[float]) -> Output:
        if scores[0] != scores[0]:  # one NaN makes all of a softmax NaN
            return _not_a_number(name)
        top = [[labels[number], score] for number, score in zip(numbers, scores, strict=True)]
        return {"label": top[0][0], "score": top[0][1], "top": top}


class Embed:
    """A record's vector: the output `embedding`, else the first, [records, size]."""

    def __init__(self, normalize: bool) -> None:
        self._normalize = normalize

    def outputs(self, batch: dict[str, torch.Tensor], records: int) -> list[Output]:
        name = "embedding" if "embedding" in batch else next(iter(batch))
        if batch[name].dim() != 2:
            raise ModelError(
                f"{name}: has shape {list(batch[name].shape)}, and model.task=embed needs [records, size]; use "
                f"model.task=forward"
            )
        vectors = _rows(name, batch[name], records).float().cpu()
        if self._normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        bad = vectors.isnan().any(-1).tolist()
        return [
            _not_a_number(name) if is_bad else {"embedding": vector.clone()}
            for vector, is_bad in zip(vectors, bad, strict=True)
        ]


class Forward:
    """All outputs of a record, each as a tensor of its own."""

    def outputs(self, batch: dict[str, torch.Tensor], records: int) -> list[Output]:
        rows = {name: _rows(name, tensor, records).cpu() for name, tensor in batch.items()}
        rows = {name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in rows.items()}
        return [
            {name: tensor[record].clone(memory_format=torch.contiguous_format) for name, tensor in rows.items()}
            for record in range(records)
        ]


def make_task(spec: JobSpec) -> Task:
    """Raises `ModelError` for labels that cannot be read."""
    match spec.model.task:
        case "classify":
            file = Path(spec.model.path) / "config.json"
            config = _read_json(file, "fetch the model again") if file.is_file() else None
            return Classify(load_labels(spec, config), spec.classify.top_k)
        case "embed":
            return Embed(spec.embed.normalize)
    return Forward()


def load_labels(spec: JobSpec, config: dict[str, Any] | None) -> list[str] | None:
    """Names of classes: of the file that the job gives (a line each, or JSON), or of the model's `config`.

    None where neither has any; raises `ModelError`.
    """
    if spec.classify.labels == AUTO:
        names = (config or {}).get("id2label")
        return None if names is None else _labels(names, "id2label of config.json", "give a file in classify.labels")
    file = Path(spec.classify.labels)
    fix = "give a line each, or a JSON list"
    if file.suffix == ".json":
        return _labels(_read_json(file, fix), f"classify.labels={file}", fix)
    try:
        return _labels(file.read_text(encoding="utf-8").splitlines(), f"classify.labels={file}", fix)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"classify.labels={file}: cannot be read ({error}); {fix}") from None


def _labels(names: Any, where: str, fix: str) -> list[str]:
    """Of a list, or of a mapping from "0", "1", ..."""
    if isinstance(names, dict):
        by_number = {str(number): name for number, name in names.items()}
        names = [by_number.get(str(number)) for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{where}: does not have a name for each class from 0 on; {fix}")
    return names


def _read_json(file: Path, fix: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); {fix}") from None


def _rows(name: str, tensor: torch.Tensor, records: int) -> torch.Tensor:
    """Those of records; raises `ModelError` when there are fewer."""
    if tensor.dim() == 0 or len(tensor) < records:
        raise ModelError(
            f"{name}: has shape {list(tensor.shape)} for {records} records; let the model give one row a record"
        )
    return tensor[:records]


def _not_a_number(name: str) -> RecordError:
    return RecordError(f"{name}: the model gives NaN for this record; correct the record, or use model.dtype=float32")
