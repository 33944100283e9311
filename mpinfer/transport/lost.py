"""Ranks that have died while the world lives on.

MPI says so where it tolerates failures (ULFM: Bland et al., 2013): Open MPI when it was started with
`mpirun --with-ft ulfm`. Elsewhere the launcher ends the world with its first rank that dies, and nothing here happens.
"""

from mpi4py import MPI

_PROCESS_FAILED = {MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING} if hasattr(MPI, "ERR_PROC_FAILED") else set()


class RankLost(Exception):
    """This rank cannot go on with its part of the work: a rank that it needs has died."""


def is_loss(error: Exception) -> bool:
    return isinstance(error, MPI.Exception) and error.Get_error_class() in _PROCESS_FAILED


def acknowledge(comm: MPI.Intracomm) -> set[int]:
    """All ranks of a communicator that are known to have died. Receives from any source go on without them."""
    if not _PROCESS_FAILED:
        return set()
    comm.Ack_failed()
    failed = comm.Get_failed()
    ranks = set(failed.Translate_ranks(None, comm.Get_group()))
    failed.Free()
    return ranks
