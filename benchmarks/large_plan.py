"""How long it takes to plan a model and a cluster that nobody here has: Llama 3 70B's shape, 1,024 ranks of 128 nodes.

    .venv/bin/python benchmarks/large_plan.py [--records 100000] [--rounds 3]

One process, without MPI: `mpinfer plan` on a described cluster. Times are of the whole command, start-up included.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median

import yaml
from planned_jobs import ROOT

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
NODES, RANKS = 128, 1024
CLUSTER = {
    "nodes": [{"count": NODES, "cores": 64, "memory_gb": 256, "ranks": RANKS // NODES}],
    "links": {"inside": {"latency_us": 1, "gb_per_s": 20}, "between": {"latency_us": 2, "gb_per_s": 12}},
    "rank": {"gflops": 900, "memory_gb_per_s": 40},  # else layers of this size would be timed here
}
MOST_TOKENS = 300  # of a prompt


def write_job(directory: Path, records: int) -> Path:
    random = Random(70)
    (directory / "config.json").write_text(json.dumps(SHAPE))
    (directory / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    with (directory / "records.jsonl").open("w") as file:
        for number in range(records):
            tokens = [random.randrange(3, 100_000) for _ in range(random.randint(2, MOST_TOKENS))]
            file.write(json.dumps({"id": number, "token_ids": tokens}) + "\n")
    job = {
        "model": {"path": str(directory), "dtype": "bfloat16", "weights": "fake"},
        "input": {"path": str(directory / "records.jsonl")},
        "output": {"path": str(directory / "out")},
        "generate": {"max_new_tokens": 128},
    }
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        job = write_job(Path(temporary), options.records)
        cluster = str(Path(temporary) / "cluster.yaml")
        command = [sys.executable, "-m", "mpinfer", "plan", str(job), "--ranks", str(RANKS), "--cluster", cluster]
        walls_s, cpus_s = [], []
        for _ in range(options.rounds):
            started, used = time.perf_counter(), _cpu_s()
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
            walls_s.append(time.perf_counter() - started)
            cpus_s.append(_cpu_s() - used)
            if done.returncode:
                sys.exit(done.stderr)
        size_mb = (Path(temporary) / "records.jsonl").stat().st_size / 1e6
    print(done.stdout)
    print(
        f"{options.records} records of {size_mb:.0f} MB, {RANKS} ranks of {NODES} nodes: planned in "
        f"{median(walls_s):.2f} s, {median(cpus_s):.2f} s of CPU (medians of {options.rounds})"
    )


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
