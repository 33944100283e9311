"""The same records under every strategy, on every number of ranks: worlds started one after another, and compared.

`bench.json` holds what a laboratory found. Its top level:

- `command`, `date`, `job`, `scaling` (`strong`: the same records on any number of ranks; `weak`: as many for each
  rank), `repeats`, `reference` (a strategy), `strategies` (what each is, by name), `fake_weights`, `excluded` (what no
  figure has in it)
- `machine`: `cpu`, `cores`, `memory_bytes`, `hosts` (how many), and the versions of software that ran
- `bounds`: `error` and `tie`, see `comparison.py`
- `rows`: one for each strategy on each number of ranks, flat, in the order of the table; see `_row`
- `runs`: one for each world that was started: `strategy`, `ranks`, `round`, `directory`, and the figures of the run

Figures of a row are medians over its runs. A row whose `status` is not `complete` has none, but a `problem`: `failed`
ran and did not complete, `skipped` was not started.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpinfer.errors import ExitCode, OutputError, SpecError
from mpinfer.experiments.cell import Cell, RunFailed, Start
from mpinfer.experiments.comparison import ERROR_BOUND, TIE_BOUND
from mpinfer.experiments.machine import machine_facts
from mpinfer.experiments.quality import Judge
from mpinfer.experiments.strategies import Strategy
from mpinfer.experiments.table import as_markdown, as_text
from mpinfer.preview import FirstLook
from mpinfer.records.files import make_directory, output_errors, read_manifest, write_atomically
from mpinfer.spec import FAKE, load_spec

RUNS = "runs"
EXCLUDED = "start-up, measuring ranks and links, loading, and the steps that each stage times as its warm-up"


@dataclass(frozen=True)
class Experiment:
    """What is to be compared."""

    command: str  # as it was typed
    job: str
    overrides: tuple[str, ...]
    strategies: tuple[Strategy, ...]
    ranks: tuple[int, ...]
    repeats: int
    reference: str | None  # a strategy; None, or if it does not complete: the first that does
    weak: bool
    output: Path

    @property
    def runs(self) -> Path:
        """Directory of the outputs of runs, and of what they printed."""
        return self.output / RUNS

    def __post_init__(self) -> None:
        names = [strategy.name for strategy in self.strategies]
        if self.reference is not None and self.reference not in names:
            raise SpecError(
                f"--reference {self.reference}: is not among the strategies that run; give one of {', '.join(names)}"
            )


def run_laboratory(experiment: Experiment, start: Start) -> ExitCode:
    """Compare, print the table, and leave `bench.json` and `bench.md`. Raises `MpinferError` for a job that no strategy
    can run, or a directory that cannot be used."""
    look = FirstLook.at(load_spec(experiment.job, experiment.overrides))
    cells = list(_cells(experiment, len(look.records)))
    _prepare(experiment.output)
    interrupted = False
    try:
        for number in range(experiment.repeats):
            for cell in cells:
                if cell.twin is None and not cell.problem:
                    _run(experiment, cell, number, start)
                    _save(experiment, cells, None)
        judge = _judge(experiment, look, cells, start)
    except KeyboardInterrupt:
        print("mpinfer: bench: told to stop; what has been measured follows", file=sys.stderr, flush=True)
        judge, interrupted = _judge(experiment, look, cells, None), True
    report = _save(experiment, cells, judge)
    write_atomically(experiment.output / "bench.md", as_markdown(report).encode())
    print(as_text(report), flush=True)
    print(f"mpinfer: {experiment.output}: bench.json, bench.md and all runs", file=sys.stderr)
    if interrupted:
        return ExitCode.INTERRUPTED
    if judge is None:
        return ExitCode.BAD_INPUT
    return ExitCode.RECORDS_FAILED if judge.alarms else ExitCode.COMPLETE


def _cells(experiment: Experiment, records: int) -> Iterator[Cell]:
    """Every strategy on every number of ranks."""
    most = max(experiment.ranks)
    if experiment.weak and records < most:
        raise SpecError(f"--weak: {records} records are not enough for {most} ranks; give more, or fewer ranks")
    made: list[Cell] = []
    for ranks in experiment.ranks:
        limit = [f"input.limit={records // most * ranks}"] if experiment.weak else []
        for strategy in experiment.strategies:
            cell = Cell(strategy.name, ranks, problem=strategy.misfit(ranks))
            if not cell.problem:
                settings = [f"{key}={json.dumps(value)}" for key, value in strategy.on(ranks).items()]
                cell.overrides = [*experiment.overrides, *limit, "output.responses=auto", *settings]
                try:
                    cell.spec = load_spec(experiment.job, cell.overrides)
                except SpecError as error:
                    cell.problem = str(error)
            cell.twin = next(
                (c for c in made if c.spec and (c.ranks, c.spec) == (ranks, cell.spec) and not c.twin), None
            )
            made.append(cell)
            yield cell


def _prepare(output: Path) -> None:
    """Make the directory of a laboratory, for which there must be none."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: is there already, and not empty; give another --output, or remove it")
    with output_errors(output):
        make_directory(output / RUNS)


