"""mpinfer beside plain torch and torch.distributed.pipelining, on models that do not decode: one command, one machine.

    .venv/bin/python benchmarks/encoders.py

The models have random weights (models.py): an encoder of 12 layers, hidden size 512, on sequences of 64 tokens, and
EfficientNet-Lite0 on images of 224 x 224. Every system computes in float32, in batches of 8 records that it has in
memory, on the same two cores, in processes of its own:

torch             the module as it is: one process, two threads
torch-pipelining  two processes of one thread, a GPipe schedule over gloo; cut where the measured times of the pieces
                  are balanced best
mpinfer-1x2       two ranks of one thread, as the stages of one replica; cut by mpinfer's planner
mpinfer-2x1       two ranks of one thread, as two replicas
mpinfer-...-auto  the same in batches of the size that mpinfer chooses

The ratio to 2x1 is to the one in the same batches.

Start-up, loading and a warm-up are not timed. There are as many records as two cores should take `--seconds` for, by
the measured times of the pieces. Systems are run in turn, round after round; medians are shown with the lowest and the
highest. "off by" is the largest difference of any output to plain torch's, as a share of the largest output.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from compare import machine, print_table, reason, spread

from models import BATCH, MODELS, RECORDS, STEP

ROOT = Path(__file__).resolve().parent.parent
CORES = sorted(os.sched_getaffinity(0))[:2]
SYSTEMS = ["torch", "torch-pipelining", "mpinfer-1x2", "mpinfer-2x1", "mpinfer-1x2-auto", "mpinfer-2x1-auto"]
TOLERANCE = 1e-3  # of outputs, as a share of the largest
LIMIT_S = 120.0  # of a process, besides ten times what its records should take


@dataclass(frozen=True)
class Work:
    """One model, and how much of it."""

    model: str
    records: int
    cut: int  # pieces of the first stage in torch's pipelining
    limit_s: float  # of a process
    scratch: Path


@dataclass(frozen=True)
class Run:
    """One run of one system, or why there is none."""

    wall_s: float = 0.0
    outputs: np.ndarray | None = None  # [records, ...] of all records or of the last batch: they are the same 8 again
    timing: dict[str, Any] | None = None  # mpinfer's timing.json
    plan: str = ""  # mpinfer's, for people
    error: str = ""

    def off_by(self, expected: np.ndarray) -> float:
        """The largest difference to the outputs of a batch, as a share of the largest of them."""
        assert self.outputs is not None
        batches = self.outputs.reshape(-1, *expected.shape)
        return float(np.abs(batches - expected).max() / np.abs(expected).max())


def say(text: str) -> None:
    print(f"encoders: {text}", file=sys.stderr, flush=True)


# Systems


def execute(work: Work, system: str) -> Run:
    with tempfile.TemporaryDirectory(dir=work.scratch) as directory:
        if system.startswith("mpinfer-"):
            return run_mpinfer(work, system.removeprefix("mpinfer-"), Path(directory))
        return run_torch(work, system, Path(directory))


def run_torch(work: Work, system: str, directory: Path) -> Run:
    out = directory / "out.npy"
    arguments = [work.model, str(work.records), str(out)]
    if system == "torch":
        done = call([script("whole", *arguments)], {"OMP_NUM_THREADS": str(len(CORES))}, work.limit_s)
    else:
        arguments += [str(work.cut), str(directory / "rendezvous")]
        ranks = [script("stage", *arguments, str(rank)) for rank in range(len(CORES))]
        done = call(ranks, {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, work.limit_s)
    for each in done:
        if each.returncode:
            return Run(error=reason(each))
    return Run(max(figures(each)["wall_s"] for each in done), np.load(out))


def script(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.pipelining_run", *arguments]


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_mpinfer(work: Work, layout: str, directory: Path) -> Run:
    layout, _, chooses = layout.partition("-")
    replicas, stages = map(int, layout.split("x"))
    output, job = directory / "out", directory / "job.yaml"
    sections = {
        "model": {"path": f"benchmarks.models:{work.model}", "task": "forward", "dtype": "float32"},
        "input": {"path": f"benchmarks.models:{work.model}_records"},
        "output": {"path": str(output), "arrays": "npy"},
        "parallel": {"replicas": replicas, "stages": stages, "micro_batch": chooses or BATCH},
    }
    job.write_text(json.dumps(sections))  # JSON is YAML
    command = [sys.executable, "-m", "mpinfer", "launch", "-n", str(replicas * stages), str(job)]
    (done,) = call([command], {RECORDS: str(work.records)}, work.limit_s)
    if done.returncode:
        return Run(error=reason(done))
    results = [json.loads(line)["output"]["output"] for line in (output / "results.jsonl").read_text().splitlines()]
    shards = {name: np.load(output / name) for name in {result["file"] for result in results}}
    outputs = np.stack([shards[result["file"]][result["row"]] for result in results])
    timing = json.loads((output / "timing.json").read_text())
    plan = done.stderr.partition("mpinfer: plan: ")[2].partition("mpinfer: ")[0].strip()
    return Run(timing["wall_s"], outputs, timing, plan)


def call(
    commands: Sequence[list[str]], environment: dict[str, str], limit_s: float
) -> list[subprocess.CompletedProcess[str]]:
    """Run programs side by side; those that have not ended after `limit_s` are ended."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(each, cwd=ROOT, env=inherited | environment, **pipes) for each in commands]
    deadline = time.monotonic() + limit_s
    return [finish(process, deadline) for process in processes]


