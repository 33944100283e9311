"""The job file: YAML in, a frozen and validated `JobSpec` out.

Every key is a field of one of the dataclasses below; its type and metadata are its rules. There is no
second list of keys.
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mpinfer.errors import SpecError

AUTO: Literal["auto"] = "auto"
Auto = Literal["auto"]


def _rule(default: Any = dataclasses.MISSING, *, minimum: float | None = None) -> Any:
    return field(default=default, metadata={"minimum": minimum})


@dataclass(frozen=True)
class ModelSpec:
    path: str
    task: Literal["generate"] = "generate"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["none", "int8"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class InputSpec:
    path: str
    format: Literal["auto", "jsonl"] = "auto"


@dataclass(frozen=True)
class OutputSpec:
    path: str = "out"


@dataclass(frozen=True)
class ParallelSpec:
    replicas: int | Auto = _rule(AUTO, minimum=1)
    stages: int | Auto = _rule(AUTO, minimum=1)
    shards: Literal[1, "auto"] = AUTO
    micro_batch: int | Auto = _rule(AUTO, minimum=1)  # sequences in a group
    in_flight: int | Auto = _rule(AUTO, minimum=1)  # groups in flight in a replica


@dataclass(frozen=True)
class GenerateSpec:
    max_new_tokens: int = _rule(64, minimum=1)
    temperature: float = 0.0
    max_length: int | Auto = _rule(AUTO, minimum=2)  # prompt and new tokens; auto: the model's own limit
    step_tokens: int = _rule(256, minimum=1)  # most tokens, prefill chunks included, in one step of a group


@dataclass(frozen=True)
class TransportSpec:
    wire: Literal["none"] = "none"
    blocking: bool = False


@dataclass(frozen=True)
class JobSpec:
    """One job. `fingerprint` names what it computes, whatever the layout it runs in."""

    model: ModelSpec
    input: InputSpec
    output: OutputSpec = OutputSpec()
    parallel: ParallelSpec = ParallelSpec()
    generate: GenerateSpec = GenerateSpec()
    transport: TransportSpec = TransportSpec()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """The keys that decide the results: a resumed run must agree with the journal on all of them."""
        generate = dataclasses.asdict(self.generate)
        del generate["step_tokens"]
        return {
            "model.path": str(Path(self.model.path).resolve()),
            "model.task": self.model.task,
            "model.dtype": self.model.dtype,
            "model.quantize": self.model.quantize,
            **{f"generate.{key}": value for key, value in generate.items()},
        }

    def fingerprint(self) -> str:
        """sha256 over `identity`, in hex."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def load_spec(path: str | Path, overrides: Sequence[str] = (), output: str | None = None) -> JobSpec:
    """Read a job file and apply `key.path=value` overrides (values are YAML).

    Raises `SpecError` when the file cannot be read, is not a mapping, or breaks a rule.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"{path}: the job file cannot be read ({_reason(error)}); give the path of a YAML file"
        ) from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise SpecError(
            f"{path}: a job file is a mapping of sections, not a {type(tree).__name__}; start with 'model:'"
        )
    for override in overrides:
        _override(tree, override)
    if output is not None:
        _override(tree, f"output.path={json.dumps(output)}")
    return spec_from_dict(tree)


def spec_from_dict(tree: dict[str, Any]) -> JobSpec:
    """Validate a nested mapping into a `JobSpec`; raises `SpecError`."""
    spec = _build(JobSpec, tree, "")
    if spec.generate.temperature != 0.0:
        raise SpecError(f"generate.temperature={spec.generate.temperature}: only greedy decoding is built; use 0.0")
    if spec.model.quantize == "int8" and spec.model.dtype != "float32":
        raise SpecError(f"model.dtype={spec.model.dtype!r}: model.quantize=int8 computes in float32; use float32")
    return spec


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise SpecError(f"{where}: not valid YAML{place} ({problem}); correct that line") from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SpecError(f"--set {override}: an override is key.path=value; write for example --set parallel.stages=2")
    *sections, name = key.split(".")
    node: Any = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise SpecError(f"--set {override}: {section!r} is not a section; valid keys are {_valid_keys()}")
    node[name] = _parse_yaml(text, f"--set {key}")


def _build(cls: Any, tree: Any, prefix: str) -> Any:
    """Build one (nested) dataclass from a mapping, checking names, types and minima on the way."""
    if not isinstance(tree, dict):
        raise SpecError(f"{prefix.rstrip('.')}={tree!r}: a section is a mapping of keys; indent its keys below it")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in tree:
        if name not in fields:
            raise SpecError(f"{prefix}{name}: unknown key; valid keys here are {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, f in fields.items():
        key = prefix + name
        if dataclasses.is_dataclass(hints[name]):
            if name in tree or f.default is dataclasses.MISSING:
                values[name] = _build(hints[name], tree.get(name) or {}, key + ".")
        elif name in tree:
            values[name] = _check(key, tree[name], hints[name], f.metadata.get("minimum"))
        elif f.default is dataclasses.MISSING:
            raise SpecError(f"{key}: a required key is missing; add it to the job file or pass --set {key}=...")
    return cls(**values)


def _check(key: str, value: Any, hint: Any, minimum: float | None) -> Any:
    kinds: list[type] = []
    choices: list[Any] = []
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    for option in typing.get_args(hint) if union else (hint,):
        if typing.get_origin(option) is Literal:
            choices.extend(typing.get_args(option))
        else:
            kinds.append(option)
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) in kinds:
        if minimum is not None and value < minimum:
            raise SpecError(f"{key}={value!r}: must be at least {minimum:g}; raise it")
        if value == "":
            raise SpecError(f"{key}='': must not be empty; give a value")
        return value
    allowed = [kind.__name__ for kind in kinds] + [repr(choice) for choice in choices]
    raise SpecError(f"{key}={value!r}: must be {' or '.join(allowed)}; correct the value")


def _valid_keys() -> str:
    hints = typing.get_type_hints(JobSpec)
    return ", ".join(f"{name}.{f.name}" for name in hints for f in dataclasses.fields(hints[name]))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
