"""The first look at the records of a model of any kind: what its inputs are like."""

import json
from typing import Any

from mpinfer.errors import InputError, RecordError
from mpinfer.forward.prepare import make_preparer
from mpinfer.models.program import InputShape
from mpinfer.records.inputs import Input
from mpinfer.records.loader import make_loader
from mpinfer.spec import JobSpec

_TRIES = 100  # records


def input_shapes(spec: JobSpec, records: Input) -> dict[str, InputShape]:
    """The shapes of a record's tensors, by the first record that can be prepared: the model is traced with them.

    Raises `InputError` when none of the first 100 can be.
    """
    load, preparer = make_loader(spec.input), make_preparer(spec)
    problem: RecordError | None = None
    tried = [index for index in range(min(len(records), _TRIES)) if index not in records.refused]
    for index in tried:
        try:
            sample = preparer.sample(load(json.loads(records.line(index))))
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


def shapes_to_json(shapes: dict[str, InputShape]) -> list[Any]:
    return [[name, list(shape.shape), shape.dtype, shape.longest] for name, shape in shapes.items()]


def shapes_from_json(entries: list[Any]) -> dict[str, InputShape]:
    return {name: InputShape(tuple(shape), dtype, longest) for name, shape, dtype, longest in entries}
