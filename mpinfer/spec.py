"""The job file: YAML in, a frozen and validated `JobSpec` out.

Every key is a field of one of the dataclasses below; its type and metadata are its rules. There is no
second list of keys.
"""

import dataclasses
import functools
import hashlib
import json
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mpinfer.errors import SpecError

AUTO: Literal["auto"] = "auto"
Auto = Literal["auto"]
_UNIONS = (types.UnionType, typing.Union)
_LONGEST_NAME = 40  # that a message shows as it is: a record may give any


def rule(default: Any = dataclasses.MISSING, *, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A field of a dataclass that `build` checks: its default, if it has one, and the least and the most it may be."""
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


@dataclass(frozen=True)
class ModelSpec:
    path: str  # a Hugging Face directory, package.module:factory, a .pt2 program or a .gguf file
    task: Literal["generate", "score", "embed", "classify", "forward"] = "generate"
    weights: str | Auto = AUTO  # of a factory's model; auto: a directory's own, or what the factory gives
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["none", "int8"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    prepare: str | Auto = (
        AUTO  # package.module:function, from a record's fields to tensors; auto: the model's processor
    )
    trust: bool = False  # run code and unpickle objects that come with the model


InputFormat = Literal[
    "jsonl", "openai-batch", "csv", "parquet", "images", "audio", "npy", "npz", "safetensors", "dataset"
]


@dataclass(frozen=True)
class InputSpec:
    path: str
    format: InputFormat | Auto = AUTO  # auto: by the suffix, or by what a folder holds
    columns: tuple[str, ...] = ()  # of a table, as field=column; none: every column is the field of its name


@dataclass(frozen=True)
class OutputSpec:
    path: str = "out"
    responses: str | Auto = AUTO  # the file for them, where the input's format has responses; auto: one in `path`
    arrays: Literal["inline", "npy"] | Auto = AUTO  # auto: npy for forward, else inline


@dataclass(frozen=True)
class ParallelSpec:
    replicas: int | Auto = rule(AUTO, minimum=1)
    stages: int | Auto = rule(AUTO, minimum=1)
    shards: int | Auto = rule(AUTO, minimum=1)
    micro_batch: int | Auto = rule(AUTO, minimum=1)  # sequences in a group
    in_flight: int | Auto = rule(AUTO, minimum=1)  # groups in flight in a replica
    cluster: str | Auto = AUTO  # file that describes the ranks; auto: they are measured
    memory_limit_gb: float | Auto = rule(AUTO, minimum=0)  # of a rank, in 10**9 bytes; auto: its share of its node's


@dataclass(frozen=True)
class SamplingSpec:
    """How tokens are chosen and when a record ends: what a record may say for itself, in its own `generate`."""

    max_new_tokens: int = rule(64, minimum=1)
    min_new_tokens: int = rule(0, minimum=0)
    temperature: float = rule(0.0, minimum=0)  # 0: the best token
    top_k: int = rule(0, minimum=0)  # 0: all
    top_p: float = rule(1.0, minimum=0, maximum=1)
    min_p: float = rule(0.0, minimum=0, maximum=1)
    repetition_penalty: float = rule(1.0, minimum=0.01)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = rule((), minimum=0)
    n: int = rule(1, minimum=1)  # samples of a record
    logprobs: int | Literal["none"] = rule("none", minimum=0)  # best tokens to report beside the chosen one
    seed: int = 0

    @property
    def needs_logits(self) -> bool:
        """Whether choosing a token takes more than knowing the best one."""
        penalized = self.repetition_penalty != 1.0 or self.min_new_tokens > 0
        return self.temperature > 0 or penalized or self.logprobs != "none"


@dataclass(frozen=True)
class GenerateSpec(SamplingSpec):
    max_length: int | Auto = rule(AUTO, minimum=2)  # prompt and new tokens; auto: the model's own limit
    step_tokens: int = rule(256, minimum=1)  # most tokens, prefill chunks included, in one step of a group
    kv_cache_gb: float | Auto = rule(AUTO, minimum=0)  # of a rank, in 10**9 bytes; auto: what weights leave


@dataclass(frozen=True)
class EmbedSpec:
    pooling: Literal["mean", "last", "first"] | Auto = AUTO  # of final hidden states; auto: the model's rule, or mean
    normalize: bool = True  # to length 1


@dataclass(frozen=True)
class ClassifySpec:
    top_k: int = rule(5, minimum=1)  # best labels of a record
    labels: str | Auto = AUTO  # file of names: a line each, or a JSON list; auto: the model's own, else numbers


@dataclass(frozen=True)
class ImagesSpec:
    """How images become tensors where the model has no processor of its own."""

    resize: int = rule(256, minimum=1)  # of the shorter side, in pixels
    crop: int = rule(224, minimum=1)  # centred square, in pixels
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # by channel, of values from 0 to 1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class AudioSpec:
    sample_rate: int | Auto = rule(AUTO, minimum=1)  # Hz that samples are brought to; auto: the processor's, or 16000
    max_seconds: float = rule(30.0, minimum=0)  # longer records are refused


Wire = Literal["none", "bf16", "fp16", "int8"]


@dataclass(frozen=True)
class TransportSpec:
    wire: Wire = "none"  # how activations travel between stages; all but none lose some
    blocking: bool = False
    progress: Literal["points", "thread", "library"] = "points"  # who moves messages while a stage computes


@dataclass(frozen=True)
class StopSpec:
    drain_limit_s: float = rule(20.0, minimum=0)  # for work in hand after SIGTERM, SIGINT or SIGUSR1; then it is lost


@dataclass(frozen=True)
class WatchdogSpec:
    timeout_s: float = rule(60.0, minimum=0)  # that nothing may move for, in the whole world; 0: for ever


@dataclass(frozen=True)
class JobSpec:
    """One job. `fingerprint` names what it computes, whatever the layout it runs in."""

    model: ModelSpec
    input: InputSpec
    output: OutputSpec = OutputSpec()
    parallel: ParallelSpec = ParallelSpec()
    generate: GenerateSpec = GenerateSpec()
    embed: EmbedSpec = EmbedSpec()
    classify: ClassifySpec = ClassifySpec()
    images: ImagesSpec = ImagesSpec()
    audio: AudioSpec = AudioSpec()
    transport: TransportSpec = TransportSpec()
    stop: StopSpec = StopSpec()
    watchdog: WatchdogSpec = WatchdogSpec()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The keys that decide the results: a resumed run must agree with the journal on all of them."""
        names = ("generate", "embed", "classify", "images", "audio")
        sections: dict[str, Any] = {name: getattr(self, name) for name in names}
        layout = ("generate.step_tokens", "generate.kv_cache_gb")
        keys = {f"{name}.{key}": value for name in sections for key, value in asdict(sections[name]).items()}
        return {
            "model.path": str(Path(self.model.path).resolve()),
            "model.task": self.model.task,
            "model.dtype": self.model.dtype,
            "model.quantize": self.model.quantize,
            "model.weights": self.model.weights,
            "model.prepare": self.model.prepare,
            "input.columns": list(self.input.columns),
            "output.arrays": self.output.arrays,
            "transport.wire": self.transport.wire,
            **{key: list(v) if isinstance(v, tuple) else v for key, v in keys.items() if key not in layout},
        }

    def fingerprint(self) -> str:
        """sha256 over `identity`, in hex."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def arrays_in_files(spec: JobSpec) -> bool:
    """Whether arrays of results go to files of their own; else they are lists in the results."""
    return spec.output.arrays == "npy" or (spec.output.arrays == AUTO and spec.model.task == "forward")


def load_spec(path: str | Path, overrides: Sequence[str] = (), output: str | None = None) -> JobSpec:
    """Read a job file and apply `key.path=value` overrides (values are YAML).

    Raises `SpecError` when the file cannot be read, is not a mapping, or breaks a rule.
    """
    tree = read_mapping(path, "job file", "model")
    last = [] if output is None else [f"output.path={json.dumps(output)}"]
    return spec_from_dict(tree, [*overrides, *last])


def spec_from_dict(tree: dict[str, Any], overrides: Sequence[str] = ()) -> JobSpec:
    """Validate a nested mapping, with overrides put into it, into a `JobSpec`; raises `SpecError`."""
    for override in overrides:
        _override(tree, override)
    spec: JobSpec = build(JobSpec, tree, "")
    _check_sampling(spec.generate, "generate.")
    if spec.output.responses != AUTO and spec.input.format != "openai-batch":
        raise SpecError(
            f"output.responses={spec.output.responses!r}: input.format {spec.input.format} has no responses; leave it "
            "out, or set input.format to openai-batch"
        )
    if spec.model.quantize == "int8" and spec.model.dtype != "float32":
        raise SpecError(f"model.dtype={spec.model.dtype!r}: model.quantize=int8 computes in float32; use float32")
    return spec


def record_sampling(job: SamplingSpec, overrides: dict[str, Any]) -> SamplingSpec:
    """A record's own sampling: the job's, with the keys that its `generate` overrides. Raises `SpecError`."""
    given: SamplingSpec = build(SamplingSpec, overrides, "generate.")
    sources = {f.name: given if f.name in overrides else job for f in dataclasses.fields(SamplingSpec)}
    own = SamplingSpec(**{name: getattr(source, name) for name, source in sources.items()})
    _check_sampling(own, "generate.")
    return own


def _check_sampling(sampling: SamplingSpec, prefix: str) -> None:
    """Rules that concern two keys."""
    if sampling.n > 1 and sampling.temperature == 0:
        raise SpecError(f"{prefix}n={sampling.n}: greedy samples are all the same; raise {prefix}temperature above 0")
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise SpecError(
            f"{prefix}min_new_tokens={sampling.min_new_tokens}: above {prefix}max_new_tokens="
            f"{sampling.max_new_tokens}; lower it"
        )
    if sampling.top_p == 0:
        raise SpecError(f"{prefix}top_p=0: leaves no token to choose; use a value above 0, or temperature 0")


def read_mapping(path: str | Path, kind: str, first: str) -> dict[str, Any]:
    """The tree of a YAML file of a `kind`, which begins with the section `first`; an empty file is an empty tree.

    Raises `SpecError` when it cannot be read or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: the {kind} cannot be read ({_reason(error)}); give the path of a YAML file") from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SpecError(
            f"{path}: a {kind} is a mapping of sections, not a {type(tree).__name__}; start with '{first}:'"
        )
    return tree


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