def _run(experiment: Experiment, cell: Cell, number: int, start: Start) -> None:
    """One world; a failure is the cell's problem, and no reason to stop."""
    name = f"{cell.strategy} on {cell.ranks} rank{'s' * (cell.ranks > 1)}"
    directory = experiment.runs / f"{cell.strategy}-{cell.ranks}-{number + 1}"
    try:
        start(cell.ranks, cell.overrides, directory)
        cell.runs.append({"round": number + 1, "directory": str(directory), **_figures(directory)})
        outcome = f"{cell.runs[-1]['wall_s']:.2f} s"
    except RunFailed as error:
        cell.problem = outcome = str(error)
    print(f"mpinfer: bench: round {number + 1} of {experiment.repeats}, {name}: {outcome}", file=sys.stderr, flush=True)


_AS_THEY_ARE = (
    "wall_s",
    "records_per_s",
    "tokens_per_s",
    "all_tokens_per_s",
    "bubble",
    "overlap",
    "imbalance",
    "start_s",
    "load_s",
    "predicted_wall_s",
    "planned_wall_s",
)


def _figures(directory: Path) -> dict[str, Any]:
    """Of one run, flat."""
    timing = json.loads((directory / "timing.json").read_text(encoding="utf-8"))
    manifest = read_manifest(directory) or {}
    ranks, plan = timing["ranks"], timing["plan"]
    alike = len({(layout["stages"], layout["shards"]) for layout in plan["layouts"]}) == 1
    return {
        **{name: timing[name] for name in _AS_THEY_ARE},
        "layout": f"{plan['replicas']}x{plan['stages']}x{plan['shards']}" if alike else f"{plan['replicas']} unequal",
        "replicas": plan["replicas"],
        "stages": plan["stages"],
        "shards": plan["shards"],
        "records": timing["records"],
        "failed_records": manifest.get("failed", 0),
        "cores": _cores(ranks),
        "hosts": len({rank["host"] for rank in ranks}),
        "peak_memory_bytes": max(rank["peak_memory_bytes"] for rank in ranks),
        "weight_bytes": max(rank["weight_bytes"] for rank in ranks),
        "bytes_sent": sum(rank["bytes_sent"] for rank in ranks),
        "versions": manifest.get("versions", {}),
    }


def _cores(ranks: Sequence[dict[str, Any]]) -> int:
    """That compute: of each host no more than it has, and no more than there are threads."""
    by_host: dict[str, list[dict[str, Any]]] = {}
    for rank in ranks:
        by_host.setdefault(rank["host"], []).append(rank)
    return sum(
        min(sum(rank["threads"] for rank in own), len({core for rank in own for core in rank["cores"]}))
        for own in by_host.values()
    )


