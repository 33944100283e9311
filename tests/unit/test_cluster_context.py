import socket

import pytest

from mpinfer.cluster.context import LaunchContext, check_world, read_context
from mpinfer.errors import LaunchError

# A batch script's variables, which everything started inside it inherits.
SBATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_GTIDS": "0",
}
SALLOC = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "4", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "2(x4)"}
STEP = SBATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "5",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "11", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
# Hydra starts its proxies as a step of one task a node.
HYDRA_PROXY = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}
PALS = {
    "PALS_RANKID": "9",
    "PALS_LOCAL_RANKID": "1",
    "PALS_LOCAL_SIZE": "4",
    "PMI_RANK": "9",
    "PMI_SIZE": "16",
    "PMI_LOCAL_RANK": "1",
}
FLUX = {
    "FLUX_TASK_RANK": "2",
    "FLUX_TASK_LOCAL_ID": "0",
    "FLUX_JOB_SIZE": "4",
    "FLUX_JOB_NNODES": "2",
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environ", "launcher", "rank", "size", "local_rank", "local_size"),
    [
        ({}, "none", 0, 1, None, None),
        ({"HOME": "/root"}, "none", 0, 1, None, None),
        (OPEN_MPI, "Open MPI mpirun", 5, 8, 1, 2),
        (SBATCH | OPEN_MPI, "Open MPI mpirun", 5, 8, 1, 2),
        (STEP | OPEN_MPI, "Open MPI mpirun", 5, 8, 1, 2),
        (HYDRA, "MPICH/Hydra mpiexec", 3, 4, 1, 2),
        (SBATCH | HYDRA_PROXY | HYDRA, "MPICH/Hydra mpiexec", 3, 4, 1, 2),
        (PALS, "PALS", 9, 16, 1, 4),
        (FLUX, "Flux", 2, 4, 0, None),
        (MVAPICH, "MVAPICH mpirun_rsh", 1, 2, 1, 2),
        (STEP, "Slurm srun", 6, 7, 0, 1),
        (STEP | {"SLURM_NODEID": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, "Slurm srun", 5, 7, 1, 2),
        (STEP | {"PMI_RANK": "6", "PMI_SIZE": "7", "PMI_JOBID": "4711.0"}, "Slurm srun", 6, 7, 0, 1),  # pmi2
        (STEP | {"PMIX_RANK": "6", "PMIX_NAMESPACE": "slurm.pmix.4711.0"}, "Slurm srun", 6, 7, 0, 1),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": ""}, "Slurm srun", 6, 7, 0, None),
        (STEP | {"SLURM_NODEID": "4"}, "Slurm srun", 6, 7, 0, None),
        (SBATCH, "none", 0, 1, None, None),  # no step: plain python in a batch script
        (SALLOC, "none", 0, 1, None, None),
    ],
)
def test_table(
    environ: dict[str, str], launcher: str, rank: int, size: int, local_rank: int | None, local_size: int | None
) -> None:
    expected = LaunchContext(launcher, rank, size, local_rank, local_size, socket.gethostname())
    assert read_context(environ) == expected


@pytest.mark.parametrize(
    ("environ", "name", "value"),
    [
        (OPEN_MPI, "OMPI_COMM_WORLD_RANK", "five"),
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "8.0"),
        (HYDRA, "PMI_RANK", "-1"),
        (HYDRA, "MPI_LOCALNRANKS", "two"),
        (STEP, "SLURM_STEP_NUM_TASKS", "7 "),
        (STEP, "SLURM_NODEID", "x"),
        (STEP, "SLURM_STEP_TASKS_PER_NODE", "2(3),1"),
    ],
)
def test_malformed_value_is_named(environ: dict[str, str], name: str, value: str) -> None:
    with pytest.raises(LaunchError) as error:
        read_context(environ | {name: value})
    assert str(error.value).startswith(f"{name}={value}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("environ", [{}, OPEN_MPI, HYDRA, PALS, FLUX, MVAPICH, STEP, SBATCH])
def test_the_promised_world_passes(environ: dict[str, str]) -> None:
    context = read_context(environ)
    check_world(context, context.rank, context.size)


def test_a_larger_world_than_promised_passes() -> None:
    check_world(read_context({}), 3, 4)  # a launcher that is not in the table


@pytest.mark.parametrize(
    ("environ", "promised", "fix"),
    [
        (OPEN_MPI, 8, "mpiexec of the MPI that mpi4py uses"),
        (HYDRA, 4, "mpiexec of the MPI that mpi4py uses"),
        (PALS, 16, "mpi4py"),
        (FLUX, 4, "flux run -o pmi=pmix"),
        (MVAPICH, 2, "mpiexec of the MPI that mpi4py uses"),
        (STEP, 7, "srun --mpi=pmix` for Open MPI, `srun --mpi=pmi2` for MPICH"),
    ],
)
def test_worlds_of_one_rank_are_refused(environ: dict[str, str], promised: int, fix: str) -> None:
    context = read_context(environ)
    with pytest.raises(LaunchError) as error:
        check_world(context, 0, 1)
    message = str(error.value)
    assert message.startswith(f"{context.launcher} started {promised} ranks but MPI shows a world of 1: ")
    assert fix in message
    assert "\n" not in message


def test_other_rank_numbers_are_refused() -> None:
    with pytest.raises(LaunchError, match="calls this process rank 5 of 8, MPI calls it rank 4"):
        check_world(read_context(OPEN_MPI), 4, 8)
