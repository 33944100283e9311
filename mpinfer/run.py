"""The composition root: one rank's life, from launch to exit code.

Every rank runs `run_job`; what a rank is gets decided once, by what is built for it.
"""

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpinfer.cluster.binding import Binding, allowed_cores, apply_binding, choose_binding, cpu_quota, physical_cores
from mpinfer.cluster.context import LaunchContext, check_world, read_context
from mpinfer.cluster.doctor import RankFacts, doctor_report, local_memory_bytes
from mpinfer.coordinator.dispatch import Coordinator
from mpinfer.coordinator.progress import Progress
from mpinfer.engine import ENGINES, Engine
from mpinfer.errors import ExitCode, LaunchError
from mpinfer.observe.report import Before, timing, timing_table
from mpinfer.plan.block import Workload
from mpinfer.plan.planner import Plan, describe, make_plan
from mpinfer.plan.predict import StepTimes, predict_wall_s
from mpinfer.preview import FirstLook, memory_limit
from mpinfer.records.files import write_atomically
from mpinfer.records.inputs import Input
from mpinfer.records.journal import Journal
from mpinfer.records.manifest import merge
from mpinfer.records.openai_batch import responses_file, write_responses
from mpinfer.spec import JobSpec, spec_from_dict
from mpinfer.transport.control import ACCOUNT, COORDINATOR
from mpinfer.transport.endpoint import (
    Agreed,
    Endpoint,
    agree,
    everywhere,
    install_abort_hook,
    library_version,
)
from mpinfer.version import VERSION

if TYPE_CHECKING:  # torch loads only once the cheap checks have passed and threads are bound
    from mpinfer.engine import Rank


