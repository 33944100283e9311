"""Commands. Thin: each parses its arguments and calls one function. Heavy imports wait until they are needed."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from mpinfer.errors import ExitCode, MpinferError, SpecError
from mpinfer.experiments.strategies import DEFAULT, STRATEGIES
from mpinfer.version import VERSION


def main(argv: list[str] | None = None) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        return int(arguments.command(arguments))
    except MpinferError as error:
        print(f"mpinfer: error: {error}", file=sys.stderr)
        return int(error.exit_code)


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a command line; ends the program where it is wrong."""
    # `bench transport` is a command of its own, of two words; a job file of that name is ./transport.
    joined = [_BENCH_TRANSPORT, *words[2:]] if words[:2] == _BENCH_TRANSPORT.split() else words
    return _parser().parse_args(joined, argparse.Namespace(words=words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpinfer", description="Deep-learning inference over a whole cluster allocation with nothing but MPI."
    )
    parser.add_argument("--version", action="version", version=f"mpinfer {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run a job: start one per rank, with mpirun, mpiexec or srun, or alone")
    _job_arguments(run)
    run.set_defaults(command=_run)

    batch = commands.add_parser("run-batch", help="answer an OpenAI Batch file: start it like run")
    batch.add_argument("-i", "--input-file", metavar="FILE", required=True, help="the requests, a line each")
    batch.add_argument("-o", "--output-file", metavar="FILE", required=True, help="where the responses go")
    batch.add_argument("--model", metavar="DIR", required=True, help="the model directory")
    _run_arguments(batch)
    batch.set_defaults(command=_run_batch)

    launch = commands.add_parser("launch", help="find the launcher and run a job on N ranks")
    launch.add_argument("-n", "--ranks", type=int, required=True, help="ranks to start")
    launch.add_argument("--hosts", default="", help="comma-separated hosts (default: this node, or the allocation)")
    _job_arguments(launch)
    launch.set_defaults(command=_launch)

    sbatch = commands.add_parser("sbatch", help="print a batch script for a job (Slurm, PBS or LSF), or submit it")
    sbatch.add_argument("job", metavar="JOB.yaml")
    sbatch.add_argument("--nodes", type=int, metavar="M", help="nodes to ask for")
    sbatch.add_argument("--ntasks-per-node", type=int, metavar="K", help="ranks on each of them")
    sbatch.add_argument("--cpus-per-task", type=int, metavar="C", help="cores of a rank (default: the scheduler's, 1)")
    sbatch.add_argument(
        "--cluster", metavar="FILE", help="YAML that describes nodes, ranks and cores, instead of these"
    )
    sbatch.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of a node (default: none)")
    sbatch.add_argument(
        "--time", metavar="T", help="limit, as 90 (minutes), 1:30:00 or 2-12:00:00 (default: the site's)"
    )
    sbatch.add_argument("--partition", metavar="P", help="partition, or queue (default: the site's)")
    sbatch.add_argument("--account", metavar="A", help="account, or project (default: the user's)")
    sbatch.add_argument("--array", type=int, metavar="N", help="cut the input into N parts, a job for each")
    sbatch.add_argument("--requeue", action="store_true", help="go on by itself after a fault or an interruption, too")
    sbatch.add_argument("--launcher", choices=("srun", "mpirun"), help="what starts ranks (default: srun under Slurm)")
    sbatch.add_argument("--mpi", metavar="KIND", help="srun's --mpi (default: by the MPI beside this Python)")
    sbatch.add_argument("--system", choices=("slurm", "pbs", "lsf"), default="slurm", help="scheduler (%(default)s)")
    sbatch.add_argument("--output", metavar="DIR", help="where results go (default: the job's output.path)")
    sbatch.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help=_SET_HELP)
    sbatch.add_argument("--submit", action="store_true", help="hand the script to sbatch, qsub or bsub")
    sbatch.set_defaults(command=_sbatch)

    plan = commands.add_parser("plan", help="the layout a job would get, and why; needs no MPI")
    plan.add_argument("job", metavar="JOB.yaml")
    plan.add_argument("--ranks", type=int, required=True, help="ranks to plan for")
    plan.add_argument("--nodes", type=int, help="nodes that the ranks are spread over (default: the cluster's, or 1)")
    plan.add_argument("--cluster", metavar="FILE", help="YAML that describes them (default: nodes like this one)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help=_SET_HELP)
    plan.set_defaults(command=_plan)

    verify = commands.add_parser("verify", help="judge a run by the files of its output directory")
    verify.add_argument("directory", metavar="DIR")
    verify.set_defaults(command=_verify)

    report = commands.add_parser("report", help="write report.html, a run on one page, beside its timing.json")
    report.add_argument("directory", metavar="DIR")
    report.add_argument(
        "--plots", action="store_true", help="gantt, ranks and scaling as SVG and PNG, too (matplotlib)"
    )
    report.set_defaults(command=_report)

    top = commands.add_parser("top", help="watch a run by the status.json of its output directory, from anywhere")
    top.add_argument("directory", metavar="DIR")
    top.add_argument("--once", action="store_true", help="show it as it is now, and stop")
    top.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks (%(default)g)")
    top.set_defaults(command=_top)

    convert = commands.add_parser("convert", help="turn a GGUF file into a model directory that mpinfer loads")
    convert.add_argument("source", metavar="SRC", help="a .gguf file")
    convert.add_argument("destination", metavar="DST", help="the directory to write")
    convert.set_defaults(command=_convert)

    bench = commands.add_parser("bench", help="the same job under several strategies, side by side: start it alone")
    bench.add_argument("job", metavar="JOB.yaml")
    bench.add_argument("-n", "--ranks", metavar="N,...", help="numbers of ranks, such as 1,2,4")
    which = bench.add_mutually_exclusive_group()
    which.add_argument("--strategies", metavar="A,B,...", help=f"of {', '.join(STRATEGIES)} ({','.join(DEFAULT)})")
    which.add_argument("--matrix", metavar="FILE", help="YAML with strategies of your own, and what else is below")
    bench.add_argument("--weak", action="store_true", help="as many records for each rank, instead of for all together")
    bench.add_argument("--repeats", type=int, metavar="N", help="rounds, of which medians are taken (3)")
    bench.add_argument("--reference", metavar="NAME", help="strategy to compare with (the first that completes)")
    bench.add_argument("--fake-weights", action="store_true", help="random ones, for models that have only config.json")
    bench.add_argument("--hosts", default="", help="comma-separated hosts (default: this node, or the allocation)")
    bench.add_argument("--output", metavar="DIR", help="for table and runs (default: the job's output.path, -bench)")
    bench.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help=_SET_HELP)
    bench.set_defaults(command=_bench)

    transport = commands.add_parser(
        _BENCH_TRANSPORT,
        help="messages between two ranks: start one on each, with mpirun",
        prog="mpinfer bench transport",
    )
    transport.add_argument("--largest", type=int, default=2**26, metavar="BYTES", help="of a message (%(default)s)")
    transport.add_argument("--rounds", type=int, default=5, help="of which medians are taken (%(default)s)")
    transport.add_argument("--json", action="store_true", help="print figures as JSON")
    transport.set_defaults(command=_bench_transport)

    doctor = commands.add_parser("doctor", help="show MPI, ranks, nodes, cores, binding and torch; run it under mpirun")
    doctor.set_defaults(command=_doctor)

    schema = commands.add_parser("schema", help="print the JSON Schema of job files, for editors")
    schema.set_defaults(command=_schema)

    completion = commands.add_parser("completion", help="print a completion script: eval it in the shell's start file")
    completion.add_argument("shell", choices=("bash", "zsh"))
    completion.set_defaults(command=_completion)
    return parser


