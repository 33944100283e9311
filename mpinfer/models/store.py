"""Where the tensors of a program come from, one by one: safetensors, a pickled state dict, or the model itself."""

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from mpinfer.errors import ModelError
from mpinfer.models.checkpoint import Checkpoint
from mpinfer.models.sources import Slice, Source
from mpinfer.plugins import one_line


class Store(Protocol):
    """Tensors by the model's own names."""

    def load(self, name: str, target: torch.Tensor, part: Slice | None = None) -> int:
        """Fill `target` with a tensor, or a part of it; returns the bytes read. Raises `ModelError`."""


class StoredFiles:
    """The tensors of safetensors files or of a program's archive, each read from its own place."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def names(self) -> Iterable[str]:
        return self._checkpoint.tensors

    def load(self, name: str, target: torch.Tensor, part: Slice | None = None) -> int:
        return Source({"": [name]}, part=part).load(self._checkpoint, target)


class ConvertedFiles:
    """The same through transformers' own table of renamings and conversions."""

    def __init__(self, checkpoint: Checkpoint, sources: Mapping[str, Source]) -> None:
        self._checkpoint, self._sources = checkpoint, sources

    def load(self, name: str, target: torch.Tensor, part: Slice | None = None) -> int:
        return replace(self._sources[name], part=part).load(self._checkpoint, target)


class PickledStateDict:
    """A state dict saved by `torch.save`. Mapped into memory where its format allows it, so that a rank reads only its
    own part; an old file without that is read whole first."""

    def __init__(self, file: Path, trust: bool) -> None:
        self._file = file
        try:
            state = self._open(trust, mmap=True)
        except RuntimeError:  # of before torch 1.6, which cannot be mapped, or damaged
            try:
                state = self._open(trust, mmap=False)
            except RuntimeError as error:
                raise self._unreadable(error) from None
        for key in ("state_dict", "model_state_dict", "model"):  # as training scripts wrap it
            if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
                state = state[key]
        if isinstance(state, nn.Module):
            state = state.state_dict()
        if not isinstance(state, Mapping) or not all(isinstance(t, torch.Tensor) for t in state.values()):
            raise ModelError(f"model.weights={file}: holds no state dict; save model.state_dict() with torch.save")
        self._tensors: Mapping[str, torch.Tensor] = state

    def names(self) -> Iterable[str]:
        return self._tensors

    def load(self, name: str, target: torch.Tensor, part: Slice | None = None) -> int:
        stored = self._tensors[name]
        shape = target.shape if part is None else torch.Size(part.whole)
        if stored.shape != shape:
            raise ModelError(
                f"{self._file}: tensor {name!r} has shape {list(stored.shape)}, the model asks for "
                f"{list(shape)}; check that they are of the same model"
            )
        target.data.copy_(stored if part is None else part.of(stored))
        return target.numel() * stored.element_size()

    def _open(self, trust: bool, mmap: bool) -> object:
        try:
            return torch.load(self._file, map_location="cpu", weights_only=not trust, mmap=mmap)
        except pickle.UnpicklingError as error:
            first = str(error).split("\n")[0]
            raise ModelError(
                f"model.weights={self._file}: holds more than tensors, and unpickling it would run its code ({first}); "
                f"save model.state_dict() alone, or set model.trust: true if you trust the file"
            ) from None
        except (OSError, EOFError, KeyError, ValueError, AttributeError, ImportError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> ModelError:
        return ModelError(f"model.weights={self._file}: cannot be loaded ({one_line(error)}); save it again")


class HeldTensors:
    """What is in memory already, as a factory or a pickled program has made it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def load(self, name: str, target: torch.Tensor, part: Slice | None = None) -> int:
        held = self._tensors[name]
        target.data.copy_(held if part is None else part.of(held))
        return 0


def check_names(file: Path, stored: Iterable[str], model: nn.Module) -> dict[str, str]:
    """By each of the model's tensors its stored name, which for tied ones may be another's.

    Raises `ModelError` when one is missing or a stored one is left over.
    """
    stored, wanted = set(stored), model.state_dict(keep_vars=True)
    twins: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        twins.setdefault(id(tensor), []).append(name)
    found = {}
    for name, tensor in wanted.items():
        holder = next((n for n in (name, *twins[id(tensor)]) if n in stored), None)
        if holder is not None:
            found[name] = holder
        elif not name.endswith("num_batches_tracked"):  # counts batches of training; old files lack it
            raise ModelError(
                f"{file}: tensor {name!r} of the model is missing; check that model.weights is of this model"
            )
    if unknown := sorted(stored - wanted.keys()):
        raise ModelError(
            f"{file}: tensor {unknown[0]!r} belongs to no part of the model; check that model.weights is of this model"
        )
    return found


class Renamed:
    """A store by other names."""

    def __init__(self, store: Store, names: Mapping[str, str]) -> None:
        self._store, self._names = store, names

    def load(self, name: str, target: torch.Tensor, part: Slice | None = None) -> int:
        return self._store.load(self._names[name], target, part)
