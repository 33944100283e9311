"""`raising_rank.py RANK CALLS ARGUMENTS...`: mpinfer, but on one rank the stage raises after so many forwards."""

import os
import sys
import time
from typing import Any

from mpinfer.cli import main


def sabotage(calls: int) -> None:
    """Of the run, once stages are timed."""
    from mpinfer.pipeline.worker import Worker

    run = Worker.run

    def run_sabotaged(worker: Worker, schedule: Any) -> None:
        forward, left = worker._stage.forward, calls

        def failing(message: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise RuntimeError(f"injected at {time.time()}")
            return forward(message)

        worker._stage.forward = failing  # type: ignore[method-assign]
        run(worker, schedule)

    Worker.run = run_sabotaged  # type: ignore[method-assign]


if __name__ == "__main__":
    rank, calls, *arguments = sys.argv[1:]
    if rank == (os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK")):
        sabotage(int(calls))
    sys.exit(main(arguments))