_BENCH_TRANSPORT = "bench transport"
_SET_HELP = "override a key of the job file, for example --set parallel.stages=2"


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB.yaml")
    parser.add_argument("--output", metavar="DIR", help="where results go (default: the job's output.path)")
    _run_arguments(parser)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help=_SET_HELP)
    parser.add_argument("--resume", action="store_true", help="continue the run in the output directory, if any")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def _run(arguments: argparse.Namespace) -> int:
    from mpinfer.job import run_job
    from mpinfer.spec import load_spec

    return run_job(
        lambda: load_spec(arguments.job, arguments.overrides, arguments.output), arguments.resume, arguments.dry_run
    )


def _run_batch(arguments: argparse.Namespace) -> int:
    from mpinfer.job import run_job
    from mpinfer.records.openai_batch import batch_job

    files = (arguments.input_file, arguments.output_file)
    return run_job(lambda: batch_job(*files, arguments.model, arguments.overrides), arguments.resume, arguments.dry_run)


def _launch(arguments: argparse.Namespace) -> int:
    from mpinfer.cluster.binding import allowed_cores
    from mpinfer.cluster.launch import find_launcher, launch_command

    program = [sys.executable, "-m", "mpinfer", "run", arguments.job]
    program += [part for override in arguments.overrides for part in ("--set", override)]
    program += ["--output", arguments.output] if arguments.output else []
    program += ["--resume"] if arguments.resume else []
    program += ["--dry-run"] if arguments.dry_run else []
    command, environment = launch_command(
        find_launcher(os.environ),
        arguments.ranks,
        [host for host in arguments.hosts.split(",") if host],
        program,
        cores=len(allowed_cores()),
        root=os.geteuid() == 0,
    )
    print("mpinfer:", *(f"{k}={v}" for k, v in environment.items()), *command, file=sys.stderr, flush=True)
    os.execvpe(command[0], command, {**os.environ, **environment})


