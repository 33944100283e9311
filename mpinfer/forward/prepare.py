"""From a record's fields to tensors: which preparer a job needs."""

import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from mpinfer.errors import ModelError, RecordError
from mpinfer.forward.prepare_audio import ExtractorAudio, PlainAudio
from mpinfer.forward.prepare_common import EqualShapes, Sample, as_tensor, reason
from mpinfer.forward.prepare_images import PlainImages, ProcessorImages
from mpinfer.forward.prepare_text import TextPreparer
from mpinfer.plugins import load_object
from mpinfer.records.inputs import input_format
from mpinfer.spec import AUTO, JobSpec

__all__ = ["Preparer", "Sample", "make_preparer"]

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


class Preparer(Protocol):
    """Makes samples of records and batches of samples."""

    longest: dict[str, int]
    """Of inputs whose first dimension (of the unbatched tensor) varies from record to record: the most it may be."""

    def sample(self, fields: dict[str, Any]) -> Sample:
        """Raises `RecordError`."""

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """[records, ...] of samples with equal keys; text is padded to the longest."""

    def key(self, sample: Sample) -> Hashable:
        """Samples with equal keys may share a batch."""

    def size(self, sample: Sample) -> int:
        """What to sort samples by, so that those of a batch need little padding; 0 where nothing is padded."""


def make_preparer(spec: JobSpec, kind: str = AUTO) -> Preparer:
    """The job's preparer: the user's function, the model's processor, or else by the records' fields.

    `kind`: "text", "images", "audio" or "arrays" where the caller knows better. Raises `ModelError` for a processor
    that cannot be loaded and `SpecError` for settings that it does not allow.
    """
    model = spec.model
    if model.prepare != AUTO:
        return UserFunction(model.prepare, load_object(model.prepare, "model.prepare", ModelError))
    directory = Path(model.path)
    has_config = (directory / "config.json").is_file()
    own = _processors(directory) if has_config else []
    if kind == AUTO:
        given = input_format(spec.input)
        kind = own[0] if own else given if given in ("images", "audio") else AUTO
    images_name, audio_name = ("pixel_values", "input_values") if has_config else ("input", "input")
    match kind:
        case "text":
            return TextPreparer(directory, model.trust)
        case "images":
            return ProcessorImages(directory, model.trust) if kind in own else PlainImages(spec.images, images_name)
        case "audio":
            if kind in own:
                return ExtractorAudio(spec.audio, directory, model.trust)
            return PlainAudio(spec.audio, audio_name)
        case "arrays":
            return Arrays()
    return ByFields(spec, images_name, audio_name)


class UserFunction(EqualShapes):
    """`model.prepare`: a function from a record's fields to tensors or arrays by name, or to one alone."""

    def __init__(self, path: str, function: Callable[[dict[str, Any]], Any]) -> None:
        if not callable(function):
            raise ModelError(f"model.prepare={path}: is a {type(function).__name__}, not a function; name a function")
        self._path, self._function = path, function

    def sample(self, fields: dict[str, Any]) -> Sample:
        """Raises `RecordError`, for whatever the function raises."""
        try:
            with torch.no_grad():
                given = self._function(fields)
        except RecordError:
            raise
        except Exception as error:
            raise RecordError(
                f"model.prepare={self._path}: raised {type(error).__name__}: {reason(error)}; correct it or the record"
            ) from error
        named = given if isinstance(given, dict) else {"input": given}
        if not named or not all(isinstance(name, str) for name in named):
            raise RecordError(f"model.prepare={self._path}: gave {given!r:.100}; return tensors by name, or one tensor")
        return {name: as_tensor(name, value) for name, value in named.items()}


class Arrays(EqualShapes):
    """Every field is the input of its name."""

    def sample(self, fields: dict[str, Any]) -> Sample:
        """Raises `RecordError`."""
        if not fields:
            raise RecordError("the record has no fields; give each input of the model in the field of its name")
        for name, value in fields.items():
            if isinstance(value, str | bytes):
                raise RecordError(
                    f"{name}: is {type(value).__name__}, and the model has no tokenizer or processor for it; add its "
                    f"files to the model directory, set model.prepare, or leave it out of input.columns"
                )
        return {name: as_tensor(name, value) for name, value in fields.items()}


class ByFields(EqualShapes):
    """A field `image` is an image, `audio` is audio; of other records every field is the input of its name."""

    def __init__(self, spec: JobSpec, images_name: str, audio_name: str) -> None:
        self._spec, self._images_name, self._audio_name = spec, images_name, audio_name
        self._kinds: dict[str, Preparer] = {}  # made when the first such record comes: it may not need its library

    def sample(self, fields: dict[str, Any]) -> Sample:
        """Raises `RecordError`."""
        kind = next((kind for kind in ("image", "audio") if kind in fields), "arrays")
        if kind not in self._kinds:
            self._kinds[kind] = self._make(kind)
        return self._kinds[kind].sample(fields)

    def _make(self, kind: str) -> Preparer:
        match kind:
            case "image":
                return PlainImages(self._spec.images, self._images_name)
            case "audio":
                return PlainAudio(self._spec.audio, self._audio_name)
        return Arrays()


def _processors(directory: Path) -> list[str]:
    """What a model directory holds processors for, that of the model's main input first. Raises `ModelError`."""
    single, several = _json(directory / "preprocessor_config.json"), _json(directory / "processor_config.json")
    extractors = [single, several.get("feature_extractor"), several.get("image_processor")]
    # Feature extractors of audio have a rate; those that older versions saved for images have none.
    kinds = ["audio" if "sampling_rate" in e else "images" for e in extractors if e]
    if any((directory / name).is_file() for name in _TOKENIZERS):
        kinds.append("text")
    return kinds


def _json(file: Path) -> dict[str, Any]:
    """Of a file that need not exist."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({reason(error)}); fetch the model again") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{file}: is a {type(tree).__name__}, not a mapping; fetch the model again")
    return tree
