from dataclasses import replace

import pytest

from mpinfer.cluster.doctor import RankFacts, doctor_report, mixed_versions, overlapping_bindings, warnings

GIB = 2**30


def facts(rank: int, ranks_per_node: int = 4, cores_per_rank: int = 2) -> RankFacts:
    node, local_rank = divmod(rank, ranks_per_node)
    first = local_rank * cores_per_rank
    return RankFacts(
        rank=rank,
        node=f"node{node + 1:03d}",
        local_rank=local_rank,
        cores=tuple(range(first, first + cores_per_rank)),
        threads=cores_per_rank,
        mpi_library="Open MPI v5.0.11, package: Open MPI root@vm Distribution, ident: 5.0.11",
        mpi4py_version="4.1.2",
        torch_version="2.13.0",
        mpinfer_version="0.1.0",
        python_version="3.11.7",
        device="cpu",
        memory_bytes=64 * GIB,
    )


def test_report_of_a_sound_world() -> None:
    assert doctor_report("Open MPI mpirun", [facts(rank) for rank in range(8)]).splitlines() == [
        "launcher  Open MPI mpirun",
        "world     8 ranks on 2 nodes, 16 cores",
        "software  mpinfer 0.1.0, Python 3.11.7, torch 2.13.0, mpi4py 4.1.2, Open MPI v5.0.11",
        "node001 ... node002 (2 nodes)  ranks 0-7: 4 a node, cores 0-7, 2 a rank, threads 2, device cpu, 64 GiB",
        "ok",
    ]


def test_report_of_one_process() -> None:
    lines = doctor_report("none", [facts(0)]).splitlines()
    assert lines[1] == "world     1 rank on 1 node, 2 cores"
    assert lines[3] == "node001  rank 0: 1 a node, cores 0-1, 2 a rank, threads 2, device cpu, 64 GiB"
    assert lines[-1] == "ok"


def test_mpich_names_itself_over_several_lines() -> None:
    text = doctor_report("none", [replace(facts(0), mpi_library="MPICH Version:      5.0.2\nMPICH Release date: x\n")])
    assert "mpi4py 4.1.2, MPICH Version: 5.0.2\n" in text


def test_a_thousand_equal_ranks_take_five_lines() -> None:
    lines = doctor_report("Slurm srun", [facts(rank) for rank in range(1000)]).splitlines()
    assert len(lines) == 5
    assert lines[3].startswith("node001 ... node250 (250 nodes)  ranks 0-999: ")


def test_a_thousand_unequal_ranks_fit_a_screen() -> None:
    ranks = [replace(facts(rank, 1), threads=1 + rank, torch_version=f"2.{rank % 2}") for rank in range(1000)]
    text = doctor_report("Slurm srun", ranks)
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) < 300
    assert "and 988 more kinds of node" in text
    assert "ranks 0, 2, 4, 6, 8, 10, 494 more: " in text


def test_unequal_ranks_of_a_node_show_as_a_range() -> None:
    ranks = [facts(0, 3), replace(facts(1, 3), cores=(2, 3, 4), threads=3, device="cuda:0"), facts(10, 3)]
    text = doctor_report("none", ranks)
    assert "node001  ranks 0-1: 2 a node, cores 0-4, 2-3 a rank, threads 2-3, device cpu cuda:0, 64 GiB" in text
    assert "node004  rank 10: " in text


@pytest.mark.parametrize(
    ("attribute", "value", "expected"),
    [
        (
            "torch_version",
            "2.9.0",
            "torch differs between ranks: 2.13.0 on ranks 0-1, 3 of node001, 2.9.0 on rank 2 of node001; use one ",
        ),
        ("mpinfer_version", "0.2.0", "mpinfer differs"),
        ("python_version", "3.12.1", "Python differs"),
        ("mpi4py_version", "4.0.0", "mpi4py differs"),
        (
            "mpi_library",
            "MPICH Version: 5.0.2\n",
            "MPI differs between ranks: Open MPI v5.0.11 on ranks 0-1, 3 of node001, MPICH",
        ),
    ],
)
def test_mixed_versions(attribute: str, value: str, expected: str) -> None:
    ranks = [facts(rank) for rank in range(4)]
    ranks[2] = replace(ranks[2], **{attribute: value})
    [warning] = warnings("Slurm srun", ranks)
    assert warning.startswith(expected)
    report = doctor_report("Slurm srun", ranks).splitlines()
    assert report[-1] == f"warning: {warning}"
    assert [line.split(":")[0] for line in report[2:4]] == ["software  ranks 0-1, 3", "software  rank 2"]


def test_overlapping_cores() -> None:
    ranks = [replace(facts(rank), cores=(0, 1, 2, 3)) if rank in (0, 1) else facts(rank, 4) for rank in range(8)]
    [warning] = warnings("Slurm srun", ranks)
    assert warning.startswith("node001: ranks run on the same cores; ")
    assert "--cpu-bind=none" in warning


def test_more_ranks_than_cores_is_one_warning_for_all_nodes() -> None:
    ranks = [replace(facts(rank), cores=(0, 1), threads=1) for rank in range(8)]
    assert warnings("Slurm srun", ranks) == [
        "node001 ... node002 (2 nodes): more ranks than cores (4 ranks on 2 cores); "
        "they take turns: start at most one rank a core"
    ]


def test_one_rank_under_a_launcher() -> None:
    [warning] = warnings("Slurm srun", [facts(0)])
    assert warning.startswith("Slurm srun shows a world of one rank: ")
    assert warnings("none", [facts(0)]) == []


def test_mixed_versions_name_their_nodes() -> None:
    software = [{"torch": "2.13.0", "python": "3.11.7"}] * 4 + [{"torch": "2.9.0", "python": "3.11.7"}] * 2
    assert mixed_versions(["n1", "n1", "n2", "n2", "n3", "n3"], software) == [
        "torch differs between ranks: 2.13.0 on ranks 0-3 of n1 ... n2 (2 nodes), 2.9.0 on ranks 4-5 of n3; "
        "use one environment on all nodes"
    ]


@pytest.mark.parametrize(
    ("second", "warned"), [([0, 1], False), ([2, 3], False), ([1, 2], True)], ids=["shared", "apart", "in part"]
)
def test_bindings_that_overlap_in_part_are_told(second: list[int], warned: bool) -> None:
    found = overlapping_bindings(["n1", "n1", "n2", "n2"], [[0, 1], [0, 1], [0, 1], second])
    assert len(found) == warned
    assert all(text.startswith("n2: the launcher's bindings of ranks overlap in part; ") for text in found)
