"""From which stored tensors each tensor of a model comes.

Mostly one to one. Some families are stored under older names, or in pieces (every expert of a mixture on its
own); transformers knows how, and its own table of renamings and conversions is used here for one tensor at a
time, so that a rank reads only the pieces of its own tensors.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mpinfer.errors import ModelError
from mpinfer.models.checkpoint import Checkpoint
from mpinfer.models.weights import check_shape, read_into, read_stored


@dataclass(frozen=True)
class Slice:
    """A part of a tensor: rows (axis 0) or columns (axis 1), ranges of them side by side."""

    axis: int
    ranges: tuple[range, ...]
    whole: tuple[int, ...]  # the shape of the tensor that it is a part of

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.whole)
        shape[self.axis] = sum(map(len, self.ranges))
        return tuple(shape)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.narrow(self.axis, part.start, len(part)) for part in self.ranges], self.axis)


@dataclass(frozen=True)
class Source:
    """The stored tensors that make up one tensor, by the pattern that matched them, or a part of it."""

    pieces: dict[str, list[str]]
    converter: Any = None  # None: a single piece, taken as it is
    part: Slice | None = None

    @property
    def names(self) -> list[str]:
        return [name for names in self.pieces.values() for name in names]

    @property
    def key(self) -> Hashable:
        """Equal for tensors that are the same, tied ones say."""
        return tuple(self.names), self.part

    def load(self, checkpoint: Checkpoint, target: torch.Tensor) -> int:
        """Fill `target`; returns the bytes read. Raises `ModelError`."""
        if self.converter is None:
            return self._read(checkpoint, self.names[0], target)
        pieces: dict[str, Any] = {}
        for pattern, names in self.pieces.items():
            pieces[pattern] = [torch.empty(checkpoint.tensors[name].shape, dtype=target.dtype) for name in names]
        read_bytes = 0
        for pattern, names in self.pieces.items():
            for name, piece in zip(names, pieces[pattern], strict=True):
                read_bytes += read_into(checkpoint, name, piece)
        for operation in self.converter.operations:
            pieces = operation.convert(
                pieces,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
            )
        (value,) = pieces.values()
        value = value[0] if isinstance(value, list) else value
        shape = target.shape if self.part is None else self.part.whole
        if tuple(value.shape) != tuple(shape):
            raise ModelError(
                f"{checkpoint.directory}: {len(self.names)} tensors such as {self.names[0]!r} make one of shape "
                f"{list(value.shape)}, config.json asks for {list(shape)}; check that they are of the same model"
            )
        target.data.copy_(value if self.part is None else self.part.of(value))
        return read_bytes

    def _read(self, checkpoint: Checkpoint, name: str, target: torch.Tensor) -> int:
        if self.part is None:
            return read_into(checkpoint, name, target)
        stored, axis = checkpoint.tensors[name], self.part.axis
        check_shape(stored, name, self.part.whole)
        read_bytes = done = 0
        for part in self.part.ranges:
            read_bytes += read_stored(stored.part(axis, part), name, target.narrow(axis, done, len(part)))
            done += len(part)
        return read_bytes


def find_sources(model: Any, names: Iterable[str], checkpoint: Checkpoint) -> dict[str, Source]:
    """The source of every tensor of `names`; raises `ModelError` when one is missing or a stored one is left over.

    Tensors that are tied in the model may be stored under either name, or under both.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    own = model.state_dict()
    for stored in sorted(checkpoint.tensors, key=dot_natural_key):
        # A name that the model has is taken at its word: only others are of an older layout.
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, own)
        found[name][pattern or ""].append(stored)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    sources: dict[str, Source] = {}
    for name in names:
        twin = tied.get(name, name)
        holder = twin if twin in found or name not in found else name
        if holder not in found:
            raise ModelError(
                f"{checkpoint.directory}: tensor {holder!r} is missing from the safetensors files; fetch or "
                f"convert the model again"
            )
        pieces = dict(found[holder])
        sources[name] = Source(pieces, by_pattern.get(next(iter(pieces))))
    known = set(sources) | set(tied) | set(tied.values()) | set(computed_buffers(model))
    if unknown := sorted(found.keys() - known):
        stored = next(iter(found[unknown[0]].values()))[0]
        raise ModelError(
            f"{checkpoint.directory}: tensor {stored!r} belongs to no part of the architecture in config.json; check "
            f"that config.json and the weights are of the same model"
        )
    return sources


def computed_buffers(module: torch.nn.Module) -> Iterable[str]:
    """Buffers that the constructor computes and no checkpoint needs to hold."""
    for prefix, child in module.named_modules():
        for name in child._non_persistent_buffers_set:
            yield f"{prefix}.{name}" if prefix else name
