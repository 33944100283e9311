"""The job file: YAML in, a frozen and validated `JobSpec` out.

Every key is a field of one of the dataclasses below; its type and metadata are its rules. There is no
second list of keys.
"""

import dataclasses
import functools
import hashlib
import json
import math
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
FAKE: Literal["fake"] = "fake"
_UNIONS = (types.UnionType, typing.Union)
_LONGEST_NAME = 40  # that a message shows as it is: a record may give any


def rule(
    default: Any = dataclasses.MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    about: str = "",
) -> Any:
    """A field of a dataclass that `build` checks: its default, if it has one, the least and the most it may be, and
    what the schema and the documents say about it, in Markdown."""
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum, "about": about})


@dataclass(frozen=True)
class ModelSpec:
    path: str = rule(about="What to run, see below.")
    task: Literal["generate", "score", "embed", "classify", "forward"] = rule(
        "generate",
        about=(
            "What to compute: the continuation of each record, the log-likelihood of given continuations, a vector, "
            "the best labels, or whatever the model gives. The first two need a decoder."
        ),
    )
    weights: str | Literal["auto", "fake"] = rule(
        AUTO,
        about=(
            "Weights of a factory's model: `.safetensors`, or a state dict in `.pt` or `.pth`. `auto`: those that the"
            " factory or the directory gives. `fake`: random ones, for speed and memory of a model of which there is "
            "no more than `config.json` or a factory; results mean nothing."
        ),
    )
    dtype: Literal["float32", "bfloat16", "float16"] = rule(
        "float32",
        about="Type of weights, activations and KV cache.",
    )
    quantize: Literal["none", "int8"] = rule(
        "none",
        about=(
            "`int8`: linear layers and embeddings are held in int8 and multiplied in int8, with scales for each row "
            "of activations or groups of its inputs; needs `model.dtype: float32` and a CPU. On x86 without VNNI, "
            "activations have about 7 bits."
        ),
    )
    kernels: Literal["auto", "torch"] = rule(
        "auto",
        about=(
            "`auto`: a decoder in float32 on a CPU uses kernels that the machine's C compiler makes at their first use "
            "(they stay in `~/.cache/mpinfer`), torch's where there is no compiler. `torch`: torch's."
        ),
    )
    device: Literal["auto", "cpu", "cuda"] = rule(
        "auto",
        about="`auto`: this rank's GPU where torch sees one, else the CPU.",
    )
    prepare: str | Auto = rule(
        AUTO,
        about=(
            "`package.module:function` that makes tensors of a record: from a dict of its fields to a dict of tensors"
            " or arrays by the model's input names, for one record. `auto`: the tokenizer, image processor or feature"
            " extractor of the model directory; else sections `images` and `audio`."
        ),
    )
    trust: bool = rule(
        False,
        about="Run code and unpickle objects that come with a model. Without it both are refused.",
    )


InputFormat = Literal[
    "jsonl", "openai-batch", "csv", "parquet", "images", "audio", "npy", "npz", "safetensors", "dataset"
]


@dataclass(frozen=True)
class InputSpec:
    path: str = rule(about="The records: a file, a folder, or `package.module:factory` of a dataset.")
    format: InputFormat | Auto = rule(
        AUTO,
        about=(
            "`auto`: by the suffix, or by what a folder holds. `openai-batch`: a request a line, see [OpenAI Batch "
            "files](openai-batch.md)."
        ),
    )
    limit: int | Auto = rule(
        AUTO,
        minimum=1,
        about="Only so many records, from the beginning; for a trial. `auto`: all.",
    )
    columns: tuple[str, ...] = rule(
        (),
        about=(
            "Of a table or of JSON objects, `field=column`: what each field of a record is called there. None: every "
            "column is the field of its name."
        ),
    )


@dataclass(frozen=True)
class OutputSpec:
    path: str = rule(
        "out",
        about="Directory of the results, made if need be, for its user alone (`chmod` shares it).",
    )
    responses: str | Auto = rule(
        AUTO,
        about=(
            "With `input.format: openai-batch`, the file of the responses. `auto`: `responses.jsonl` in `output.path`."
        ),
    )
    arrays: Literal["inline", "npy"] | Auto = rule(
        AUTO,
        about=(
            "Where arrays go: into the results as lists, or to files in `arrays/` that the ranks write themselves; a "
            'result then has `{"file", "row"}`. `auto`: `npy` for `forward`, else `inline`. A decoder\'s are always '
            "inline."
        ),
    )
    trace: bool = rule(
        True,
        about=(
            "Whether ranks remember their phases and messages, the first and the last some thousands, for `trace.json`."
        ),
    )


