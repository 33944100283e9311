"""Where a stage computes."""

import torch

from mpinfer.errors import SpecError


def choose_device(wanted: str, local_rank: int) -> str:
    """`auto`: this rank's GPU where the node has any, else the CPU. Raises `SpecError` for a GPU that is not there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not gpus:
        raise SpecError("model.device=cuda: torch sees no GPU on this node; use auto or cpu")
    return f"cuda:{local_rank % gpus}" if gpus and wanted != "cpu" else "cpu"
