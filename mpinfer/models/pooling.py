"""A vector for a record, of what an encoder says of its parts."""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from mpinfer.errors import ModelError
from mpinfer.spec import AUTO

Pooling = Literal["mean", "last", "first"]
_RULES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
}


def pooling_of(directory: Path, given: Pooling | Literal["auto"]) -> Pooling:
    """As given, else the rule that comes with the model (sentence-transformers' file), else the mean."""
    if given != AUTO:
        return given
    try:
        rules = json.loads((directory / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "mean"
    return next((pooling for key, pooling in _RULES.items() if rules.get(key)), "mean")


def pool(outputs: Any, inputs: dict[str, torch.Tensor], pooling: Pooling) -> torch.Tensor:
    """Vectors [records, hidden] of the outputs of one of transformers' base models.

    Raises `ModelError` when it gives no hidden states.
    """
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None:
        raise ModelError(f"{type(outputs).__name__}: has no last_hidden_state to embed; use model.task=forward")
    if hidden.dim() == 4:  # images: [records, channels, height, width]
        hidden = hidden.flatten(2).transpose(1, 2)
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return {"mean": hidden.mean(1), "first": hidden[:, 0], "last": hidden[:, -1]}[pooling]
    counts = mask.sum(1)
    if pooling == "mean":
        return (hidden * mask[:, :, None].to(hidden.dtype)).sum(1) / counts[:, None].to(hidden.dtype)
    if pooling == "first":
        return hidden[:, 0]
    return hidden.gather(1, (counts - 1)[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
