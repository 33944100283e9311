"""Images to tensors: by the processor of a model directory, or by the job's section `images`."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpinfer.errors import ModelError, RecordError, SpecError
from mpinfer.forward.prepare_common import EqualShapes, Sample, as_tensor, load_processor, reason, source_of
from mpinfer.spec import ImagesSpec

_CHANNELS = (1, 3, 4)  # of arrays


class ProcessorImages(EqualShapes):
    """Field `image`, by the model's own processor."""

    def __init__(self, directory: Path, trust: bool) -> None:
        _pillow()
        # With Pillow wherever it can: the results do not depend on whether torchvision is installed.
        self._processor = load_processor("AutoImageProcessor", directory, trust, backend="pil")

    def sample(self, fields: dict[str, Any]) -> Sample:
        """What the processor gives, [3, height, width] as a rule; raises `RecordError`."""
        image = read_image(fields.get("image"), "RGB")
        try:
            given = self._processor(images=image, return_tensors="pt")
        except Exception as error:
            raise RecordError(f"image: the model's processor refuses it ({reason(error)}); correct it") from error
        return {name: as_tensor(name, value[0]) for name, value in given.items()}


class PlainImages(EqualShapes):
    """Field `image`: resized, cropped and normalized as the job's section `images` says."""

    def __init__(self, spec: ImagesSpec, name: str) -> None:
        if spec.crop > spec.resize:
            raise SpecError(
                f"images.crop={spec.crop}: is more than images.resize={spec.resize} leaves; lower it, or raise that"
            )
        for key, values in (("mean", spec.mean), ("std", spec.std)):
            if len(values) not in (1, 3) or len(values) != len(spec.mean):
                raise SpecError(
                    f"images.{key}={list(values)}: mean and std have 3 values each (red, green, blue) or 1 (gray); "
                    f"correct it"
                )
        if min(spec.std) <= 0:
            raise SpecError(f"images.std={list(spec.std)}: divides the values of images; make all of it more than 0")
        self._spec, self._name = spec, name
        self._mode = "RGB" if len(spec.mean) == 3 else "L"
        self._filter = getattr(_pillow().Resampling, spec.interpolation.upper())
        self._mean, self._std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)

    def sample(self, fields: dict[str, Any]) -> Sample:
        """[channels, crop, crop] in float32; raises `RecordError`."""
        image = read_image(fields.get("image"), self._mode)
        width, height = _resized(image.size, self._spec.resize)
        most = _pillow().MAX_IMAGE_PIXELS
        if most and width * height > most:
            raise RecordError(
                f"image: is {image.width} x {image.height} pixels, too long and thin to be resized to {width} x "
                f"{height}; crop it first"
            )
        crop = self._spec.crop
        left, top = round((width - crop) / 2), round((height - crop) / 2)
        image = image.resize((width, height), self._filter).crop((left, top, left + crop, top + crop))
        pixels = np.asarray(image, np.float32).reshape(crop, crop, -1) / np.float32(255)
        channels = ((pixels - self._mean) / self._std).transpose(2, 0, 1)
        return {self._name: torch.from_numpy(np.ascontiguousarray(channels))}


def read_image(value: Any, mode: str) -> Any:
    """An image of Pillow, upright, in this mode, of a path, bytes, {"bytes", "path"}, an image, or an array of
    [height, width], [height, width, channels] or [channels, height, width] from 0 to 255. Raises `RecordError`."""
    if value is None:
        raise RecordError("image: is missing, and the model takes images; give every record a field image")
    pillow = _pillow()
    from PIL import ImageOps

    name, source = source_of("image", value)
    try:
        if isinstance(source, pillow.Image):
            return _eight_bits(ImageOps.exif_transpose(source)).convert(mode)
        if isinstance(source, str | bytes):
            with pillow.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
                return _eight_bits(ImageOps.exif_transpose(image)).convert(mode)
        return pillow.fromarray(_pixels(np.asarray(source))).convert(mode)
    except RecordError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise RecordError(f"{name}: cannot be read as an image ({reason(error)}); correct or remove it") from error


def _eight_bits(image: Any) -> Any:
    """Pillow's own conversion would clip 16 bits to white."""
    if image.mode.startswith("I;16"):
        return _pillow().fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} does not say which value is white")
    return image


def _pixels(array: np.ndarray) -> np.ndarray:
    """[height, width] or [height, width, 3 or 4], of bytes."""
    if not array.size or array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise ValueError("an array of an image has whole numbers from 0 to 255")
    if array.ndim == 3 and array.shape[2] not in _CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in _CHANNELS):
        raise ValueError(f"an array of shape {list(array.shape)} is not height, width and channels")
    return np.ascontiguousarray(array, np.uint8)


def _resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Width and height, the shorter of them given, in the old proportions."""
    width, height = size
    return (shorter, shorter * height // width) if width <= height else (shorter * width // height, shorter)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ModelError("image: needs Pillow, which is not installed; pip install 'mpinfer[images]'") from None
    return Image