def finish(process: subprocess.Popen[str], deadline: float) -> subprocess.CompletedProcess[str]:
    try:
        output, errors = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()  # of a launcher: it ends its ranks
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode or 1, "", "error: out of time")
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def rounds(work: Work, repeats: int) -> dict[str, list[Run]]:
    """All runs of each system: round after round, so that a slow spell of the machine hits all."""
    runs: dict[str, list[Run]] = {system: [] for system in SYSTEMS}
    for repeat in range(repeats):
        for system, done in runs.items():
            if done and done[-1].error:
                continue  # it would fail again
            done.append(execute(work, system))
            say(f"{work.model}, round {repeat + 1}, {system}: {done[-1].error or f'{done[-1].wall_s:.2f} s'}")
    return runs


# Figures and tables


def section(model: str, seconds: float, repeats: int, scratch: Path) -> dict[str, Any]:
    """All systems on one model."""
    (done,) = call([script("pieces", model)], {"OMP_NUM_THREADS": "1"}, LIMIT_S)
    if done.returncode:
        sys.exit(f"encoders: {model}: {reason(done)}")
    pieces = figures(done)
    before = list(accumulate(pieces.values()))
    cut = min(range(1, len(pieces)), key=lambda cut: abs(before[-1] - 2 * before[cut - 1]))
    steps = max(1, round(len(CORES) * seconds / (STEP * before[-1])))
    work = Work(model, steps * STEP * BATCH, cut, LIMIT_S + 10 * seconds, scratch)
    runs = rounds(work, repeats)
    expected = runs["torch"][-1].outputs
    if expected is None:
        sys.exit(f"encoders: {model}: torch: {runs['torch'][-1].error}")
    print_rates(work, runs, expected)
    names, share = list(pieces), before[cut - 1] / before[-1]
    print(f"  torch-pipelining: {names[0]} .. {names[cut - 1]} {share:.1%} of the time measured alone, ", end="")
    print(f"{names[cut]} .. {names[-1]} {1 - share:.1%}")
    print_plans(runs["mpinfer-1x2"])
    return {
        "records": work.records,
        "pieces_s": pieces,
        "cut": cut,
        "runs": {
            system: [{"wall_s": run.wall_s, "plan": run.plan, "timing": run.timing, "error": run.error} for run in done]
            for system, done in runs.items()
        },
    }


def print_rates(work: Work, runs: dict[str, list[Run]], expected: np.ndarray) -> None:
    rates = {system: [work.records / run.wall_s for run in done] for system, done in runs.items() if not done[-1].error}
    medians = {system: statistics.median(each) for system, each in rates.items()}
    rows = []
    for system, done in runs.items():
        replicas = "mpinfer-2x1-auto" if system.endswith("-auto") else "mpinfer-2x1"
        bases = {"/torch": "torch", "/pipelining": "torch-pipelining", "/2x1": replicas}
        if system not in rates:
            rows.append([system, done[-1].error])
            continue
        ratios = [f"{medians[system] / medians[base]:.2f}" if base in medians else "-" for base in bases.values()]
        bubbles = [run.timing["bubble"] for run in done if run.timing]
        bubble = f"{statistics.median(bubbles):.1%}" if bubbles else "-"
        off_by = max(run.off_by(expected) for run in done)
        wrong = "  WRONG" if off_by > TOLERANCE else ""
        rows.append([system, *spread(rates[system]), *ratios, bubble, f"{off_by:.0e}{wrong}"])
    columns = ["system", "records/s", "min..max", *bases, "bubble", "off by"]
    print_table(f"{work.model}: {work.records} records in batches of {BATCH}", columns, rows)


def print_plans(done: list[Run]) -> None:
    """Of mpinfer in two stages: it measures before it cuts, and so may cut elsewhere in another round."""
    plans: dict[tuple[int, ...], list[Run]] = {}
    for run in done:
        if run.timing:
            plans.setdefault(tuple(run.timing["plan"]["cuts"]), []).append(run)
    for same in plans.values():
        print(f"  mpinfer-1x2, {len(same)} of {len(done)} rounds: {same[0].plan}".replace("\n", "\n    "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="that a run should take (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    models = options.models.split(",")
    for model in models:
        if model not in MODELS:
            parser.error(f"{model}: must be one of {', '.join(MODELS)}")
    if len(CORES) < 2:
        parser.error("one core: two are needed")
    os.sched_setaffinity(0, CORES)  # of all that is started here

    facts = machine() | {"cores": CORES}
    print(shlex.join(["python", *sys.argv]))
    print(f"{facts['cpu']} ({' '.join(facts['flags'])}), cores {CORES[0]} and {CORES[1]}; ", end="")
    print(f"python {facts['versions']['python']}, torch {facts['versions']['torch']}", flush=True)
    results: dict[str, Any] = {"command": sys.argv, "machine": facts}
    with tempfile.TemporaryDirectory() as scratch:
        for model in models:
            results[model] = section(model, options.seconds, options.repeats, Path(scratch))
            if options.json:
                options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
