"""The JSON Schema of job files, made of the dataclasses of `spec.py`: editors complete and check keys by it."""

import dataclasses
import re
import types
import typing
from typing import Any, Literal

from mpinfer.spec import JobSpec

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def job_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12, of a job file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mpinfer job file",
        **_section(JobSpec),
    }


def _section(cls: Any) -> dict[str, Any]:
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [f.name for f in fields if f.default is dataclasses.MISSING],
        "properties": {
            f.name: _optional(hints[f.name]) if dataclasses.is_dataclass(hints[f.name]) else _key(f, hints[f.name])
            for f in fields
        },
    }


def _optional(cls: Any) -> dict[str, Any]:
    """A section; one in which nothing is required may be empty, which YAML reads as null."""
    section = _section(cls)
    return section if section["required"] else {**section, "type": ["object", "null"]}


def _key(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    schema = _values(hint, field.metadata)
    schema["description"] = re.sub(r"\[(.+?)\]\(.+?\)", r"\1", field.metadata["about"])
    if field.default is not dataclasses.MISSING:
        schema["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
    return schema


def _values(hint: Any, rules: Any) -> dict[str, Any]:
    if typing.get_origin(hint) is tuple:
        item = _values(typing.get_args(hint)[0], rules)
        return {"anyOf": [item, {"type": "array", "items": item}]}  # one alone needs no brackets
    if typing.get_origin(hint) is Literal:
        return {"enum": list(typing.get_args(hint))}
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return {"anyOf": [_values(option, rules) for option in typing.get_args(hint)]}
    schema: dict[str, Any] = {"type": _TYPES[hint]}
    if hint is str:
        schema["minLength"] = 1
    limits = {name: rules[name] for name in ("minimum", "maximum") if rules.get(name) is not None}
    return {**schema, **limits}
