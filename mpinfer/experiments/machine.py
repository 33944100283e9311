"""What a laboratory ran on, as far as its driver can see."""

import platform
from pathlib import Path
from typing import Any

from mpinfer.cluster.binding import allowed_cores
from mpinfer.cluster.memory import local_memory_bytes


def machine_facts() -> dict[str, Any]:
    """Of this node, where the driver runs."""
    return {"cpu": _cpu(), "cores": len(allowed_cores()), "memory_bytes": local_memory_bytes()}


def _cpu() -> str:
    """As the kernel names it; not all architectures have names."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()
