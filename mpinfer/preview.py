"""What can be known of a job without MPI and without weights: its model's shape, its work, its plan."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

from mpinfer.cluster.binding import allowed_cores
from mpinfer.cluster.doctor import local_memory_bytes
from mpinfer.engine import ENGINES
from mpinfer.errors import ExitCode, PlanError, SpecError
from mpinfer.models.checkpoint import Kind, check_model
from mpinfer.plan.planner import describe, make_plan
from mpinfer.records.inputs import Input, input_format, open_input
from mpinfer.records.rules import RecordRules
from mpinfer.spec import AUTO, InputFormat, JobSpec, load_spec


@dataclasses.dataclass(frozen=True)
class FirstLook:
    """All that can be known, and refused, of a job without torch."""

    spec: JobSpec
    kind: Kind
    records: Input
    size: dict[str, int]  # of the input
    needs_logits: bool

    @classmethod
    def at(cls, spec: JobSpec) -> "FirstLook":
        """Raises `MpinferError` for a model or an input that cannot be used."""
        spec = _without_gguf(spec)
        kind = check_model(spec.model)
        found = _check_format(spec, kind)
        spec = dataclasses.replace(spec, input=dataclasses.replace(spec.input, format=found))  # looked for once
        rules = RecordRules(spec, decodes=kind == "decoder")
        records = open_input(spec.input, rules.problem, rules.convert)
        size = {"records": len(records), "record_bytes": records.total_bytes, "new_tokens": rules.new_tokens}
        return cls(spec, kind, records, size, rules.needs_logits)


def _check_format(spec: JobSpec, kind: Kind) -> InputFormat:
    """The input's format; raises `SpecError` for one that this kind of model does not take."""
    formats = ("jsonl", "openai-batch", "csv") if kind == "decoder" else get_args(InputFormat)
    found = input_format(spec.input)
    if found not in formats:
        raise SpecError(
            f"input.format={found}: a decoder takes text, in {', '.join(formats)}; convert "
            f"{spec.input.path} to one of these"
        )
    if found == "openai-batch" and kind != "decoder":
        raise SpecError(
            f"input.format={found}: answers come from decoders, and {spec.model.path} is none; use jsonl with "
            f"one text a record"
        )
    return found


def memory_limit(spec: JobSpec, measured_bytes: int) -> int:
    """Bytes that a rank may plan with."""
    given = spec.parallel.memory_limit_gb
    return measured_bytes if given == AUTO else min(measured_bytes, int(given * 1e9))


def _without_gguf(spec: JobSpec) -> JobSpec:
    """The job on the directory that its GGUF file was converted to, beside it; made now if it is not there."""
    source = Path(spec.model.path)
    if source.suffix != ".gguf":
        return spec
    directory = source.with_suffix(".mpinfer")
    if not (directory / "config.json").is_file():
        from mpinfer.models.convert import convert

        convert(source, directory)
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, path=str(directory)))


def plan_job(job: str, overrides: list[str], ranks: int, nodes: int, as_json: bool) -> ExitCode:
    """Print the layout a job would get on `ranks` ranks over `nodes` nodes like this one. No MPI, no weights.

    Raises `MpinferError` when the job cannot be planned.
    """
    if ranks < 1 or nodes < 1 or ranks < nodes:
        raise PlanError(f"--ranks {ranks} --nodes {nodes}: at least one rank on each node; raise --ranks")
    look = FirstLook.at(load_spec(job, overrides))
    spec, engine_class = look.spec, ENGINES[look.kind]
    engine = engine_class(spec, engine_class.inputs(spec, look.records))
    model, work = engine.summary(), engine.workload(**look.size)
    ranks_per_node = -(-ranks // nodes)
    memory_bytes, cores = local_memory_bytes() // ranks_per_node, len(allowed_cores()) / ranks_per_node
    memories = [memory_limit(spec, memory_bytes)] * ranks
    plan = make_plan(spec.parallel, model, work, memories, engine.kv_cache_bytes, cores)
    print(json.dumps(plan.to_dict(), indent=2) if as_json else describe(plan, model, work))
    return ExitCode.COMPLETE
