"""`faulty_rank.py RANK CALLS FAULT ARGUMENTS...`: mpinfer, but one rank's stage is at fault after so many forwards.

FAULT: `raise`, `full` (no file of this rank can grow any more), or the seconds that each forward is held up.
"""

import os
import resource
import sys
import time
from typing import Any

from mpinfer.cli import main


def inject(calls: int, fault: str) -> None:
    """Into the run, once stages are timed."""
    from mpinfer.pipeline.worker import Worker

    run = Worker.run

    def run_with_fault(worker: Worker, schedule: Any) -> None:
        forward, left = worker._stage.forward, calls

        def faulty(message: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0 and fault == "raise":
                raise RuntimeError(f"injected at {time.time()}")
            if left < 0 and fault == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))
            elif left < 0:
                time.sleep(float(fault))
            return forward(message)

        worker._stage.forward = faulty  # type: ignore[method-assign]
        run(worker, schedule)

    Worker.run = run_with_fault  # type: ignore[method-assign]


if __name__ == "__main__":
    rank, calls, fault, *arguments = sys.argv[1:]
    if rank == (os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK")):
        inject(int(calls), fault)
    sys.exit(main(arguments))
