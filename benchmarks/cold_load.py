"""What loading SmolLM2 reads and what of it comes from storage, when the node's page cache does not hold its weights.

    .venv/bin/python benchmarks/cold_load.py [--layouts 4x1x1 1x4x1 1x1x3]

Every rank reads the tensors of its own part. Ranks of a node that read the same ones share the page cache, so that each
byte is fetched once a node: `fetched` is the kernel's own count (`read_bytes` of /proc/self/io), summed over ranks.
"""

import argparse
import os
import tempfile
from pathlib import Path

from planned_jobs import ROOT, run, write_job

WEIGHTS = ROOT / "models/smollm2-135m/model.safetensors"
RECORDS = 8


def forget(path: Path) -> None:
    """Have the page cache drop a file."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["4x1x1", "1x4x1", "1x1x3"], metavar="RxSxS")
    layouts = parser.parse_args().layouts
    stored = WEIGHTS.stat().st_size
    print(f"{WEIGHTS.name}: {stored / 1e6:.0f} MB stored\nlayout     read  fetched  of what is stored")
    with tempfile.TemporaryDirectory() as directory:
        job = write_job("smollm2", RECORDS, Path(directory))
        for layout in layouts:
            replicas, stages, shards = map(int, layout.split("x"))
            forget(WEIGHTS)
            given = {"generate.max_new_tokens": 4}
            ranks = run(job, (replicas, stages, shards), RECORDS, Path(directory) / layout, given)["ranks"]
            read, fetched = (sum(rank[key] for rank in ranks) for key in ("read_bytes", "storage_bytes"))
            print(f"{layout:<7} {read / 1e6:>5.0f} MB {fetched / 1e6:>5.0f} MB  {fetched / stored:.2f}", flush=True)


if __name__ == "__main__":
    main()
