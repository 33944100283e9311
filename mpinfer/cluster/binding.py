"""Which cores this rank runs on, and with how many threads.

A "core" here is a CPU as the kernel numbers it: a hardware thread where the node has several to a core.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpinfer.cluster.cgroup import read_limits
from mpinfer.errors import LaunchError

# Every math library reads its own; all are to agree.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Binding:
    cores: tuple[int, ...]  # cores this rank may run on, ascending
    threads: int  # compute threads
    reason: str  # one phrase for the user


def allowed_cores() -> frozenset[int]:
    """The cores that the launcher and the kernel let this process run on."""
    return frozenset(os.sched_getaffinity(0))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU time that control groups grant this process, in cores; None where it is not limited."""
    version_2 = read_limits("cpu", "cpu.max", root=root)
    version_1 = read_limits("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us", root=root)
    granted = [int(quota) / int(period) for quota, period in version_2 + version_1 if quota.isdecimal()]
    return min(granted, default=None)


def physical_cores(root: Path = Path("/")) -> dict[int, int]:
    """The physical core of every CPU, named by its lowest CPU; empty where the kernel does not say."""
    cores = {}
    for siblings in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list"):
        first = re.match("[0-9]+", siblings.read_text())
        if first is not None:
            cores[int(siblings.parts[-3].removeprefix("cpu"))] = int(first[0])
    return cores


def overlap(peers: Sequence[frozenset[int]]) -> bool:
    """Whether ranks of a node were bound to cores that they share in part; `peers` holds those of each."""
    masks = set(peers)
    return sum(map(len, masks)) > len(frozenset().union(*masks))


def choose_binding(
    peers: Sequence[frozenset[int]],
    local_rank: int,
    environ: Mapping[str, str],
    *,
    quota: float | None = None,
    physical: Mapping[int, int] | None = None,
) -> Binding:
    """Share a node's cores out over its ranks; every rank of the node reaches the same shares.

    `peers` holds the allowed cores of all ranks of this node in the order of their local ranks, `quota` is
    the node's CPU quota in cores, `physical` maps CPUs to physical cores. Ranks with the same cores share
    them evenly; a rank that has cores of its own was bound by the launcher and keeps them.

    Raises `LaunchError` when OMP_NUM_THREADS is not a thread count.
    """
    cores, threads, reason = _share(peers, local_rank, physical or {})
    if quota is not None and (granted := max(1, int(quota / len(peers)))) < threads:
        threads, reason = granted, f"{reason}, CPU quota of {quota:g} cores"
    if omp := environ.get("OMP_NUM_THREADS"):
        threads, reason = _thread_count(omp), f"{reason}, OMP_NUM_THREADS={omp}"
    return Binding(tuple(sorted(cores)), threads, reason)


def apply_binding(binding: Binding) -> None:
    """Bind this process and tell the math libraries their thread count.

    Call it before numpy or torch are imported: they read the count once, as they load. Threads that run
    already, such as MPI's own, keep their cores.
    """
    os.sched_setaffinity(0, binding.cores)
    for name in _THREAD_VARIABLES:
        os.environ[name] = str(binding.threads)


def _share(
    peers: Sequence[frozenset[int]], local_rank: int, physical: Mapping[int, int]
) -> tuple[Sequence[int], int, str]:
    """This rank's cores, their thread count, and why."""
    own = peers[local_rank]
    # Hardware threads of one core lie side by side here, or the second rank would get the twins of the first's.
    cores = sorted(own, key=lambda cpu: (physical.get(cpu, cpu), cpu))
    sharers = [rank for rank, mask in enumerate(peers) if mask == own]
    if any(mask != own and mask & own for mask in peers):
        return cores, len(cores), "warning: the launcher's bindings overlap"
    if len(sharers) > len(cores):  # nothing to cut: the kernel balances
        return cores, 1, f"{len(sharers)} ranks share {len(cores)} cores"
    if len(sharers) > 1:
        place, ranks = sharers.index(local_rank), len(sharers)
        start, stop = (len(cores) * edge // ranks for edge in (place, place + 1))
        return cores[start:stop], stop - start, f"{len(cores)} cores / {ranks} ranks"
    if len(peers) > 1:
        return cores, len(cores), "bound by the launcher"
    return cores, len(cores), f"all {len(cores)} allowed cores"


def _thread_count(text: str) -> int:
    first = text.split(",")[0].strip()  # OpenMP takes a list, one count for each level of nesting
    if not re.fullmatch("0*[1-9][0-9]*", first):
        raise LaunchError(f"OMP_NUM_THREADS={text}: must be a thread count of at least 1; correct or unset it")
    return int(first)
