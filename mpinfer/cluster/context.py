"""What the launcher promised this process, read from a table of launcher variables."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from mpinfer.errors import LaunchError

NO_LAUNCHER = "none"


@dataclass(frozen=True)
class LaunchContext:
    """This process's place, as its launcher promised it; MPI has the last word (`check_world`)."""

    launcher: str
    rank: int
    size: int
    local_rank: int | None  # None where the launcher does not say
    local_size: int | None
    node: str


@dataclass(frozen=True)
class _LauncherRow:
    """One launcher: the variables it sets for each process, and how to start the world right under it.

    A row speaks only when its rank, size and local rank are all set.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str | None  # ranks on this node, or on every node in turn, as in "2(x3),1"
    node_index: str | None  # which of those this node is
    fix: str


_OWN_MPIEXEC = (
    "start it with the mpiexec of the MPI that mpi4py uses, the one beside this Python if there is one "
    "(`mpinfer launch` finds it)"
)

# In order of priority: the innermost launcher wins. An mpirun inside a Slurm job inherits Slurm's
# variables, and Hydra even starts its proxies as a Slurm step of one task a node.
_LAUNCHERS = (
    _LauncherRow(
        "Open MPI mpirun",
        rank="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        node_index=None,
        fix=_OWN_MPIEXEC,
    ),
    # PMI_RANK alone is not Hydra's: srun --mpi=pmi2, PALS and Flux set it too. Only Hydra adds MPI_LOCALRANKID.
    _LauncherRow(
        "MPICH/Hydra mpiexec",
        rank="PMI_RANK",
        size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_size="MPI_LOCALNRANKS",
        node_index=None,
        fix=_OWN_MPIEXEC,
    ),
    _LauncherRow(  # PALS has no size of its own; it sets PMI's
        "PALS",
        rank="PALS_RANKID",
        size="PMI_SIZE",
        local_rank="PALS_LOCAL_RANKID",
        local_size="PALS_LOCAL_SIZE",
        node_index=None,
        fix="use an mpi4py built for the site's MPICH, or the mpiexec beside this Python",
    ),
    _LauncherRow(
        "Flux",
        rank="FLUX_TASK_RANK",
        size="FLUX_JOB_SIZE",
        local_rank="FLUX_TASK_LOCAL_ID",
        local_size=None,
        node_index=None,
        fix="use `flux run -o pmi=pmix` for Open MPI, plain `flux run` for MPICH",
    ),
    _LauncherRow(
        "MVAPICH mpirun_rsh",
        rank="MV2_COMM_WORLD_RANK",
        size="MV2_COMM_WORLD_SIZE",
        local_rank="MV2_COMM_WORLD_LOCAL_RANK",
        local_size="MV2_COMM_WORLD_LOCAL_SIZE",
        node_index=None,
        fix=_OWN_MPIEXEC,
    ),
    # SLURM_NTASKS is no promise: batch scripts and salloc shells have it too. Only a step has SLURM_STEP_NUM_TASKS.
    _LauncherRow(
        "Slurm srun",
        rank="SLURM_PROCID",
        size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        local_size="SLURM_STEP_TASKS_PER_NODE",
        node_index="SLURM_NODEID",
        fix="use `srun --mpi=pmix` for Open MPI, `srun --mpi=pmi2` for MPICH and Intel MPI",
    ),
)


def read_context(environ: Mapping[str, str] = os.environ) -> LaunchContext:
    """This process's place according to the first launcher of the table that speaks; without one, rank 0 of 1.

    Raises `LaunchError` when a launcher's variables are malformed or contradict each other.
    """
    node = socket.gethostname()
    for row in _LAUNCHERS:
        if all(environ.get(name) for name in (row.rank, row.size, row.local_rank)):
            rank, size = _number(environ, row.rank), _number(environ, row.size)
            if rank >= size:
                raise LaunchError(
                    f"{row.rank}={rank}: must be below {row.size}={size}; unset what does not come from the launcher, "
                    "or start again with mpirun or srun"
                )
            return LaunchContext(
                launcher=row.name,
                rank=rank,
                size=size,
                local_rank=_number(environ, row.local_rank),
                local_size=_local_size(environ, row),
                node=node,
            )
    return LaunchContext(NO_LAUNCHER, rank=0, size=1, local_rank=None, local_size=None, node=node)


def check_world(context: LaunchContext, world_rank: int, world_size: int) -> None:
    """Compare MPI's world with the promised one.

    Raises `LaunchError` when MPI shows fewer ranks than promised (usually several worlds of one rank), or
    the same number under other numbers. A larger world than promised is one whose launcher we do not know.
    """
    if world_size < context.size:
        fix = next(row.fix for row in _LAUNCHERS if row.name == context.launcher)
        raise LaunchError(
            f"{context.launcher} started {context.size} ranks but MPI shows a world of {world_size}: "
            f"all ranks must meet in one world; {fix}"
        )
    if world_size == context.size and world_rank != context.rank:
        raise LaunchError(
            f"{context.launcher} calls this process rank {context.rank} of {context.size}, MPI calls it rank "
            f"{world_rank}: both must agree; unset what reorders ranks (such as MPICH_RANK_REORDER_METHOD)"
        )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not re.fullmatch("[0-9]+", text):
        raise LaunchError(f"{name}={text}: a launcher sets a whole number; unset it or start again with mpirun or srun")
    return int(text)


def _local_size(environ: Mapping[str, str], row: _LauncherRow) -> int | None:
    if row.local_size is None or not environ.get(row.local_size):
        return None
    counts = _counts_per_node(row.local_size, environ[row.local_size])
    index = _number(environ, row.node_index) if row.node_index and environ.get(row.node_index) else 0
    return counts[index] if index < len(counts) else None


def _counts_per_node(name: str, text: str) -> list[int]:
    """Expand "2(x3),1" to [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if match is None:
            raise LaunchError(
                f"{name}={text}: a launcher sets ranks per node such as 4 or 2(x3),1; unset it or start again "
                "with mpirun or srun"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
