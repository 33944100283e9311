"""The first look at a model directory. Needs no torch, so a mistyped path is told at once."""

import json
from pathlib import Path

from mpinfer.errors import ModelError


def check_model_directory(path: str) -> Path:
    """The directory as a `Path` when it looks like a model; raises `ModelError`."""
    directory = Path(path)
    if directory.suffix == ".gguf":
        raise ModelError(f"model.path={path}: a GGUF file; convert it first: mpinfer convert {path} DIRECTORY")
    if not directory.is_dir():
        raise ModelError(f"model.path={path}: no such directory; give a directory with config.json and safetensors")
    config = directory / "config.json"
    if not config.is_file():
        raise ModelError(f"model.path={path}: has no config.json; give a Hugging Face model directory")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config}: not valid JSON ({error}); fetch or convert the model again") from None
    return directory
