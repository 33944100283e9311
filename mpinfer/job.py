"""The composition root: one rank's life, from launch to exit code.

Every rank runs `run_job`; what a rank is gets decided once, by what is built for it.
"""

import gc
import json
import platform
import socket
import sys
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpinfer.cluster.doctor import RankFacts, doctor_report
from mpinfer.cluster.memory import local_memory_bytes
from mpinfer.coordinator.dispatch import Coordinator
from mpinfer.coordinator.progress import Progress
from mpinfer.coordinator.status import RankStates, StatusFile
from mpinfer.coordinator.stop import Stop
from mpinfer.errors import ExitCode, MpinferError, WorldLostError
from mpinfer.layout import Expected, Layout, device, lay_out, time_steps
from mpinfer.observe.hints import hints
from mpinfer.observe.page import page
from mpinfer.observe.report import Before, timing, timing_table
from mpinfer.observe.timeline import timeline
from mpinfer.observe.trace import trace_json
from mpinfer.observe.vitals import vitals
from mpinfer.observe.watchdog import Watchdog
from mpinfer.preview import FirstLook
from mpinfer.records.files import REPORT, TIMELINE, TIMING, TRACE, write_atomically
from mpinfer.records.inputs import Input
from mpinfer.records.journal import Journal
from mpinfer.records.manifest import merge
from mpinfer.records.openai_batch import responses_file, write_responses
from mpinfer.spec import FAKE, JobSpec, spec_from_dict
from mpinfer.transport.clocks import compare_clocks
from mpinfer.transport.control import ACCOUNT, COORDINATOR, END, STOP
from mpinfer.transport.endpoint import Agreed, agree, everywhere, library_version
from mpinfer.transport.lost import RankLost, is_loss
from mpinfer.version import VERSION
from mpinfer.world import World, join_world, versions

if TYPE_CHECKING:  # torch loads only once the cheap checks have passed and threads are bound
    from mpinfer.engine import Rank

_LEAST_PATIENCE_S, _MOST_PATIENCE_S = 5.0, 60.0  # with ranks that owe nothing but their account; in between, the wall