@dataclass
class World:
    """This rank and its surroundings."""

    endpoint: Endpoint
    context: LaunchContext
    binding: Binding
    nodes: int
    local_rank: int
    local_size: int
    place: str = "at start-up"  # for messages; coordinates once there is a plan

    @property
    def is_coordinator(self) -> bool:
        return self.endpoint.rank == COORDINATOR

    @property
    def is_crowded(self) -> bool:
        """Whether ranks outnumber the cores that they share."""
        return self.local_size > len(self.binding.cores) > 1

    @property
    def cores_per_rank(self) -> float:
        """Below 1 where ranks share cores."""
        return len(self.binding.cores) / self.local_size if self.is_crowded else 1.0

    def say(self, text: str) -> None:
        """Log from rank 0."""
        if self.is_coordinator:
            print(f"mpinfer: {text}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return f"rank {self.endpoint.rank} node {self.context.node} {self.place}"


def join_world() -> World:
    """Find out where this rank is, check it against MPI, bind its threads.

    Raises `Agreed` when ranks cannot be bound, `LaunchError` when MPI's world is not the promised one.
    """
    context = read_context()
    endpoint = Endpoint()
    try:
        check_world(context, endpoint.rank, endpoint.size)
    except LaunchError:
        if context.rank != COORDINATOR:  # every rank finds the same; told once is enough
            sys.exit(ExitCode.BAD_INPUT)
        raise
    everyone = endpoint.all_gather([context.node, sorted(allowed_cores())])
    neighbours = [rank for rank, (node, _) in enumerate(everyone) if node == context.node]
    local_rank = neighbours.index(endpoint.rank)
    binding = everywhere(
        endpoint,
        lambda: choose_binding(
            [frozenset(everyone[rank][1]) for rank in neighbours],
            local_rank,
            os.environ,
            quota=cpu_quota(),
            physical=physical_cores(),
        ),
    )
    apply_binding(binding)
    world = World(endpoint, context, binding, len({node for node, _ in everyone}), local_rank, len(neighbours))
    install_abort_hook(endpoint, lambda: str(world))
    return world


def run_job(read_spec: Callable[[], JobSpec], resume: bool, dry_run: bool) -> ExitCode:
    """Run a job on this rank; every rank of the world calls this for the same job, which rank 0 reads.

    Returns the same exit code on every rank. Bad input is reported by rank 0, in one line. Raises `LaunchError`
    when there is no world to run in.
    """
    try:
        return _run(join_world(), read_spec, resume, dry_run)
    except Agreed as error:
        if error.rank == COORDINATOR:
            print(f"mpinfer: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _run(world: World, read_spec: Callable[[], JobSpec], resume: bool, dry_run: bool) -> ExitCode:
    look: FirstLook | None = None
    files: OutputFiles | None = None

    def first_look() -> dict[str, Any]:
        """All that rank 0 can refuse without torch."""
        nonlocal look, files
        look = FirstLook.at(read_spec())
        done = None
        if not dry_run:
            files = OutputFiles(look.spec, look.records, resume)
            if files.journal.complete:
                done = files.exit_code
                files.write_responses()
        return {"spec": look.spec.to_dict(), "done": done}

    told = agree(world.endpoint, first_look)
    spec = spec_from_dict(told["spec"])
    if told["done"] is not None:
        world.say(f"{spec.output.path}: already complete, nothing to do")
        return ExitCode(told["done"])

    layout = _lay_out(world, spec, look)
    if dry_run:
        return ExitCode.COMPLETE
    return _compute(world, spec, layout, files)


@dataclass
class Layout:
    """What every rank knows before it loads."""

    engine: Engine  # the model, without weights
    plan: Plan
    needs_logits: bool
    work: Workload


def _lay_out(world: World, spec: JobSpec, look: FirstLook | None) -> Layout:
    """The model without weights, and the plan that rank 0 makes of it; `look` is rank 0's."""

    engine: Engine | None = None

    def second_look() -> dict[str, Any]:
        """What rank 0 alone can refuse with torch; the others' imports would only slow it down."""
        assert look is not None
        nonlocal engine
        inputs = ENGINES[look.kind].inputs(spec, look.records)
        if world.is_crowded:
            engine = ENGINES[look.kind](spec, inputs)
        return {"kind": look.kind, "inputs": inputs, "needs_logits": look.needs_logits, "size": look.size}

    told = agree(world.endpoint, second_look)
    engine = everywhere(world.endpoint, lambda: engine or ENGINES[told["kind"]](spec, told["inputs"]))
    work = engine.workload(**told["size"])
    memory_bytes = memory_limit(spec, local_memory_bytes() // world.local_size)
    memories, cores = zip(*world.endpoint.all_gather([memory_bytes, world.cores_per_rank]), strict=True)

    def plan_it() -> dict[str, Any]:
        model = engine.summary()
        plan = make_plan(spec.parallel, model, work, memories, engine.kv_cache_bytes, min(cores))
        world.say(
            f"{VERSION}, ranks {world.endpoint.size}, nodes {world.nodes}, launcher {world.context.launcher}, "
            f"threads a rank {world.binding.threads} ({world.binding.reason})"
        )
        world.say(describe(plan, model, work))
        return plan.to_dict()

    plan = Plan.from_dict(agree(world.endpoint, plan_it))
    world.place = str(plan.grid.coordinates(world.endpoint.rank))
    return Layout(engine, plan, told["needs_logits"], work)


def _compute(world: World, spec: JobSpec, layout: Layout, files: "OutputFiles | None") -> ExitCode:
    """Load this rank's part and run it to the end of the job; `files` are rank 0's."""
    start_s = _process_age_s()
    loading = time.perf_counter()
    rank = everywhere(world.endpoint, lambda: _build_rank(world, spec, layout))
    load_s = time.perf_counter() - loading
    own_times = everywhere(world.endpoint, rank.step_times)
    times = [StepTimes(*pair) for pair in world.endpoint.all_gather(astuple(own_times))]
    if files is not None:
        left = layout.work.part((len(files.records) - len(files.journal.done)) / len(files.records))
        predicted_s = predict_wall_s(layout.plan, left, layout.engine.step_size(layout.plan), times)
        world.say(
            f"started in {start_s:.2f} s, loaded in {load_s:.2f} s, expecting to run for about {predicted_s:.0f} s"
        )
        costs_s = layout.engine.record_costs(layout.plan, layout.work, times, files.records.lengths)
        return _coordinate(world, rank, layout.plan, costs_s, files, Before(start_s, load_s, predicted_s))
    rank.run()
    world.endpoint.send(COORDINATOR, ACCOUNT, _close_account(world, rank))
    world.endpoint.flush()
    return ExitCode(world.endpoint.broadcast(None))


def _coordinate(
    world: World, rank: "Rank", plan: Plan, costs_s: Sequence[float], files: "OutputFiles", before: Before
) -> ExitCode:
    """Rank 0: its own share of the computing, then the end of the run. `costs_s`: of each record, as expected."""
    journal, records = files.journal, files.records
    progress = Progress(len(records), len(journal.done))

    def keep(result: dict[str, Any]) -> None:
        journal.append(result)
        progress.advance()

    for index in sorted(records.refused.keys() - journal.done):
        error = {"type": "RecordError", "message": records.refused[index]}
        keep({"index": index, "id": records.ids[index], "error": error})
    pending = [index for index in range(len(records)) if index not in journal.done]
    coordinator = Coordinator(world.endpoint, records, costs_s, pending, plan.replicas, keep)
    started = time.perf_counter()
    rank.run()
    world.endpoint.send(COORDINATOR, ACCOUNT, _close_account(world, rank))
    world.endpoint.wait_until(lambda: coordinator.finished)
    wall_s = time.perf_counter() - started
    progress.close()
    accounts = [coordinator.accounts[rank] for rank in range(world.endpoint.size)]
    account = timing(plan, len(pending), wall_s, before, accounts)
    files.finish(account)
    world.endpoint.broadcast(int(files.exit_code))
    print(timing_table(account), flush=True)
    world.say(f"{files.responses or files.directory}: complete, {len(records)} records, {journal.errors} failed")
    return files.exit_code


class OutputFiles:
    """Rank 0's side of the output: the journal while the run lasts, then results, manifest, and responses if any."""

    def __init__(self, spec: JobSpec, records: Input, resume: bool) -> None:
        self.spec, self.records = spec, records
        self.directory = Path(spec.output.path)
        self.responses = responses_file(spec)
        self.journal = Journal.open(self.directory, spec.identity(), records.sha256, records.ids, resume)

    @property
    def exit_code(self) -> ExitCode:
        """Of the run, once it is complete."""
        return ExitCode.RECORDS_FAILED if self.journal.errors else ExitCode.COMPLETE

    def finish(self, account: dict[str, Any]) -> None:
        """Write the account, the ordered results, the manifest that says they are complete, and the responses."""
        write_atomically(self.directory / "timing.json", json.dumps(account, indent=2).encode() + b"\n")
        facts = {
            "spec": self.spec.to_dict(),
            "spec_fingerprint": self.spec.fingerprint(),
            "versions": versions(),
            "finished_unix_s": int(time.time()),
        }
        merge(self.directory, self.journal, len(self.records), facts)
        self.write_responses()
        self.journal.close()

    def write_responses(self) -> None:
        """Of a complete run. Again, if need be: the run may have been killed before, or the file moved away."""
        if self.responses is not None:
            write_responses(self.responses, self.spec, self.records)


def versions() -> dict[str, str]:
    """What ran: of every package that decides results, its version."""
    packages = {name: _version(name) for name in ("torch", "transformers", "numpy", "mpi4py")}
    return {"mpinfer": VERSION, "python": platform.python_version(), "mpi": library_version(), **packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _build_rank(world: World, spec: JobSpec, layout: Layout) -> "Rank":
    from mpinfer.pipeline.device import choose_device

    device = choose_device(spec.model.device, world.local_rank)
    return layout.engine.build_rank(world.endpoint, layout.plan, device, layout.needs_logits)


def _close_account(world: World, rank: "Rank") -> dict[str, Any]:
    """What this rank tells rank 0 of itself at its end."""
    coordinates = rank.coordinates
    return {
        "rank": world.endpoint.rank,
        "host": socket.gethostname(),
        "coordinates": {"replica": coordinates.replica, "stage": coordinates.stage, "shard": coordinates.shard},
        "cores": list(world.binding.cores),
        "threads": world.binding.threads,
        **rank.close_account(),
        "peak_memory_bytes": _peak_memory_bytes(),
    }


def _peak_memory_bytes() -> int:
    """The most resident memory that this process ever had. Not getrusage, which remembers the parent's too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def _process_age_s() -> float:
    """Seconds since the kernel started this process: imports and MPI's start included."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - started_ticks / os.sysconf("SC_CLK_TCK")


def examine_world() -> ExitCode:
    """Gather every rank's facts and print them from rank 0, with what looks wrong."""
    try:
        world = join_world()
    except Agreed as error:
        print(f"mpinfer: error: {error}", file=sys.stderr)
        return error.exit_code
    from mpinfer.pipeline.device import choose_device

    facts = RankFacts(
        rank=world.endpoint.rank,
        node=world.context.node,
        local_rank=world.local_rank,
        cores=world.binding.cores,
        threads=world.binding.threads,
        mpi_library=library_version(),
        mpi4py_version=version("mpi4py"),
        torch_version=version("torch"),
        mpinfer_version=VERSION,
        python_version=platform.python_version(),
        device=choose_device("auto", world.local_rank),
        memory_bytes=local_memory_bytes(),
    )
    everyone = [
        RankFacts(**{**other, "cores": tuple(other["cores"])}) for other in world.endpoint.all_gather(asdict(facts))
    ]
    if world.is_coordinator:
        print(doctor_report(world.context.launcher, everyone), flush=True)
    return ExitCode.COMPLETE