def _judge(experiment: Experiment, look: FirstLook, cells: Sequence[Cell], start: Start | None) -> Judge | None:
    """Outputs beside the reference's; None where nothing completed. Without `start` nothing more is run for it."""
    names = [strategy.name for strategy in experiment.strategies]
    wanted = names if experiment.reference is None else [experiment.reference, *names]
    complete = [cell for cell in cells if cell.is_complete]
    for name in wanted:
        if own := [cell for cell in complete if cell.strategy == name]:
            judge = Judge(look, max(own, key=lambda cell: cell.own.runs[0]["records"]), experiment.runs, start)
            for cell in complete:
                judge.look_at(cell)
            judge.score(complete)
            return judge
    return None


def _save(experiment: Experiment, cells: Sequence[Cell], judge: Judge | None) -> dict[str, Any]:
    """Write `bench.json`; returns what is in it."""
    runs = [
        {"strategy": cell.strategy, "ranks": cell.ranks, **{k: v for k, v in run.items() if k != "versions"}}
        for cell in cells
        for run in cell.runs
    ]
    first = next((cell for cell in cells if cell.is_complete), None)
    versions = first.own.runs[0]["versions"] if first else {}
    spec = load_spec(experiment.job, experiment.overrides)
    reference = judge.reference if judge is not None else first
    report = {
        "command": experiment.command,
        "date": time.strftime("%Y-%m-%d"),
        "job": experiment.job,
        "scaling": "weak" if experiment.weak else "strong",
        "repeats": experiment.repeats,
        "reference": reference.strategy if reference else None,
        "strategies": {strategy.name: strategy.about for strategy in experiment.strategies},
        "fake_weights": spec.model.weights == FAKE,
        "excluded": EXCLUDED,
        "machine": {**machine_facts(), "hosts": max((run["hosts"] for run in runs), default=1), **versions},
        "bounds": {"error": ERROR_BOUND[spec.model.dtype], "tie": TIE_BOUND[spec.model.dtype]},
        "rows": [_row(cell, reference, cells, judge) for cell in cells],
        "runs": runs,
    }
    data = json.dumps(report, indent=2, allow_nan=False).encode() + b"\n"
    write_atomically(experiment.output / "bench.json", data)
    return report


def _row(cell: Cell, reference: Cell | None, cells: Sequence[Cell], judge: Judge | None) -> dict[str, Any]:
    """A line of the table.

    `speed_up`: of records a second, over the reference strategy on the fewest ranks; `ideal`: as much as the cores that
    compute are more than there; `efficiency`: the one in the other.
    """
    row: dict[str, Any] = {"strategy": cell.strategy, "ranks": cell.ranks}
    if not cell.is_complete:
        problem = cell.own.problem
        return {**row, "status": "failed" if cell.spec and problem else "skipped", "problem": problem or "has not run"}
    runs = cell.own.runs
    row |= {"status": "complete", "problem": cell.own.problem, "runs": len(runs)}
    row["same_runs_as"] = cell.twin.strategy if cell.twin else None
    for name, value in runs[0].items():
        if name in _AS_THEY_ARE or name.endswith("_bytes") or name == "bytes_sent":
            row[name] = _median([run[name] for run in runs])
        elif name not in ("round", "directory", "versions"):
            row[name] = value
    walls = [run["wall_s"] for run in runs]
    row |= {"wall_lowest_s": min(walls), "wall_highest_s": max(walls)}
    row["prediction_error"] = row["predicted_wall_s"] / row["wall_s"] - 1
    row["planning_error"] = row["planned_wall_s"] / row["wall_s"] - 1
    assert reference is not None
    base = min((c for c in cells if c.is_complete and c.strategy == reference.strategy), key=lambda c: c.ranks).own.runs
    row["speed_up"] = row["records_per_s"] / _median([run["records_per_s"] for run in base])
    row["ideal"] = row["cores"] / base[0]["cores"]
    row["efficiency"] = row["speed_up"] / row["ideal"]
    return row | (judge.verdicts[cell.own] if judge is not None else {})


def _median(values: Sequence[float | None]) -> Any:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