_MISSING_FIX = "add it to the job file or pass --set {key}=..."


def build(cls: Any, tree: Any, prefix: str, missing_fix: str = _MISSING_FIX) -> Any:
    """Build a (nested) dataclass from a mapping, checking names, types and limits on the way.

    Messages put `prefix` before the name of a key; `missing_fix` says where a missing `key` goes. Raises `SpecError`.
    """
    if not isinstance(tree, dict):
        raise SpecError(f"{prefix.rstrip('.')}={tree!r}: a section is a mapping of keys; indent its keys below it")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in tree:
        if name not in fields:
            shown = (
                name
                if isinstance(name, str) and name.isidentifier() and len(name) < _LONGEST_NAME
                else reprlib.repr(name)
            )
            raise SpecError(f"{prefix}{shown}: unknown key; valid keys here are {', '.join(fields)}")
    hints = _hints(cls)
    values = {}
    for name, f in fields.items():
        key = prefix + name
        required = f.default is dataclasses.MISSING
        if section := _section(hints[name]):
            if name in tree or required:
                values[name] = build(section, tree.get(name) or {}, key + ".", missing_fix)
        elif name in tree:
            values[name] = _check(key, tree[name], hints[name], f.metadata, missing_fix)
        elif required:
            raise SpecError(f"{key}: a required key is missing; {missing_fix.format(key=key)}")
    return cls(**values)


