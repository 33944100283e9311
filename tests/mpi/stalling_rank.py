"""`stalling_rank.py RANK CALLS SECONDS ARGS...`: mpinfer, but on one rank all forwards after so many take longer."""

import os
import sys
import time
from typing import Any

from mpinfer.cli import main


def slow_down(calls: int, seconds: float) -> None:
    """Of the run, once stages are timed."""
    from mpinfer.pipeline.worker import Worker

    run = Worker.run

    def run_slowly(worker: Worker, schedule: Any) -> None:
        forward, left = worker._stage.forward, calls

        def stalling(message: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                time.sleep(seconds)
            return forward(message)

        worker._stage.forward = stalling  # type: ignore[method-assign]
        run(worker, schedule)

    Worker.run = run_slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    rank, calls, seconds, *arguments = sys.argv[1:]
    if rank == (os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK")):
        slow_down(int(calls), float(seconds))
    sys.exit(main(arguments))