def run_job(read_spec: Callable[[], JobSpec], resume: bool, dry_run: bool) -> ExitCode:
    """Run a job on this rank; every rank of the world calls this for the same job, which rank 0 reads.

    Returns the same exit code on every rank. Bad input is reported by rank 0, in one line. Raises `LaunchError`
    when there is no world to run in.
    """
    try:
        world = join_world()
        try:
            return _run(world, Stop(world.endpoint, lambda: str(world)), read_spec, resume, dry_run)
        except MpinferError as error:  # one rank's alone, in the midst of the work
            if world.endpoint.size > 1:
                sys.excepthook(*sys.exc_info())  # the others wait for it
            print(f"mpinfer: fatal on {world}: {error}; --resume continues the run", file=sys.stderr)
            return ExitCode.FAULT
    except Agreed as error:
        if error.rank == COORDINATOR:
            print(f"mpinfer: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def run_within(read_spec: Callable[[], JobSpec], resume: bool) -> ExitCode:
    """`run_job` for a program that goes on: raises what that prints, and gives signals and the exception hook back."""
    hook = sys.excepthook
    try:
        world = join_world()
        stop = Stop(world.endpoint, lambda: str(world))
        if torch := sys.modules.get("torch"):  # loaded before this rank had its cores
            torch.set_num_threads(world.binding.threads)
        try:
            code = _run(world, stop, read_spec, resume, dry_run=False)
        except MpinferError:  # one rank's alone
            if world.endpoint.size > 1:
                sys.excepthook(*sys.exc_info())  # the others wait for it, whoever catches it here
            raise
        except Agreed:
            stop.close()
            raise
    except Agreed as error:
        sys.excepthook = hook
        agreed = MpinferError(str(error))
        agreed.exit_code = error.exit_code
        raise agreed from None
    stop.close()
    sys.excepthook = hook
    return code


def _run(world: World, stop: Stop, read_spec: Callable[[], JobSpec], resume: bool, dry_run: bool) -> ExitCode:
    endpoint = world.endpoint
    look: FirstLook | None = None
    files: OutputFiles | None = None

    def first_look() -> dict[str, Any]:
        """All that rank 0 can refuse without torch."""
        nonlocal look, files
        look = FirstLook.at(read_spec())
        done = None
        if not dry_run:
            files = OutputFiles(look.spec, look.records, resume)
            endpoint.last_words = files.status.end
            if files.journal.complete:
                done = files.exit_code
                files.status.close(done)
                files.write_responses()
        return {"spec": look.spec.to_dict(), "done": done}

    told = agree(endpoint, first_look)
    world.lap("job")
    spec = spec_from_dict(told["spec"])
    if spec.model.weights == FAKE:
        world.say("warning: model.weights=fake: results mean nothing; speed and memory are those of a real model")
    if told["done"] is not None:
        world.say(f"{spec.output.path}: already complete, nothing to do")
        return ExitCode(told["done"])

    watchdog = Watchdog(endpoint.activity, endpoint.pulse, spec.watchdog.timeout_s, lambda: str(world), endpoint.abort)
    try:
        layout = lay_out(world, spec, look)
        code = ExitCode.COMPLETE if dry_run else _compute(world, spec, layout, files, stop, watchdog)
    except BaseException as error:
        if files is not None:
            files.status.close(getattr(error, "exit_code", ExitCode.FAULT))
        if isinstance(error, Agreed):
            watchdog.close()
        raise
    watchdog.close()
    if files is not None:
        files.status.close(code)
    if world.endpoint.lost:
        world.endpoint.leave(code)
    return code


def _compute(
    world: World, spec: JobSpec, layout: Layout, files: "OutputFiles | None", stop: Stop, watchdog: Watchdog
) -> ExitCode:
    """Load this rank's part and run it to the end of the job; `files` are rank 0's."""
    loading = time.perf_counter()
    build = layout.engine.build_rank
    rank = everywhere(
        world.endpoint, lambda: build(world.endpoint, layout.plan, device(world, spec), layout.needs_logits)
    )
    load_s = time.perf_counter() - loading
    steps = time_steps(world, rank, layout.planned_s)
    rank.account.recorder.clock = asdict(compare_clocks(world.endpoint))
    world.endpoint.pulse.vitals = lambda: vitals(rank.account)
    watchdog.begin_loop(max(step.seconds for of_rank in steps for step in of_rank))
    if files is not None:
        left = len(files.records) - len(files.journal.done)
        expected = layout.expect(steps, left, files.records.lengths)
        before = Before(world.laps, load_s, layout.planned_s, expected.wall_s)
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in world.laps.items())
        world.say(
            f"started in {before.start_s:.2f} s ({parts}), loaded in {load_s:.2f} s, expecting to run for about "
            f"{expected.wall_s:.3g} s"
        )
        return _coordinate(world, rank, layout, expected, files, before, stop)
    stop.drain(spec.stop.drain_limit_s)
    codes: list[int] = []
    world.endpoint.on(END, lambda source, code: codes.append(code))
    _run_part(world, layout, rank, None)
    world.endpoint.wait_until(lambda: bool(codes), "the end of the run")
    return ExitCode(codes[0])


