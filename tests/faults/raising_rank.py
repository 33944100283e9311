"""`raising_rank.py RANK CALLS ARGUMENTS...`: mpinfer, but on one rank the stage raises after so many forwards."""

import os
import sys
import time
from typing import Any

from mpinfer.cli import main


def sabotage(calls: int) -> None:
    from mpinfer.generate.stage import DecodeStage

    forward = DecodeStage.forward
    left = calls

    def failing(stage: DecodeStage, message: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError(f"injected at {time.time()}")
        return forward(stage, message)

    DecodeStage.forward = failing


if __name__ == "__main__":
    rank, calls, *arguments = sys.argv[1:]
    if rank == (os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK")):
        sabotage(int(calls))
    sys.exit(main(arguments))
