"""What a token of a single sequence costs two shards of one thread each, beside one process with two threads.

    .venv/bin/python benchmarks/shard_latency.py [--rounds 5] [--tokens 128]

SmolLM2, one prompt, in turn; medians of the milliseconds a token, and of the rounds' ratios.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from planned_jobs import run, write_job


def token_ms(job: Path, shards: int, tokens: int, output: Path) -> float:
    """Of a run on two cores, milliseconds for each new token, the prompt included."""
    given = {"generate.max_new_tokens": tokens, "generate.min_new_tokens": tokens}
    timing = run(job, (1, 1, shards), 1, output, given, {"OMP_NUM_THREADS": str(2 // shards)})
    return 1000 * timing["wall_s"] / timing["new_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (%(default)s)")
    options = parser.parse_args()
    pairs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        job = write_job("smollm2", 1, Path(directory))
        for number in range(options.rounds):
            whole, sharded = (
                token_ms(job, shards, options.tokens, Path(directory) / f"{shards}-{number}") for shards in (1, 2)
            )
            print(f"round {number}: 1 process {whole:.2f} ms, 2 shards {sharded:.2f} ms", flush=True)
            pairs.append((whole, sharded))
    whole, sharded = (statistics.median(figures) for figures in zip(*pairs, strict=True))
    ratio = statistics.median(w / s for w, s in pairs)
    print(f"\n1 process, 2 threads: {whole:.2f} ms a token\n2 shards, 1 thread each: {sharded:.2f} ms a token")
    print(f"speed of the shards: {ratio:.3f} of the one process, median of {options.rounds} rounds")


if __name__ == "__main__":
    main()