@dataclass(frozen=True)
class ParallelSpec:
    replicas: int | Auto = rule(
        AUTO,
        minimum=1,
        about="Copies of the model, each with its own records.",
    )
    stages: int | Auto = rule(
        AUTO,
        minimum=1,
        about="Pipeline stages of a copy.",
    )
    shards: int | Auto = rule(
        AUTO,
        minimum=1,
        about=(
            "Tensor-parallel slices of a stage, on one node; at most as many as there are heads (of keys and values)."
            " What of a model is divided: [limits](limits.md#models)."
        ),
    )
    micro_batch: int | Auto = rule(
        AUTO,
        minimum=1,
        about=(
            "Sequences or records in a group. `auto`: the records over all groups, at most 64 sequences, or the batch"
            " that measures fastest."
        ),
    )
    in_flight: int | Auto = rule(
        AUTO,
        minimum=1,
        about=(
            "Groups of a replica. The least: as many as stages, or as many of these as have a core at the same time "
            "where ranks outnumber cores. `auto`: that or one more. Two for each stage of a model that is no decoder."
        ),
    )
    dispatch: Literal["dynamic", "static"] = rule(
        "dynamic",
        about=(
            "`dynamic`: replicas ask for records, and what one is stuck with is done by another. `static`: each "
            "computes its even share, whatever its pace; for comparison."
        ),
    )
    cluster: str | Auto = rule(
        AUTO,
        about=(
            "A [file that describes the ranks](cluster-file.md): their memory, speeds and links. `auto`: they are "
            "measured."
        ),
    )
    memory_limit_gb: float | Auto = rule(
        AUTO,
        minimum=0,
        about="Most memory that a rank plans with, in 10^9 bytes. `auto`: its share of its node's.",
    )


@dataclass(frozen=True)
class SamplingSpec:
    """How tokens are chosen and when a record ends: what a record may say for itself, in its own `generate`."""

    max_new_tokens: int = rule(
        64,
        minimum=1,
        about="Most new tokens of a record.",
    )
    min_new_tokens: int = rule(
        0,
        minimum=0,
        about="No stop token is chosen before this many.",
    )
    temperature: float = rule(
        0.0,
        minimum=0,
        about="0: greedy decoding. Above: sampling.",
    )
    top_k: int = rule(
        0,
        minimum=0,
        about="Sample from this many best tokens. 0: from all.",
    )
    top_p: float = rule(
        1.0,
        minimum=0,
        maximum=1,
        about="Sample from the fewest best tokens that together are this probable; above 0.",
    )
    min_p: float = rule(
        0.0,
        minimum=0,
        maximum=1,
        about="Sample from tokens at least this probable, as a fraction of the best one's probability.",
    )
    repetition_penalty: float = rule(
        1.0,
        minimum=0.01,
        about="Above 1, tokens of the prompt and the text so far become less probable.",
    )
    stop: tuple[str, ...] = rule(
        (),
        about="End at any of these strings; the text ends before it. One alone needs no list.",
    )
    stop_token_ids: tuple[int, ...] = rule(
        (),
        minimum=0,
        about="End at any of these tokens, as at the model's own stop tokens.",
    )
    n: int = rule(
        1,
        minimum=1,
        about="Samples of each record; more than one needs a temperature above 0.",
    )
    logprobs: int | Literal["none"] = rule(
        "none",
        minimum=0,
        about=(
            "Report the log-probability of each new token, and of this many best ones. They are the model's own, "
            "before temperature and filters."
        ),
    )
    seed: int = rule(
        0,
        about=(
            "Random numbers depend on it, the record's id, the sample and the position only, so results do not depend"
            " on the layout. A record's own seed takes the place of its id, too."
        ),
    )

    @property
    def needs_logits(self) -> bool:
        """Whether choosing a token takes more than knowing the best one."""
        penalized = self.repetition_penalty != 1.0 or self.min_new_tokens > 0
        return self.temperature > 0 or penalized or self.logprobs != "none"


@dataclass(frozen=True)
class GenerateSpec(SamplingSpec):
    max_length: int | Auto = rule(
        AUTO,
        minimum=2,
        about="Most tokens of a record, prompt and new. `auto`: the model's own limit, which also caps a larger value.",
    )
    step_tokens: int = rule(
        256,
        minimum=1,
        about=(
            "Most tokens, pieces of prompts included, in one step of a group. Raised to `micro_batch` when that is "
            "larger."
        ),
    )
    kv_cache_gb: float | Auto = rule(
        AUTO,
        minimum=0,
        about=(
            "Most memory of a rank's keys and values, in 10^9 bytes. When it is short, sequences wait, or give their "
            "place up and are computed again. `auto`: 85 % of the rank's memory, less its weights."
        ),
    )