def _run_part(world: World, layout: Layout, rank: "Rank", coordinator: Coordinator | None) -> None:
    """This rank's share of the computing, and its account. Where MPI outlives ranks that die, a replica that has lost
    one ends early, and the other replicas do its work; `coordinator` is rank 0's.

    Raises `WorldLostError` when rank 0 has died, or nobody is left to do the work.
    """
    endpoint, looping = world.endpoint, True
    own = next(set(replica.ranks) for replica in layout.plan.replicas if endpoint.rank in replica.ranks)

    def lose(lost: set[int]) -> None:
        if COORDINATOR in lost:
            raise WorldLostError("rank 0 has died, and with it who gathers the results")
        for replica in layout.plan.replicas:
            if coordinator is not None and lost.intersection(replica.ranks):
                dead = ", ".join(str(rank) for rank in replica.ranks if rank in lost)
                world.say(f"warning: rank {dead} has died; other replicas take over what its replica had in hand")
                coordinator.lose(replica.leader, replica.ranks)
        if looping and lost & own:
            raise RankLost

    endpoint.when_lost = lose
    gc.freeze()  # what loading has left stays: to search all of it for garbage takes as long as several steps
    try:
        rank.run()
    except WorldLostError:
        raise
    except Exception as error:
        looping = False
        if is_loss(error):
            endpoint.wait_until(lambda: bool(endpoint.find_lost() & own), "word of who has died")
        if not endpoint.find_lost() & own:
            raise
        rank.abandon()
    finally:
        gc.unfreeze()
    looping = False
    endpoint.send(COORDINATOR, ACCOUNT, _close_account(world, rank))
    endpoint.flush()


def _coordinate(
    world: World, rank: "Rank", layout: Layout, expected: Expected, files: "OutputFiles", before: Before, stop: Stop
) -> ExitCode:
    """Rank 0: its own share of the computing, then the end of the run."""
    journal, records, limit_s = files.journal, files.records, files.spec.stop.drain_limit_s
    progress = Progress(len(records), len(journal.done), journal.errors)

    def keep(result: dict[str, Any]) -> None:
        journal.append(result)
        progress.advance(result)

    for index in sorted(records.refused.keys() - journal.done):
        error = {"type": "RecordError", "message": records.refused[index]}
        keep({"index": index, "id": records.ids[index], "error": error})
    done_before, every = len(journal.done), range(len(records))
    pending = array("I", (index for index in every if index not in journal.done)) if journal.done else every
    static = files.spec.parallel.dispatch == "static"
    coordinator = Coordinator(world.endpoint, records, expected.record_s, pending, expected.speeds, keep, static=static)

    def told_to_stop(source: int, body: None) -> None:
        stop.hear()
        if not coordinator.stopped:
            coordinator.stop()
            files.status.state = "stopping"
            world.say(f"told to stop: what has begun is finished first, for at most {limit_s:g} s (stop.drain_limit_s)")
            journal.flush()  # now: a launcher that was told may kill all within a second

    world.endpoint.on(STOP, told_to_stop)
    stop.drain(limit_s, save=journal.flush)
    files.status.run(progress, RankStates(world.endpoint, layout.plan, rank.account, lambda: coordinator.done))
    started = time.perf_counter()
    _run_part(world, layout, rank, coordinator)
    world.endpoint.wait_until(lambda: coordinator.complete or coordinator.finished)
    wall_s = time.perf_counter() - started
    most_s = min(_MOST_PATIENCE_S, files.spec.watchdog.timeout_s / 2 or _MOST_PATIENCE_S)  # before the watchdog's ends
    patience_s = min(max(wall_s, _LEAST_PATIENCE_S), most_s)
    world.endpoint.wait_until(
        lambda: coordinator.finished or (coordinator.complete and time.perf_counter() - started > wall_s + patience_s)
    )
    silent = sorted(coordinator.silent)
    if not silent:
        wall_s = time.perf_counter() - started
    progress.close()
    accounts = [account for _, account in sorted(coordinator.accounts.items())]
    traces = [account.pop("trace") for account in accounts]
    results, latency = len(journal.done) - done_before, coordinator.latency.summary()
    account = timing(layout.plan, results, wall_s, before, accounts, world.endpoint.lost, latency)
    if not coordinator.complete:
        files.stop(account)  # first: a launcher that was told to stop may kill all at any moment
    if problem := files.draw(account, traces, progress):
        world.say(f"warning: {problem}; the results are not concerned")
    if not coordinator.complete:
        world.say(f"{files.directory}: stopped, {len(journal.done)} of {len(records)} records done; --resume goes on")
        _end(world, ExitCode.INTERRUPTED)
        return ExitCode.INTERRUPTED
    files.finish(account)
    if not silent:
        _end(world, files.exit_code)
    print(timing_table(account), flush=True)
    for hint in hints(account):
        world.say(f"hint: {hint}")
    world.say(f"{files.responses or files.directory}: complete, {len(records)} records, {journal.errors} failed")
    if silent:
        world.say(
            f"warning: every result is here, but no word of rank {', '.join(map(str, silent))} for "
            f"{patience_s:.0f} s: others did their work again; ending the world without them"
        )
        world.endpoint.abort(files.exit_code)
    return files.exit_code


