"""Memory, open files and threads of every rank while very many tiny records go through: they should not grow.

    .venv/bin/python benchmarks/soak.py                                  # a million records over 4 ranks
    .venv/bin/python benchmarks/soak.py --records 10000000 --ranks 2     # what rank 0 holds of each record

Of each rank: resident memory, open file descriptors and threads, when a tenth of the records was done and at the end of
the loop, and the peak.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.tiny_records import ROOT

LOOK_EVERY_S = 1.0


def write_records(path: Path, records: int) -> None:
    with path.open("w") as file:
        for number in range(records):
            file.write(f'{{"id": "r{number}", "input": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, {number % 10}.5]}}\n')


def ranks_below(launcher: int) -> dict[int, Path]:
    """The processes of ranks, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(entry.partition(b"=")[::2] for entry in (path / "environ").read_bytes().split(b"\0"))
            program = (path / "cmdline").read_bytes()
        except OSError:
            continue
        rank = environment.get(b"OMPI_COMM_WORLD_RANK", environment.get(b"PMI_RANK"))
        if environment.get(b"MPINFER_SOAK") == str(launcher).encode() and rank and b"mpinfer\0run" in program:
            found[int(rank)] = path
    return found


def look(process: Path) -> tuple[int, int, int]:
    """Kilobytes, descriptors and threads of a process."""
    status = dict(line.partition(":")[::2] for line in (process / "status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]), len(os.listdir(process / "fd")), int(status["Threads"])


def journaled(output: Path) -> int:
    """Bytes of the journal: how far the run is."""
    journal = output / "journal.jsonl"
    return journal.stat().st_size if journal.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help="(%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        directory = Path(name)
        records, job, output = directory / "records.jsonl", directory / "job.yaml", directory / "out"
        write_records(records, options.records)
        sections = {
            "model": {"path": "benchmarks.tiny_records:model", "task": "classify"},
            "input": {"path": str(records.resolve())},
            "output": {"path": str(output.resolve())},
        }
        job.write_text(json.dumps(sections))  # JSON is YAML
        command = [sys.executable, "-m", "mpinfer", "launch", "-n", str(options.ranks), str(job.resolve())]
        world = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "MPINFER_SOAK": str(os.getpid())}, stdout=subprocess.DEVNULL
        )
        seen: dict[int, list[tuple[int, tuple[int, int, int]]]] = defaultdict(list)
        while world.poll() is None:
            for rank, process in ranks_below(os.getpid()).items():
                try:
                    seen[rank].append((journaled(output), look(process)))
                except OSError:
                    continue  # it has ended
            time.sleep(LOOK_EVERY_S)
        if world.returncode:
            sys.exit(f"the run ended with {world.returncode}")
        timing = json.loads((output / "timing.json").read_text())
        print(f"{timing['records']} records, {options.ranks} ranks, {timing['records_per_s']:.0f} records/s")
        print(f"{'rank':>4} {'at a tenth':>24} {'at the end':>24} {'growth':>7} {'peak':>8}")
        size = journaled(output)
        for rank, samples in sorted(seen.items()):
            early = next(sample for bytes_, sample in samples if bytes_ > size / 10)
            late = [sample for bytes_, sample in samples if bytes_ < 0.99 * size][-1]
            texts = [f"{kb / 1e3:.1f} MB {fds:>3} fd {threads:>2} th" for kb, fds, threads in (early, late)]
            peak = timing["ranks"][rank]["peak_memory_bytes"] / 1e6
            print(f"{rank:>4} {texts[0]:>24} {texts[1]:>24} {late[0] / early[0] - 1:>+7.1%} {peak:>5.0f} MB")


if __name__ == "__main__":
    main()
