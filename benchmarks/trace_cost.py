"""What it costs to record a run: with `output.trace`, without, and by what there is to record.

    .venv/bin/python benchmarks/trace_cost.py [--jobs smollm2] [--layouts 1x2x1 2x1x1] [--rounds 5]

Runs with and without spans take turns, in an order that changes every round. `ratio` is that of the median walls, with
the lowest and the highest of a round; it tells nothing smaller than what walls of one kind differ by (`spread`).
`counted` is an estimate: phases and messages of the busiest rank, each at what one costs in a process that does nothing
else, as a share of the wall. It has bins, which are always kept, but not what recording does to caches, nor what
every run does for `status.json`.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from timeit import timeit

from planned_jobs import SECTIONS, Shape, run, write_job

from mpinfer.observe.account import Account
from mpinfer.observe.recorder import Recorder

RECORDS = {"smollm2": 64, "efficientnet": 512}
CALLS = 200_000


def costs_s() -> tuple[float, float]:
    """Of a phase, beyond the two readings of the clock that an account takes anyway; of a message."""

    class Nothing(Recorder):
        def add(self, phase: int, start_s: float, end_s: float) -> None:
            pass

    def switch_s(recorder: Recorder) -> float:
        account = Account(recorder)
        return min(timeit(lambda: account.switch("compute"), number=CALLS) for _ in range(5)) / CALLS

    note = Recorder.of_world(2, trace=True).messages(0, 1, 1, sent=True)
    message_s = min(timeit(lambda: note(1), number=CALLS) for _ in range(5)) / CALLS
    return switch_s(Recorder.of_world(2, trace=True)) - switch_s(Nothing()), message_s


def recorded(output: Path) -> tuple[int, int]:
    """Phases and ends of messages of the rank that has most."""
    phases: dict[int, int] = {}
    messages: dict[int, int] = {}
    for event in json.loads((output / "trace.json").read_text())["traceEvents"]:
        if event["ph"] == "X":
            left_out = event["name"].partition(" phases left out")
            phases[event["pid"]] = phases.get(event["pid"], 0) + (int(left_out[0]) if left_out[1] else 1)
        elif event["ph"] in "sf":
            messages[event["pid"]] = messages.get(event["pid"], 0) + 1
    return max(phases.values()), max(messages.values(), default=0)


def measure(name: str, shape: Shape, rounds: int, directory: Path) -> None:
    job = write_job(name, RECORDS[name], directory)
    walls: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for trace in (True, False) if number % 2 else (False, True):
            output = directory / f"{name}-{'x'.join(map(str, shape))}-{number}-{trace}"
            walls[trace].append(run(job, shape, RECORDS[name], output, {"output.trace": trace})["wall_s"])
            if trace:
                phases, messages = recorded(output)
    phase_s, message_s = costs_s()
    with_s, without_s = (statistics.median(walls[trace]) for trace in (True, False))
    pairs = [on / off for on, off in zip(walls[True], walls[False], strict=True)]
    spread = max(walls[False]) / min(walls[False]) - 1
    counted = (phases * phase_s + messages * message_s) / with_s
    print(f"{name} {'x'.join(map(str, shape))}: {without_s:.2f} s without, {with_s:.2f} s with, ", end="")
    print(f"ratio {with_s / without_s:.3f} ({min(pairs):.3f} to {max(pairs):.3f}), spread {spread:.1%}; ", end="")
    print(f"counted {counted:.2%}: {phases} phases at {phase_s * 1e6:.2f} us, ", end="")
    print(f"{messages} messages at {message_s * 1e6:.2f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(SECTIONS), default=["smollm2"])
    parser.add_argument("--layouts", nargs="+", default=["1x2x1", "2x1x1"], metavar="RxSxT")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for name in options.jobs:
            for layout in options.layouts:
                replicas, stages, shards = map(int, layout.split("x"))
                measure(name, (replicas, stages, shards), options.rounds, Path(directory))


if __name__ == "__main__":
    main()
