"""Four ranks of which one is three times slower, as replicas and as stages, beside the ideal and an even static split.

    .venv/bin/python benchmarks/uneven.py [--jobs smollm2 efficientnet] [--rounds 3]

A rank has 0.42 of a core's speed, the slow one 0.14 (paced.py): four processors of their own on two cores. Nothing is
declared: mpinfer finds the slow rank. There are two ideals for the summed speed: by what a rank alone takes, which also
pays for smaller batches and for messages, and by what four equal ranks in the same layout take, which pays for nothing
but the slow rank. An even static split of the records is the slow rank alone with a quarter of them; one of the stages
is a run whose cluster file calls all ranks equal. Of 96 prompts four took the slow rank 9.6 s, longer than the whole
run should: so there are more. Needs Open MPI. Medians of a few rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from planned_jobs import ROOT, SECTIONS, call, settings, write_job

FAST, SLOWER, RANKS = 0.42, 3, 4
SLOW = FAST / SLOWER
EVERYONE, ALL_FAST = (FAST, FAST, SLOW, FAST), (FAST,) * RANKS
RECORDS = {"smollm2": 288, "efficientnet": 768}
EQUAL = {
    "nodes": [{"cores": RANKS, "ranks": RANKS, "memory_gb": 16}],
    "links": {"inside": {"latency_us": 1, "gb_per_s": 10}},
}


def run(job: Path, shares: Sequence[float], records: int, output: Path, given: dict[str, object]) -> float:
    """Seconds of a run by ranks with these shares of a core's speed."""
    launcher = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or "mpiexec"
    command = [launcher, "--bind-to", "none", "--oversubscribe"]
    arguments = ["run", str(job), "--output", str(output), *settings(given)]
    for place, share in enumerate(shares):
        paced = [sys.executable, str(ROOT / "benchmarks/paced.py"), str(share), *arguments]
        command += [":"] * (place > 0) + ["-n", "1", *paced]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    call(command, records, {**root, "OMP_NUM_THREADS": "1"})
    return json.loads((output / "timing.json").read_text())["wall_s"]


def measure(name: str, rounds: int, directory: Path) -> None:
    records = RECORDS[name]
    whole, quarter = (
        write_job(name, count, _folder(directory / f"{name}-{count}")) for count in (records, records // 4)
    )
    cluster = directory / "equal.yaml"
    cluster.write_text(json.dumps(EQUAL))
    stages = {"parallel.stages": RANKS, "parallel.in_flight": RANKS}
    runs = {
        "alone": (whole, [FAST], records, {}),
        "replicas, equal ranks": (whole, ALL_FAST, records, {"parallel.replicas": RANKS}),
        "replicas, even static split": (quarter, [SLOW], records // 4, {}),
        "replicas": (whole, EVERYONE, records, {"parallel.replicas": RANKS}),
        "stages, equal ranks": (whole, ALL_FAST, records, stages),
        "stages, even static split": (whole, EVERYONE, records, {**stages, "parallel.cluster": str(cluster)}),
        "stages": (whole, EVERYONE, records, stages),
    }
    walls: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        for title, (job, shares, count, given) in runs.items():
            output = directory / f"{name}-{title.replace(' ', '-')}-{number}"
            walls[title].append(run(job, shares, count, output, given))
    medians = {title: statistics.median(times) for title, times in walls.items()}
    speed = RANKS - 1 + 1 / SLOWER  # summed, in fast ranks
    print(f"\n{name}: {records} records, {rounds} rounds; beside the ideal by a rank alone and by four equal ranks")
    for title, wall_s in medians.items():
        low, high = min(walls[title]), max(walls[title])
        ideals = [medians["alone"] / speed]
        ideals += [medians[f"{way}, equal ranks"] * RANKS / speed for way in ("replicas", "stages") if way in title]
        beside = "".join(f"  {wall_s / ideal:>5.2f}" for ideal in ideals)
        print(f"{title:<28} {wall_s:>7.2f} s ({low:.2f} to {high:.2f}){beside}", flush=True)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for name in options.jobs:
            measure(name, options.rounds, Path(directory))


if __name__ == "__main__":
    main()