@dataclass(frozen=True)
class EmbedSpec:
    pooling: Literal["mean", "last", "first"] | Auto = rule(
        AUTO,
        about=(
            "Of the final hidden states: the mean of all tokens', the last token's, or (not for decoders) the first "
            "one's. `auto`: what sentence-transformers' file in the directory says, else the mean. A factory's model "
            "pools by itself."
        ),
    )
    normalize: bool = rule(
        True,
        about="Scale vectors to length 1.",
    )


@dataclass(frozen=True)
class ClassifySpec:
    top_k: int = rule(
        5,
        minimum=1,
        about="Best labels of a record.",
    )
    labels: str | Auto = rule(
        AUTO,
        about="File of names: a line each, or JSON. `auto`: those in `config.json`, else numbers.",
    )


@dataclass(frozen=True)
class ImagesSpec:
    """How images become tensors where the model has no processor of its own."""

    resize: int = rule(
        256,
        minimum=1,
        about="Of the shorter side, in pixels.",
    )
    crop: int = rule(
        224,
        minimum=1,
        about="Square from the middle, in pixels.",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = rule(
        "bilinear",
        about="How it is resized.",
    )
    mean: tuple[float, ...] = rule(
        (0.485, 0.456, 0.406),
        about="Subtracted from values between 0 and 1, by channel; one number makes images gray.",
    )
    std: tuple[float, ...] = rule(
        (0.229, 0.224, 0.225),
        about="Divides what is left.",
    )


@dataclass(frozen=True)
class AudioSpec:
    sample_rate: int | Auto = rule(
        AUTO,
        minimum=1,
        about="Hz that samples are brought to. `auto`: the processor's, or 16,000.",
    )
    max_seconds: float = rule(
        30.0,
        minimum=0,
        about="Longer records are errors.",
    )


Wire = Literal["none", "bf16", "fp16", "int8"]


@dataclass(frozen=True)
class TransportSpec:
    wire: Wire = rule(
        "none",
        about=(
            "How activations travel between stages. `none`: as they are. The others lose some, to send a half or a "
            "quarter of float32: `bf16` up to 1/256 of a number; `fp16` 1/2048, and numbers above 65,504 become "
            "infinite; `int8` 1/254 of the largest number of a token (of an image: of a row, or of a pixel's "
            "channels). Token ids, samples and logits travel as they are."
        ),
    )
    blocking: bool = rule(
        False,
        about="Wait for each send before going on; for comparison.",
    )
    progress: Literal["points", "thread", "library"] = rule(
        "points",
        about=(
            "Who moves messages while a stage computes. `points`: the stage calls MPI before each layer. `thread`: a "
            "thread does, too, every 0.2 ms. `library`: the MPI library does, too; it must have been told so before "
            "the launch, by `OMPI_MCA_btl_tcp_progress_thread=1` (Open MPI) or `MPIR_CVAR_ASYNC_PROGRESS=1` (MPICH) "
            "in the environment of all ranks."
        ),
    )


@dataclass(frozen=True)
class StopSpec:
    drain_limit_s: float = rule(
        20.0,
        minimum=0,
        about=(
            "After SIGTERM, SIGINT or SIGUSR1, how long records that have begun may take to finish; then the run ends"
            " without them, with exit code 4 in any case. A second signal, a second later, ends it at once."
        ),
    )


@dataclass(frozen=True)
class WatchdogSpec:
    timeout_s: float = rule(
        60.0,
        minimum=0,
        about=(
            "When nothing has moved on any rank for so long, every rank says what it waits for, and the run ends with"
            " exit code 3. Raised to ten times the longest step as timed, and before the loop ten times as long. `0`:"
            " never."
        ),
    )


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


class _Loader(yaml.SafeLoader):
    """Refuses mappings that have a key twice, of which YAML would forget the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"the key {reprlib.repr(key)} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise SpecError(f"{where}: not usable YAML (nested too deeply); correct it") from None
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
            raise SpecError(f"--set {override}: {section!r} is not a section; valid keys are {', '.join(valid_keys())}")
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
                values[name] = build(section, {} if tree.get(name) is None else tree[name], key + ".", missing_fix)
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


def _check(key: str, value: Any, hint: Any, rules: Mapping[str, Any], missing_fix: str = _MISSING_FIX) -> Any:
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
        if isinstance(value, float) and not math.isfinite(value):
            kind = "number" if math.isnan(value) else "finite number"
            raise SpecError(f"{key}={value!r}: is not a {kind}; correct the value")
        return value
    allowed = [kind.__name__ for kind in kinds] + [repr(choice) for choice in choices]
    raise SpecError(f"{key}={reprlib.repr(value)}: must be {' or '.join(allowed)}; correct the value")


def valid_keys() -> list[str]:
    """Every key of a job file, as `--set` takes it."""
    hints = typing.get_type_hints(JobSpec)
    return [f"{name}.{f.name}" for name in hints for f in dataclasses.fields(hints[name])]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
