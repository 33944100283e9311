"""The first look at the records of a model of any kind: what its inputs are like."""

import json
from collections.abc import Callable
from typing import Any

import torch

from mpinfer.errors import InputError, RecordError
from mpinfer.forward.prepare import Preparer, Sample, make_preparer
from mpinfer.models.program import InputShape
from mpinfer.records.inputs import Input
from mpinfer.records.loader import make_loader
from mpinfer.spec import JobSpec

_TRIES = 100  # records


def input_shapes(spec: JobSpec, records: Input) -> dict[str, InputShape]:
    """The shapes of a record's tensors, by the first record that can be prepared: the model is traced with them.

    Raises `InputError` when none of the first 100 can be.
    """
    preparer = make_preparer(spec)
    sample_of = make_sampler(spec, preparer)
    problem: RecordError | None = None
    tried = [index for index in range(min(len(records), _TRIES)) if index not in records.refused]
    for index in tried:
        try:
            sample = sample_of(records.line(index))
        except RecordError as error:
            problem = problem or error
            continue
        return {
            name: InputShape(tuple(t.shape), str(t.dtype).removeprefix("torch."), preparer.longest.get(name))
            for name, t in sample.items()
        }
    raise InputError(
        f"input.path={spec.input.path}: none of the first {len(tried)} records can be prepared (the first: {problem}); "
        f"correct the records, or input.columns or model.prepare"
    )


def make_sampler(spec: JobSpec, preparer: Preparer) -> Callable[[str | bytes], Sample]:
    """From the line of a record, as it is handed out, to its tensors; numbers in the model's type.

    What it gives raises `RecordError`.
    """
    load, dtype = make_loader(spec.input), getattr(torch, spec.model.dtype)

    def sample(line: str | bytes) -> Sample:
        tensors = preparer.sample(load(json.loads(line)))
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    return sample


def shapes_to_json(shapes: dict[str, InputShape]) -> list[Any]:
    return [[name, list(shape.shape), shape.dtype, shape.longest] for name, shape in shapes.items()]


def shapes_from_json(entries: list[Any]) -> dict[str, InputShape]:
    return {name: InputShape(tuple(shape), dtype, longest) for name, shape, dtype, longest in entries}
