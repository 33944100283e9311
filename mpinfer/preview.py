"""What can be known of a job without MPI and without weights: its model's shape, its work, its plan."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mpinfer.cluster.binding import allowed_cores
from mpinfer.cluster.doctor import local_memory_bytes
from mpinfer.errors import ExitCode, PlanError
from mpinfer.models.checkpoint import Checkpoint, check_model_directory
from mpinfer.plan.block import Workload
from mpinfer.plan.planner import describe, make_plan
from mpinfer.records.reader import JsonlInput
from mpinfer.records.rules import RecordRules
from mpinfer.spec import AUTO, JobSpec, load_spec

if TYPE_CHECKING:  # torch loads only once the cheap checks have passed
    from mpinfer.models.decoder import DecoderSkeleton

BYTES_PER_TOKEN = 4.0  # of a prompt, before it is tokenized


def workload(spec: JobSpec, records: int, record_bytes: int, new_tokens: int, max_length: int) -> Workload:
    """What is known of the work before the prompts are tokenized.

    `new_tokens`: the most that the records ask for; `max_length`: of a sequence, by the model.
    """
    prompts = record_bytes / BYTES_PER_TOKEN
    match spec.model.task:
        case "score":
            return Workload(records, prompts, 0.0, prompts)
        case "embed":
            return Workload(records, prompts, 0.0, 0.0)
    most = float(min(new_tokens, records * spec.generate.n * max_length))
    return Workload(records, prompts * spec.generate.n, most, most)


def kv_cache_bytes(spec: JobSpec) -> int | None:
    """What a rank's KV cache may take, if the job says."""
    given = spec.generate.kv_cache_gb
    return None if given == AUTO else int(given * 1e9)


def load_skeleton(spec: JobSpec) -> "DecoderSkeleton":
    """The job's model without weights; raises `ModelError`."""
    from mpinfer.models.decoder import DecoderSkeleton

    return DecoderSkeleton(Path(spec.model.path), spec.model.dtype, spec.model.quantize)


def plan_job(job: str, overrides: list[str], ranks: int, nodes: int, as_json: bool) -> ExitCode:
    """Print the layout a job would get on `ranks` ranks over `nodes` nodes like this one. No MPI, no weights.

    Raises `MpinferError` when the job cannot be planned.
    """
    if ranks < 1 or nodes < 1 or ranks < nodes:
        raise PlanError(f"--ranks {ranks} --nodes {nodes}: at least one rank on each node; raise --ranks")
    spec = load_spec(job, overrides)
    Checkpoint(check_model_directory(spec.model.path))
    rules = RecordRules(spec)
    records = JsonlInput(spec.input.path, rules.problem, rules.convert)
    skeleton = load_skeleton(spec)
    model = skeleton.summary(with_head=spec.model.task != "embed")
    work = workload(spec, len(records), records.total_bytes, rules.new_tokens, skeleton.max_length)
    ranks_per_node = -(-ranks // nodes)
    memory_bytes, cores = local_memory_bytes() // ranks_per_node, len(allowed_cores()) / ranks_per_node
    plan = make_plan(spec.parallel, model, work, [memory_bytes] * ranks, kv_cache_bytes(spec), cores)
    print(json.dumps(plan.to_dict(), indent=2) if as_json else describe(plan, model, work))
    return ExitCode.COMPLETE
