"""How much memory this node lets its ranks use."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from mpinfer.cluster.cgroup import read_limits

_SLURM_UNITS = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40}


def local_memory_bytes(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> int:
    """Memory that all ranks of this node may use together: all there is, or the least limit that is set.

    Limits are those of the control groups and of the Slurm job; what other programs hold now does not count.
    """
    limits = read_limits("memory", "memory.max", root=root)
    limits += read_limits("memory", "memory.limit_in_bytes", root=root)
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    granted = [int(limit) for [limit] in limits if limit.isdecimal()]
    return min([total_bytes, *granted, *_slurm_limits(environ)])


def _slurm_limits(environ: Mapping[str, str]) -> list[int]:
    """What the job asked for. Slurm need not enforce it by control groups, but may kill who takes more."""
    cpus = environ.get("SLURM_CPUS_ON_NODE", "")
    # Not the cores this process may run on: they are only its own share once it is bound.
    cpu_count = int(cpus) if re.fullmatch("[0-9]+", cpus) else os.cpu_count() or 1
    per_node = _slurm_bytes(environ.get("SLURM_MEM_PER_NODE", ""))
    per_cpu = _slurm_bytes(environ.get("SLURM_MEM_PER_CPU", ""))
    return [limit for limit in (per_node, per_cpu * cpu_count) if limit > 0]


def _slurm_bytes(text: str) -> int:
    """Of a number in MiB, or with a unit; 0, which stands for all memory, also where Slurm says nothing we know."""
    match = re.fullmatch("([0-9]+)([KMGT]?)B?", text.upper())
    return int(match[1]) * _SLURM_UNITS[match[2]] if match else 0