def _end(world: World, code: ExitCode) -> None:
    """Tell the other ranks how the run has ended."""
    for rank in range(1, world.endpoint.size):
        world.endpoint.send(rank, END, int(code))
    world.endpoint.flush()


class OutputFiles:
    """Rank 0's side of the output: the journal while the run lasts, then results, manifest, and responses if any."""

    def __init__(self, spec: JobSpec, records: Input, resume: bool) -> None:
        self.spec, self.records = spec, records
        self.directory = Path(spec.output.path)
        self.responses = responses_file(spec)
        self.journal = Journal.open(self.directory, spec.identity(), records.sha256, records.ids, resume)
        self.status = StatusFile(self.directory, len(records), len(self.journal.done), self.journal.errors)

    @property
    def exit_code(self) -> ExitCode:
        """Of the run, once it is complete."""
        return ExitCode.RECORDS_FAILED if self.journal.errors else ExitCode.COMPLETE

    def finish(self, account: dict[str, Any]) -> None:
        """Write the account, the ordered results, the manifest that says they are complete, and the responses."""
        self._write_account(account)
        facts = {
            "spec": self.spec.to_dict(),
            "spec_fingerprint": self.spec.fingerprint(),
            "fake_weights": self.spec.model.weights == FAKE,
            "versions": versions(),
            "finished_unix_s": int(time.time()),
        }
        merge(self.directory, self.journal, len(self.records), facts)
        self.write_responses()
        self.journal.close()

    def stop(self, account: dict[str, Any]) -> None:
        """Leave the journal to another run, and the account of this one."""
        self._write_account(account)
        self.journal.close()

    def _write_account(self, account: dict[str, Any]) -> None:
        write_atomically(self.directory / TIMING, json.dumps(account, indent=2).encode() + b"\n")

    def draw(self, account: dict[str, Any], traces: list[dict[str, Any]], progress: Progress) -> str | None:
        """Write what people look at; returns what went wrong, if anything: no run fails for want of a picture."""
        try:
            times = timeline(account["ranks"], traces, progress.over_time)
            files: dict[str, bytes | Iterable[bytes]] = {TIMELINE: json.dumps(times).encode() + b"\n"}
            if self.spec.output.trace:
                files[TRACE] = trace_json(account["ranks"], traces, progress.over_time, progress.started_s)
            files[REPORT] = page(account, str(self.directory), times).encode()
            for name, data in files.items():
                write_atomically(self.directory / name, data, durable=False)
        except Exception as error:
            return f"no {TIMELINE}, {TRACE} or {REPORT}: {type(error).__name__}: {error}"
        return None

    def write_responses(self) -> None:
        """Of a complete run. Again, if need be: the run may have been killed before, or the file moved away."""
        if self.responses is not None:
            write_responses(self.responses, self.spec, self.records)


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
        "trace": rank.account.recorder.to_dict(),
        "storage_bytes": _storage_bytes(),
        "peak_memory_bytes": _peak_memory_bytes(),
    }


def _peak_memory_bytes() -> int:
    """The most resident memory that this process ever had. Not getrusage, which remembers the parent's too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def _storage_bytes() -> int | None:
    """What the kernel fetched from storage for this process: of programs, weights and input, what the node's page cache
    did not hold. None where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def examine_world() -> ExitCode:
    """Gather every rank's facts and print them from rank 0, with what looks wrong."""
    try:
        world = join_world(refuse_mixed=False)
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
