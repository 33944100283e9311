"""The tables of job-file.md are made of the spec: `python docs/tables.py` writes them anew, and a test compares."""

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any, Literal

from mpinfer.spec import JobSpec

PAGE = Path(__file__).with_name("job-file.md")
_HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def with_tables(text: str) -> str:
    """The page with the table of each section as the spec has it; what stands around them stays."""
    for section, cls in typing.get_type_hints(JobSpec).items():
        # Below the section's heading, and not beyond the next one.
        table = re.search(rf"^## {section}\n(?:(?!## ).*\n)*?{re.escape(_HEAD)}((?:\|.*\n)*)", text, re.MULTILINE)
        if table is None:
            raise SystemExit(f"{PAGE}: no heading '## {section}' with a table below it; add both")
        text = text[: table.start(1)] + _rows(section, cls) + text[table.end(1) :]
    return text


def _rows(section: str, cls: Any) -> str:
    hints = typing.get_type_hints(cls)
    return "".join(
        f"| `{section}.{field.name}` | {_kind(hints[field.name], field.metadata)} | {_default(field.default)} "
        f"| {field.metadata['about']} |\n"
        for field in dataclasses.fields(cls)
    )


def _kind(hint: Any, rules: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"list of {_TYPES[typing.get_args(hint)[0]]}s"
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if options := typing.get_args(hint):
        return ", ".join(_kind(option, rules) for option in options)
    limits = {"from": rules["minimum"], "to": rules["maximum"]}
    return " ".join([_TYPES[hint], *(f"{word} {limit}" for word, limit in limits.items() if limit is not None)])


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