def _sbatch(arguments: argparse.Namespace) -> int:
    from mpinfer.cluster.batch_script import Batch, batch_script, submit
    from mpinfer.cluster.describe import equal_nodes
    from mpinfer.cluster.launch import wheel_pmi
    from mpinfer.spec import load_spec

    a = arguments
    size = (a.nodes, a.ntasks_per_node, a.cpus_per_task)
    if None in size[:2] if a.cluster is None else size != (None, None, None):
        raise SpecError(
            "sbatch: needs --nodes and --ntasks-per-node, with --cpus-per-task if you like, or else --cluster FILE; "
            "give one of the two"
        )
    nodes, tasks_per_node, cpus_per_task = size if a.cluster is None else equal_nodes(a.cluster)
    srun = a.launcher != "mpirun" and a.system == "slurm"
    bin_dir = Path(sys.executable).parent
    batch = Batch(
        command=("mpinfer", *a.words),
        job=a.job,
        spec=load_spec(a.job, a.overrides, a.output),
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        overrides=tuple(a.overrides),
        output=a.output,
        bin_dir=str(bin_dir.relative_to(Path.cwd()) if bin_dir.is_relative_to(Path.cwd()) else bin_dir),
        cpus_per_task=cpus_per_task,
        gpus_per_node=a.gpus_per_node,
        time=a.time,
        partition=a.partition,
        account=a.account,
        array=a.array,
        requeue=a.requeue,
        launcher=a.launcher,
        mpi=a.mpi or (wheel_pmi() if srun else None),
        system=a.system,
    )
    script = batch_script(batch)
    if a.submit:
        return submit(a.system, script)
    print(script, end="")
    return ExitCode.COMPLETE


def _plan(arguments: argparse.Namespace) -> int:
    from mpinfer.preview import plan_job

    a = arguments
    return plan_job(a.job, a.overrides, a.ranks, a.nodes, a.cluster, a.json)


def _verify(arguments: argparse.Namespace) -> int:
    from mpinfer.records.manifest import verify

    verdict = verify(Path(arguments.directory))
    for problem in verdict.problems:
        print(problem)
    print(
        json.dumps(
            {
                "complete": verdict.complete,
                "records": verdict.records,
                "failed": verdict.failed,
            }
        )
    )
    if not verdict.complete:
        return ExitCode.FAULT
    return ExitCode.RECORDS_FAILED if verdict.failed else ExitCode.COMPLETE


def _report(arguments: argparse.Namespace) -> int:
    from mpinfer.observe.page import page
    from mpinfer.records.files import REPORT, write_atomically

    directory = Path(arguments.directory)
    timing, times, bench = (_read_json(directory / name) for name in ("timing.json", "timeline.json", "bench.json"))
    bench = bench or _read_json(directory.parent / "bench.json")
    try:
        if timing is None and bench is None:
            raise ValueError("there is no timing.json")
        text = page(timing, arguments.directory, times, bench)
        write_atomically(directory / REPORT, text.encode())
        print(directory / REPORT)
        if arguments.plots:
            from mpinfer.observe.plots import plots

            for name, picture in plots(timing, times, bench):
                write_atomically(directory / name, picture)
                print(directory / name)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SpecError(
            f"{directory}: timing.json is not the account of a run ({type(error).__name__}: {error}); give the output "
            "of a run"
        ) from None
    return ExitCode.COMPLETE


def _read_json(path: Path) -> Any:
    """None where there is no such file. Raises `SpecError` for anything else than a JSON object."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: cannot be read ({error}); give the output of a run") from None
    if not isinstance(tree, dict):
        raise SpecError(f"{path}: is no JSON object; give the output of a run")
    return tree


def _top(arguments: argparse.Namespace) -> int:
    from mpinfer.observe.top import watch

    return watch(Path(arguments.directory), arguments.every, arguments.once)


def _convert(arguments: argparse.Namespace) -> int:
    from mpinfer.models.convert import convert

    convert(Path(arguments.source), Path(arguments.destination))
    print(f"mpinfer: {arguments.destination}: converted", file=sys.stderr)
    return ExitCode.COMPLETE


def _bench(arguments: argparse.Namespace) -> int:
    from mpinfer.experiments.command import bench

    return bench(arguments)


def _bench_transport(arguments: argparse.Namespace) -> int:
    from mpinfer.bench.transport import bench_transport

    return bench_transport(arguments.largest, arguments.rounds, arguments.json)


def _doctor(arguments: argparse.Namespace) -> int:
    from mpinfer.job import examine_world

    return examine_world()


def _schema(arguments: argparse.Namespace) -> int:
    from mpinfer.schema import job_schema

    print(json.dumps(job_schema(), indent=2))
    return ExitCode.COMPLETE


def _completion(arguments: argparse.Namespace) -> int:
    from mpinfer.completion import completion_script
    from mpinfer.spec import valid_keys

    print(completion_script(_parser(), arguments.shell, valid_keys()), end="")
    return ExitCode.COMPLETE