def _section(hint: Any) -> Any:
    """The dataclass that a key of this type holds, or may hold; None where it holds values."""
    options = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    return next(filter(dataclasses.is_dataclass, options), None)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)  # slow, and every record with sampling of its own asks


def _check(key: str, value: Any, hint: Any, rules: Mapping[str, float | None], missing_fix: str = _MISSING_FIX) -> Any:
    kinds: list[Any] = []
    choices: list[Any] = []
    for option in typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,):
        if typing.get_origin(option) is Literal:
            choices.extend(typing.get_args(option))
        else:
            kinds.append(option)
    if typing.get_origin(hint) is tuple:
        (item, _) = typing.get_args(hint)
        values = value if isinstance(value, list | tuple) else [value]  # one alone needs no brackets
        if dataclasses.is_dataclass(item):
            return tuple(build(item, each, f"{key}[{n}].", missing_fix) for n, each in enumerate(values))
        return tuple(_check(key, each, item, rules) for each in values)
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) in kinds:
        minimum, maximum = rules.get("minimum"), rules.get("maximum")
        if minimum is not None and value < minimum:
            raise SpecError(f"{key}={value!r}: must be at least {minimum:g}; raise it")
        if maximum is not None and value > maximum:
            raise SpecError(f"{key}={value!r}: must be at most {maximum:g}; lower it")
        if value == "":
            raise SpecError(f"{key}='': must not be empty; give a value")
        if value != value:
            raise SpecError(f"{key}={value!r}: is not a number; correct the value")
        return value
    allowed = [kind.__name__ for kind in kinds] + [repr(choice) for choice in choices]
    raise SpecError(f"{key}={reprlib.repr(value)}: must be {' or '.join(allowed)}; correct the value")


def _valid_keys() -> str:
    hints = typing.get_type_hints(JobSpec)
    return ", ".join(f"{name}.{f.name}" for name in hints for f in dataclasses.fields(hints[name]))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
