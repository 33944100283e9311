"""What a record costs apart from the model: many tiny ones through a tiny model.

    .venv/bin/python benchmarks/tiny_records.py

Records per second (hand-out, preparation, results, journal and arrays on disk; start-up and load not counted) and the
peak memory of rank 0, for a tenth of the records and for all, on one rank and on two.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from torch import nn

ROOT = Path(__file__).resolve().parent.parent


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def run(ranks: int, records: int, directory: Path) -> tuple[float, float]:
    """Records per second and megabytes of rank 0."""
    output, job, rows = directory / f"{ranks}-{records}", directory / "job.yaml", directory / "rows.npy"
    np.save(rows, np.random.default_rng(0).random((records, 8), dtype=np.float32))
    sections = {
        "model": {"path": "benchmarks.tiny_records:model", "task": "forward"},
        "input": {"path": str(rows)},
        "output": {"path": str(output)},
    }
    job.write_text(json.dumps(sections))  # JSON is YAML
    command = [sys.executable, "-m", "mpinfer", "launch", "-n", str(ranks), str(job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(done.stderr)
    timing = json.loads((output / "timing.json").read_text())
    return timing["records_per_s"], timing["ranks"][0]["peak_memory_bytes"] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000, help="(%(default)s)")
    options = parser.parse_args()
    print(f"{'ranks':>5} {'records':>8} {'records/s':>10} {'rank 0':>8}")
    with tempfile.TemporaryDirectory() as directory:
        for ranks in (1, 2):
            for records in (options.records // 10, options.records):
                rate, megabytes = run(ranks, records, Path(directory))
                print(f"{ranks:>5} {records:>8} {rate:>10.0f} {megabytes:>5.0f} MB", flush=True)


if __name__ == "__main__":
    main()
