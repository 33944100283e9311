"""`audited_rank.py ARGUMENTS...`: mpinfer, but a rank that unpickles anything or opens a port for others dies of it."""

import os
import sys
from typing import Any

from mpinfer.cli import main

FORBIDDEN = {"pickle.find_class", "socket.bind"}


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if event in FORBIDDEN:
        print(f"audited: {event} {arguments!r:.200}", file=sys.stderr, flush=True)
        os._exit(99)


if __name__ == "__main__":
    if sys.argv[1] == "--self-test":
        sys.addaudithook(forbid)
        import pickle

        pickle.loads(pickle.dumps(main))
    sys.addaudithook(forbid)
    sys.exit(main(sys.argv[1:]))
