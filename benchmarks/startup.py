"""What a run's start takes, and whose it is: imports, one after the other, then the starts of runs of one record.

    .venv/bin/python benchmarks/startup.py [JOB.yaml] [--ranks 1 4 16] [--rounds 3]

The parts are those of `start` in `timing.json` (docs/observe.md), of rank 0; medians of a few rounds. Where ranks
outnumber cores they take turns at the same imports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from planned_jobs import ROOT, mpinfer, settings

IMPORTS = ("mpinfer.cli", "numpy", "mpinfer.transport.endpoint", "torch", "transformers.modeling_utils")
SHORT = {"parallel.replicas": "auto", "parallel.stages": "auto", "input.limit": 1, "generate.max_new_tokens": 1}

_TIMED = """
import importlib, json, sys, time
seconds = {}
for name in sys.argv[1:]:
    started = time.perf_counter()
    importlib.import_module(name)
    seconds[name] = time.perf_counter() - started
print(json.dumps(seconds))
"""


def imports() -> dict[str, float]:
    """Seconds of each, in one process, after those before it."""
    done = subprocess.run(
        [sys.executable, "-c", _TIMED, *IMPORTS], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return json.loads(done.stdout)


def start(job: str, ranks: int, output: Path) -> dict[str, float]:
    """Seconds of each part of a run's start."""
    mpinfer(["launch", "-n", str(ranks), job, "--output", str(output), *settings(SHORT)], records=1)
    timing: dict[str, Any] = json.loads((output / "timing.json").read_text())
    return {**timing["start"], "all": timing["start_s"], "load_s": timing["load_s"]}


def show(title: str, rounds: list[dict[str, float]]) -> None:
    parts = [f"{part.removesuffix('_s')} {median(one[part] for one in rounds):.2f}" for part in rounds[0]]
    print(f"{title:<10} {'  '.join(parts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="?", default="jobs/quickstart.yaml", help="(%(default)s)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 4, 16], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    options = parser.parse_args()
    show("imports", [imports() for _ in range(options.rounds)])
    with tempfile.TemporaryDirectory() as directory:
        for ranks in options.ranks:
            starts = [start(options.job, ranks, Path(directory, f"{ranks}-{n}")) for n in range(options.rounds)]
            show(f"{ranks} ranks", starts)


if __name__ == "__main__":
    main()
