"""Audio to tensors: read, made mono, resampled; then by the feature extractor of a model directory, if it has one."""

from io import BytesIO
from math import ceil, gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpinfer.errors import ModelError, RecordError, SpecError
from mpinfer.forward.prepare_common import EqualShapes, Sample, as_tensor, load_processor, reason, source_of
from mpinfer.spec import AUTO, AudioSpec

_RATE = 16000  # Hz, where neither the job nor the model says
# Of the low-pass filter: zero crossings on a side, its edge in parts of the lower Nyquist frequency, and the shape of
# its Kaiser window. What lies above that frequency is damped by 80 dB.
_CROSSINGS, _EDGE, _BETA = 48, 0.945, 8.0


class ExtractorAudio(EqualShapes):
    """Field `audio` (and `sample_rate`, of arrays), by the model's own feature extractor."""

    def __init__(self, spec: AudioSpec, directory: Path, trust: bool) -> None:
        self._extractor = load_processor("AutoFeatureExtractor", directory, trust)
        self._rate = int(self._extractor.sampling_rate)
        if spec.sample_rate not in (AUTO, self._rate):
            raise SpecError(f"audio.sample_rate={spec.sample_rate}: the model takes {self._rate}; leave it out")
        # Extractors of a fixed length would cut off the rest, some of them at random.
        fixed = [getattr(self._extractor, name, None) for name in ("n_samples", "nb_max_samples")]
        self._seconds = min([spec.max_seconds, *(samples / self._rate for samples in fixed if samples)])
        self.longest = self._vary()

    def sample(self, fields: dict[str, Any]) -> Sample:
        """What the extractor gives, [samples] or [frames, features] as a rule; raises `RecordError`."""
        samples = read_audio(fields, self._rate, self._seconds)
        try:
            return self._extract(samples)
        except Exception as error:  # too short, say
            raise RecordError(
                f"audio: the model's feature extractor refuses its {len(samples)} samples ({reason(error)}); correct it"
            ) from error

    def _extract(self, samples: np.ndarray) -> Sample:
        given = self._extractor(samples, sampling_rate=self._rate, return_tensors="pt")
        return {name: as_tensor(name, value[0]) for name, value in given.items()}

    def _vary(self) -> dict[str, int]:
        """The first dimensions that depend on the length, as they are of the longest record."""
        count = int(self._seconds * self._rate)
        noise = np.random.default_rng(0).standard_normal(count).astype(np.float32)  # silence would divide by zero
        try:
            short, long = self._extract(noise[: count // 2]), self._extract(noise)
        except Exception as error:
            raise SpecError(
                f"audio.max_seconds={self._seconds:g}: the model's feature extractor refuses the half of it "
                f"({reason(error)}); raise it"
            ) from error
        return {name: len(long[name]) for name in long if long[name].shape[:1] != short[name].shape[:1]}


class PlainAudio(EqualShapes):
    """Field `audio` (and `sample_rate`, of arrays): its samples."""

    def __init__(self, spec: AudioSpec, name: str) -> None:
        self._rate = _RATE if spec.sample_rate == AUTO else spec.sample_rate
        self._seconds, self._name = spec.max_seconds, name
        self.longest = {name: int(self._seconds * self._rate)}

    def sample(self, fields: dict[str, Any]) -> Sample:
        """[samples] in float32; raises `RecordError`."""
        return {self._name: torch.from_numpy(read_audio(fields, self._rate, self._seconds))}


def read_audio(fields: dict[str, Any], rate: int, max_seconds: float) -> np.ndarray:
    """[samples] in float32, of one channel, at `rate` Hz: of a path, bytes, {"bytes", "path"} or an array of one
    dimension, whose rate is the field `sample_rate`, or else `rate`. Raises `RecordError`."""
    value = fields.get("audio")
    if value is None:
        raise RecordError("audio: is missing, and the model takes audio; give every record a field audio")
    name, source = source_of("audio", value)
    if isinstance(source, str | bytes):
        samples, own_rate = _decode(name, source, max_seconds)
    else:
        samples, own_rate = _samples(source), fields.get("sample_rate", rate)
        if isinstance(own_rate, bool) or not isinstance(own_rate, int | np.integer) or own_rate < 1:
            raise RecordError(f"sample_rate: is {own_rate!r}, not a whole number of Hz; correct it")
    _check_length(name, len(samples), int(own_rate), max_seconds)
    samples = resample(samples, int(own_rate), rate)
    return samples[: int(max_seconds * rate)]  # resampling rounds up


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """[samples] in float32, from one rate in Hz to another, ceil(length * target / rate) of them.

    Weighted sums of the samples around each new one, by a windowed sinc. The new ones lie at few different distances
    from the old: each of these phases has its weights.
    """
    if rate == target:
        return samples
    divisor = gcd(rate, target)
    up, down = target // divisor, rate // divisor
    count = -(-len(samples) * up // down)
    edge = _EDGE * min(1.0, up / down)
    reach = _CROSSINGS / edge  # in old samples, to each side
    width = min(ceil(reach), len(samples))
    around = np.lib.stride_tricks.sliding_window_view(np.pad(samples, width), 2 * width + 1)  # a row an old sample
    resampled = np.empty(count, np.float32)
    for phase in range(min(up, count)):
        first, rest = divmod(phase * down, up)
        distance = np.arange(-width, width + 1) - rest / up
        window = np.i0(_BETA * np.sqrt((1 - (distance / reach) ** 2).clip(0))) / np.i0(_BETA)
        weights = edge * np.sinc(edge * distance) * (window * (abs(distance) <= reach))
        size = len(resampled[phase::up])
        resampled[phase::up] = around[first::down][:size] @ weights.astype(np.float32)
    return resampled


def _decode(name: str, source: str | bytes, max_seconds: float) -> tuple[np.ndarray, int]:
    """(samples of the mean of all channels, Hz), of no more than is allowed and one."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: without libsndfile
        raise ModelError("audio: needs soundfile, which is not installed; pip install 'mpinfer[audio]'") from None
    try:
        with (
            open(source, "rb") if isinstance(source, str) else BytesIO(source) as stream,
            soundfile.SoundFile(stream) as file,
        ):
            _check_length(name, file.frames, file.samplerate, max_seconds)  # before memory is taken for it
            channels = file.read(int(max_seconds * file.samplerate) + 1, dtype="float32", always_2d=True)
            return channels.mean(1), file.samplerate
    except RecordError:
        raise
    except Exception as error:
        raise RecordError(f"{name}: cannot be read as audio ({reason(error)}); correct or remove it") from error


def _samples(value: Any) -> np.ndarray:
    """Of an array: floats as they are, 16 bits from -1 to 1 as those of a file."""
    tensor = as_tensor("audio", value)
    if tensor.dim() != 1:
        raise RecordError(f"audio: has shape {list(tensor.shape)}; give the samples of one channel")
    samples = tensor.float().numpy()
    return samples / np.float32(2**15) if tensor.dtype == torch.int16 else samples


def _check_length(name: str, samples: int, rate: int, max_seconds: float) -> None:
    if samples < 1:
        raise RecordError(f"{name}: has no samples; correct or remove it")
    if samples > max_seconds * rate:
        raise RecordError(
            f"{name}: lasts {samples / rate:.2f} s, but audio.max_seconds and the model allow {max_seconds:g} s; cut it"
        )
