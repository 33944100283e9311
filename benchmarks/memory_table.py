"""What each rank holds and how much memory it ever had, for 1, 2 and 4 stages of one replica.

    python benchmarks/memory_table.py jobs/quickstart.yaml

`rest` is the peak beyond the rank's own weights: interpreter, torch and transformers, the KV cache of its
layers, activations, and on the last stage the logits.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main(job: str) -> None:
    print(f"{'stages':>6} {'stage':>5} {'weights MB':>10} {'read MB':>8} {'peak MB':>8} {'rest MB':>8}")
    for stages in (1, 2, 4):
        with tempfile.TemporaryDirectory() as directory:
            layout = ["--set", f"parallel.stages={stages}", "--set", "parallel.replicas=1", "--output", directory]
            command = [sys.executable, "-m", "mpinfer", "launch", "-n", str(stages), job, *layout]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                sys.exit(run.stderr)
            ranks = json.loads((Path(directory) / "timing.json").read_text())["ranks"]
        for rank in ranks:
            weights, read, peak = (rank[key] / 1e6 for key in ("weight_bytes", "read_bytes", "peak_memory_bytes"))
            stage = rank["coordinates"]["stage"]
            print(f"{stages:>6} {stage:>5} {weights:>10.1f} {read:>8.1f} {peak:>8.0f} {peak - weights:>8.0f}")
        total = sum(rank["weight_bytes"] for rank in ranks) / 1e6
        print(f"{stages:>6}   all {total:>10.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
