"""What a rank tells of itself while it runs."""

import os
import socket
from pathlib import Path
from typing import Any

from mpinfer.observe.account import PHASES, Account


def vitals(account: Account) -> list[Any]:
    """Host, resident bytes, and seconds per phase so far. Small: every rank sends it every few seconds."""
    return [socket.gethostname(), resident_bytes(), [round(account.seconds[phase], 1) for phase in PHASES]]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
