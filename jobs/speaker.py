"""A speaker encoder, in plain torch: a factory for `model.path`, and what `model.prepare` calls.

Its names are those of the weights that launch/fetch_resemblyzer.sh fetches. Two recordings of one voice get vectors
with a large dot product, whatever is said.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from mpinfer.errors import ModelError, RecordError

RATE = 16000  # Hz
MELS = 40
FRAMES = 160  # of 10 ms
_HOP, _WINDOW = RATE // 100, RATE // 40  # samples: 10 ms, 25 ms
_SHORTEST = FRAMES * _HOP


def build() -> nn.Module:
    """The model with random weights: mel spectrograms [batch, frames, 40] to vectors of length 1 [batch, 256]."""
    return SpeakerEncoder()


class SpeakerEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(MELS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)


def prepare(fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The first 1.6 s of the file `fields["audio"]` as a mel spectrogram of power: "mels", [160, 40] float32.

    Raises `RecordError` when the file cannot be read, has another sample rate than 16 kHz, or is shorter.
    """
    from transformers.audio_utils import spectrogram, window_function

    # The last frame looks half a window beyond its own centre.
    wave = _read_mono(fields["audio"])[: _SHORTEST + _WINDOW // 2]
    mels = spectrogram(
        wave,
        window_function(_WINDOW, "hann"),
        frame_length=_WINDOW,
        hop_length=_HOP,
        power=2.0,
        pad_mode="constant",
        mel_filters=_mel_filters(),
    )
    return {"mels": torch.from_numpy(np.ascontiguousarray(mels.T[:FRAMES], dtype=np.float32))}


def _read_mono(path: str) -> np.ndarray:
    """Samples, float64 [samples]."""
    try:
        import soundfile
    except ImportError:
        raise ModelError("soundfile: is needed to read audio; pip install 'mpinfer[audio]'") from None
    try:
        samples, rate = soundfile.read(path, always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise RecordError(f"{path}: cannot be read as audio ({error}); give a WAV or FLAC file") from None
    if rate != RATE:
        raise RecordError(f"{path}: has {rate} samples a second, the model hears {RATE}; resample the file")
    if len(samples) < _SHORTEST:
        raise RecordError(
            f"{path}: lasts {len(samples) / RATE:g} s, the model hears {_SHORTEST / RATE:g} s; give a longer recording"
        )
    return samples.mean(axis=1)


def _mel_filters() -> np.ndarray:
    from transformers.audio_utils import mel_filter_bank

    return mel_filter_bank(
        num_frequency_bins=_WINDOW // 2 + 1,
        num_mel_filters=MELS,
        min_frequency=0.0,
        max_frequency=RATE / 2,
        sampling_rate=RATE,
        norm="slaney",
        mel_scale="slaney",
    )
