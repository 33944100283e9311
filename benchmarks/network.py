"""A pipeline of two stages over links of several kinds, beside one in shared memory.

    .venv/bin/python benchmarks/network.py [--cases hosts 1gbit] [--rounds 3] [--records 256]

SmolLM2, one replica of two stages on one core each, the same in every case; hosts are those of tests/lab.py, which need
root. Cases run in turn, round after round; medians are shown, and of the ratios of a round to `memory` in the same one.
A delay takes CPU time of its own on this machine.

`link` is what a run measured between the hosts before it planned, `groups` how many it then had in flight. `sending` is
how long messages were on their way, from start to the poll that found them sent, `waited` how long ranks waited for
them, and `overlap` the share of `sending` in which nobody did; `receiving` is how long ranks waited for messages, the
bubble included. `same` counts records whose result is that of `memory`, to the byte.
"""

import argparse
import json
import re
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from planned_jobs import ROOT, call, settings, write_job


@dataclass(frozen=True)
class Case:
    lab: tuple[str, ...] | None = ()  # options of tests/lab.py; None: both ranks on this host
    given: dict[str, Any] = field(default_factory=dict)  # settings of the job


MEMORY = "memory"
CASES = {
    MEMORY: Case(None),
    "hosts": Case(),
    "1gbit": Case(("--rate-mbit", "1000")),
    "1gbit-blocking": Case(("--rate-mbit", "1000"), {"transport.blocking": "true"}),
    "100mbit": Case(("--rate-mbit", "100")),
    "100mbit-int8": Case(("--rate-mbit", "100"), {"transport.wire": "int8"}),
    "delay-0.5ms": Case(("--delay-ms", "0.5")),
    "delay-5ms": Case(("--delay-ms", "5")),
    "loss-1%": Case(("--loss-percent", "1")),
}


@dataclass(frozen=True)
class Outcome:
    timing: dict[str, Any]
    results: list[str]  # a line a record
    link: str

    def summed(self, key: str) -> float:
        return sum(rank[key] for rank in self.timing["ranks"])


def measure(case: Case, job: Path, records: int, directory: Path) -> Outcome:
    given = {"parallel.replicas": 1, "parallel.stages": 2, **case.given}
    launch = [sys.executable, "-m", "mpinfer", "launch", "-n", "2", str(job), "--output", str(directory / "out")]
    launch += settings(given)
    if case.lab is not None:
        launch = [sys.executable, str(ROOT / "tests/lab.py"), *case.lab, "--", *launch, "--hosts", "h1,h2"]
    # Links that another case measured between hosts of these names are not this one's.
    printed = call(launch, records, {"XDG_CACHE_HOME": str(directory)})
    link = re.search(r"links: inside ([^;(]+)(?:; between nodes ([^(]+))?", printed)
    assert link is not None, printed
    timing = json.loads((directory / "out/timing.json").read_text())
    results = (directory / "out/results.jsonl").read_text().splitlines()
    return Outcome(timing, results, (link[2] or link[1]).strip())


def show(outcomes: dict[str, list[Outcome]]) -> None:
    print(f"\n{'case':<15} {'wall':>8} {'of memory':>9} {'predicted':>9} {'link':>20} {'groups':>6} ", end="")
    print(f"{'sending':>8} {'waited':>7} {'overlap':>7} {'receiving':>9} {'sent':>8}  same")
    base = outcomes.get(MEMORY)
    for name, rounds in outcomes.items():
        wall_s = median(outcome.timing["wall_s"] for outcome in rounds)
        predicted = median(outcome.timing["predicted_wall_s"] / outcome.timing["wall_s"] - 1 for outcome in rounds)
        ratio = same = ""
        if base:
            pairs = list(zip(rounds, base, strict=True))
            ratio = f"{median(own.timing['wall_s'] / first.timing['wall_s'] for own, first in pairs):.3f}"
            equal = min(sum(a == b for a, b in zip(own.results, base[0].results, strict=True)) for own in rounds)
            same = f"{equal} of {len(base[0].results)}"
        groups = "/".join(str(n) for n in sorted({outcome.timing["plan"]["in_flight"] for outcome in rounds}))
        sending, waited, receiving = (
            median(outcome.summed(key) for outcome in rounds)
            for key in ("in_flight_s", "send_wait_s", "receive_wait_s")
        )
        overlap = median(outcome.timing["overlap"] for outcome in rounds)
        sent = median(outcome.summed("bytes_sent") for outcome in rounds) / 1e6
        print(f"{name:<15} {wall_s:>7.2f}s {ratio:>9} {predicted:>+9.1%} {rounds[0].link:>20} {groups:>6} ", end="")
        print(f"{sending:>7.2f}s {waited:>6.2f}s {overlap:>7.1%} {receiving:>8.2f}s {sent:>5.1f} MB  {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--records", type=int, default=256, help="(%(default)s)")
    options = parser.parse_args()
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        job = write_job("smollm2", options.records, Path(temporary))
        for number in range(options.rounds):
            for name in options.cases:
                directory = Path(temporary) / f"{name}-{number}"
                directory.mkdir()
                outcomes[name].append(measure(CASES[name], job, options.records, directory))
                print(f"round {number}: {name} {outcomes[name][-1].timing['wall_s']:.2f} s", flush=True)
    show(outcomes)


if __name__ == "__main__":
    main()
