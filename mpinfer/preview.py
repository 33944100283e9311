"""What can be known of a job without MPI and without weights: its model's shape, its work, its plan."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from mpinfer.cluster.describe import load_cluster, local_cluster
from mpinfer.engine import ENGINES
from mpinfer.errors import ExitCode, SpecError
from mpinfer.models.checkpoint import Kind, check_model
from mpinfer.plan.block import ModelSummary
from mpinfer.plan.cost import reckoned
from mpinfer.plan.machine import Machine
from mpinfer.plan.planner import Choice, describe, make_plan
from mpinfer.records.inputs import Input, input_format, open_input
from mpinfer.records.rules import RecordRules
from mpinfer.spec import AUTO, InputFormat, JobSpec, load_spec

_MEASURING_S = 1.0  # of the work of a model on this machine


@dataclass(frozen=True)
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
        spec = replace(spec, input=replace(spec.input, format=found))  # looked for once
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
    return replace(spec, model=replace(spec.model, path=str(directory)))


def plan_job(
    job: str, overrides: list[str], ranks: int, nodes: int | None, cluster: str | None, as_json: bool
) -> ExitCode:
    """Print the layout a job would get on `ranks` ranks over `nodes` nodes like this one, or on a described cluster. No
    MPI, no weights but those of a layer that is timed here, where the cluster's file does not say what a rank computes.

    Raises `MpinferError` when the job cannot be planned.
    """
    given = [*overrides, *([f"parallel.cluster={json.dumps(cluster)}"] if cluster else [])]
    look = FirstLook.at(load_spec(job, given))
    described = look.spec.parallel.cluster
    machine = local_cluster(ranks, nodes or 1) if described == AUTO else load_cluster(described, ranks, nodes)
    choice, model = plan_on(look, machine)
    print(json.dumps(choice.to_dict(), indent=2) if as_json else describe(choice, model))
    return ExitCode.COMPLETE


def plan_on(look: FirstLook, machine: Machine) -> tuple[Choice, ModelSummary]:
    """The layout that a job would get there, by what its work costs on this machine or on the one described. Raises
    `MpinferError`."""
    spec, engine_class = look.spec, ENGINES[look.kind]
    seats = (replace(seat, memory_bytes=memory_limit(spec, seat.memory_bytes)) for seat in machine.seats)
    machine = replace(machine, seats=tuple(seats))
    engine = engine_class(spec, engine_class.inputs(spec, look.records))
    estimator, model = engine.estimator(look.records, look.needs_logits), engine.summary()
    if machine.hardware is not None and model.decodes:
        rates = reckoned(model, machine.hardware)
    else:
        print("mpinfer: timing parts of the model on this machine", file=sys.stderr, flush=True)
        rates, _ = engine.rates([(1.0, engine.measure("cpu", _MEASURING_S))])
    records = len(look.records)
    return make_plan(spec.parallel, model, machine, rates, estimator, records, engine.kv_cache_bytes), model
