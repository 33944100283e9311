"""Every layout of a few ranks, as predicted and as measured, and which one mpinfer chooses.

    .venv/bin/python benchmarks/layouts.py [--jobs smollm2 efficientnet] [--ranks 1 2 4] [--rounds 3]

Layouts run in turn, round after round; medians of the wall are shown with the lowest and the highest. `planned` is the
prediction from which a layout is chosen, `predicted` the one after loading, both as medians; their errors are against
the median wall. What is chosen is asked once a round (`--dry-run`), since every run measures the ranks anew.
"""

import argparse
import json
import re
import statistics
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from planned_jobs import SECTIONS, Shape, mpinfer, run, write_job

RECORDS = {"smollm2": 64, "efficientnet": 2048}


def layouts(job: Path, ranks: int, records: int) -> list[Shape]:
    """Those that are possible, as replicas, stages, shards."""
    printed = mpinfer(["plan", str(job), "--ranks", str(ranks), "--json"], records)
    tree = json.loads(printed[printed.index("{") :])
    names = [candidate["layout"] for candidate in tree["candidates"] if "predicted_wall_s" in candidate]
    return sorted(_shape(name) for name in names if "+" not in name)


def chosen(job: Path, ranks: int, records: int) -> Shape:
    printed = mpinfer(["launch", "-n", str(ranks), str(job), "--dry-run"], records)
    line = next(line for line in printed.splitlines() if "plan: " in line)
    return _shape(line.partition("plan: ")[2])


def measure(name: str, numbers: list[int], rounds: int, records: int, directory: Path) -> None:
    job = write_job(name, records, directory)
    shapes = {ranks: layouts(job, ranks, records) for ranks in numbers}
    timings: dict[Shape, list[dict[str, Any]]] = defaultdict(list)
    choices: dict[int, Counter[Shape]] = defaultdict(Counter)
    for number in range(rounds):
        for ranks in numbers:
            for shape in shapes[ranks]:
                output = directory / f"{name}-{'x'.join(map(str, shape))}-{number}"
                timings[shape].append(run(job, shape, records, output))
            choices[ranks][chosen(job, ranks, records)] += 1
    print(f"\n{name}: {records} records, {rounds} rounds")
    print(f"{'ranks':>5} {'layout':<8} {'wall':>8} {'lowest':>8} {'highest':>8} {'planned':>8} {'error':>7}", end="")
    print(f" {'predicted':>9} {'error':>7}  chosen")
    for ranks in numbers:
        medians = {shape: _median(timings[shape], "wall_s") for shape in shapes[ranks]}
        for shape, wall_s in medians.items():
            walls = [timing["wall_s"] for timing in timings[shape]]
            planned, predicted = (_median(timings[shape], f"{which}_wall_s") for which in ("planned", "predicted"))
            print(f"{ranks:>5} {'x'.join(map(str, shape)):<8} {wall_s:>7.2f}s {min(walls):>7.2f}s", end="")
            print(f" {max(walls):>7.2f}s {planned:>7.2f}s {planned / wall_s - 1:>+7.1%} {predicted:>8.2f}s", end="")
            print(f" {predicted / wall_s - 1:>+7.1%}  {choices[ranks][shape] or ''}")
        best = min(medians.values())
        for shape, times in choices[ranks].items():
            print(f"      chosen {times} of {rounds}: {'x'.join(map(str, shape))}", end="")
            print(
                f", {medians[shape] / best - 1:+.1%} of the best" if shape in medians else ", not measured", flush=True
            )


def _median(timings: list[dict[str, Any]], key: str) -> float:
    return statistics.median(timing[key] for timing in timings)


def _shape(name: str) -> Shape:
    replicas, stages, shards = map(int, re.findall("[0-9]+", name)[:3])
    return replicas, stages, shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for name in options.jobs:
            measure(name, options.ranks, options.rounds, RECORDS[name], Path(directory))


if __name__ == "__main__":
    main()
