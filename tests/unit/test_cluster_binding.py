import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpinfer.cluster.binding import (
    Binding,
    allowed_cores,
    apply_binding,
    choose_binding,
    cpu_quota,
    physical_cores,
)
from mpinfer.errors import LaunchError


def mask(*cores: int) -> frozenset[int]:
    return frozenset(cores)


def bind_all(
    peers: list[frozenset[int]],
    environ: dict[str, str] | None = None,
    quota: float | None = None,
    physical: dict[int, int] | None = None,
) -> list[Binding]:
    return [choose_binding(peers, rank, environ or {}, quota=quota, physical=physical) for rank in range(len(peers))]


@pytest.mark.parametrize("cores", [1, 2, 3, 7, 8, 64, 96])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7, 8, 48, 96])
@pytest.mark.parametrize("first", [0, 17])
def test_equal_masks_are_shared_out_disjointly_and_completely(cores: int, ranks: int, first: int) -> None:
    whole = range(first, first + cores)
    bindings = bind_all([frozenset(whole)] * ranks)
    if ranks > cores:
        assert all(binding.cores == tuple(whole) and binding.threads == 1 for binding in bindings)
        return
    assert [core for binding in bindings for core in binding.cores] == list(whole)  # contiguous, in order of ranks
    sizes = [len(binding.cores) for binding in bindings]
    assert max(sizes) - min(sizes) <= 1
    assert [binding.threads for binding in bindings] == sizes


@pytest.mark.parametrize(
    ("peers", "cores", "threads", "reason"),
    [
        ([mask(0, 1)], [(0, 1)], [2], "all 2 allowed cores"),
        ([mask(0, 1)] * 2, [(0,), (1,)], [1, 1], "2 cores / 2 ranks"),
        ([mask(0, 1)] * 3, [(0, 1)] * 3, [1, 1, 1], "3 ranks share 2 cores"),
        # an allocation of part of the node, the same for all its ranks
        ([mask(4, 5, 8, 9)] * 2, [(4, 5), (8, 9)], [2, 2], "4 cores / 2 ranks"),
        ([mask(0, 1), mask(2, 3)], [(0, 1), (2, 3)], [2, 2], "bound by the launcher"),
        ([mask(0), mask(1, 2, 3)], [(0,), (1, 2, 3)], [1, 3], "bound by the launcher"),
        # bound to sockets: the ranks of one socket share it
        (
            [mask(0, 1, 2, 3), mask(4, 5, 6, 7)] * 2,
            [(0, 1), (4, 5), (2, 3), (6, 7)],
            [2] * 4,
            "4 cores / 2 ranks",
        ),
        ([mask(0, 1), mask(1, 2)], [(0, 1), (1, 2)], [2, 2], "warning: the launcher's bindings overlap"),
        ([mask(0, 1), mask(0, 1, 2)], [(0, 1), (0, 1, 2)], [2, 3], "warning: the launcher's bindings overlap"),
    ],
)
def test_masks(peers: list[frozenset[int]], cores: list[tuple[int, ...]], threads: list[int], reason: str) -> None:
    bindings = bind_all(peers)
    assert [binding.cores for binding in bindings] == cores
    assert [binding.threads for binding in bindings] == threads
    assert {binding.reason for binding in bindings} == {reason}


def test_a_rank_outside_the_overlap_is_not_warned() -> None:
    alone, *overlapping = bind_all([mask(0, 1), mask(2, 3), mask(3, 4)])
    assert alone.reason == "bound by the launcher"
    assert all(binding.reason.startswith("warning") for binding in overlapping)


def test_hardware_threads_of_one_core_stay_together() -> None:
    twins = {cpu: cpu % 4 for cpu in range(8)}  # the usual numbering: CPU 4 is the twin of CPU 0
    first, second = bind_all([frozenset(range(8))] * 2, physical=twins)
    assert first.cores == (0, 1, 4, 5)
    assert second.cores == (2, 3, 6, 7)


@pytest.mark.parametrize(
    ("quota", "ranks", "threads"), [(None, 2, 4), (100.0, 2, 4), (8.0, 2, 4), (5.0, 2, 2), (1.5, 2, 1), (3.9, 1, 3)]
)
def test_a_quota_lowers_threads_but_not_cores(quota: float | None, ranks: int, threads: int) -> None:
    peers = [frozenset(range(4 * ranks))] * ranks
    limited, free = bind_all(peers, quota=quota), bind_all(peers)
    assert [binding.cores for binding in limited] == [binding.cores for binding in free]
    assert [binding.threads for binding in limited] == [threads] * ranks
    assert ("CPU quota" in limited[0].reason) == (threads < 4)


@pytest.mark.parametrize(("text", "threads"), [("4", 4), ("1", 1), ("16", 16), ("3,2", 3), (" 2 ", 2)])
def test_omp_num_threads_is_obeyed(text: str, threads: int) -> None:
    first, second = bind_all([mask(0, 1)] * 2, {"OMP_NUM_THREADS": text}, quota=1.0)
    assert (first.cores, second.cores) == ((0,), (1,))
    assert (first.threads, second.threads) == (threads, threads)
    assert first.reason == f"2 cores / 2 ranks, OMP_NUM_THREADS={text}"


def test_empty_omp_num_threads_counts_as_unset() -> None:
    assert choose_binding([mask(0, 1)], 0, {"OMP_NUM_THREADS": ""}).threads == 2


@pytest.mark.parametrize("text", ["0", "-1", "four", "1.5", ",2"])
def test_bad_omp_num_threads_is_named(text: str) -> None:
    with pytest.raises(LaunchError, match=f"^OMP_NUM_THREADS={text}: must be a thread count of at least 1; "):
        choose_binding([mask(0)], 0, {"OMP_NUM_THREADS": text})


def test_apply_binding_binds_and_sets_thread_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "99")
    before = allowed_cores()
    core = min(before)
    try:
        apply_binding(Binding((core,), 3, "test"))
        assert allowed_cores() == {core}
    finally:
        os.sched_setaffinity(0, before)
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == os.environ["OPENBLAS_NUM_THREADS"] == "3"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {}, None),
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000\n", "job/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/job/step\n", {"job/step/cpu.max": "200000 100000\n", "job/cpu.max": "400000 100000\n"}, 2.0),
        ("0::/job\n", {"job/cpu.max": "max 100000\n"}, None),
        ("0::/outside/the/container\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (
            "4:cpu,cpuacct:/job\n3:memory:/other\n0::/\n",
            {"cpu/job/cpu.cfs_quota_us": "300000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            3.0,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("4:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "1\n", "cpu/cpu.cfs_period_us": "1\n"}, None),
    ],
)
def test_cpu_quota(tmp_path: Path, groups: str, files: dict[str, str], quota: float | None) -> None:
    write(tmp_path / "proc/self/cgroup", groups)
    for name, text in files.items():
        write(tmp_path / "sys/fs/cgroup" / name, text)
    assert cpu_quota(tmp_path) == quota


def test_no_control_groups_and_no_topology(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert physical_cores(tmp_path) == {}


def test_physical_cores(tmp_path: Path) -> None:
    for cpu, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3", 10: "10-11", 11: "10-11"}.items():
        write(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings + "\n")
    assert physical_cores(tmp_path) == {0: 0, 1: 1, 2: 0, 3: 1, 10: 10, 11: 10}


def test_this_machine_answers() -> None:
    assert allowed_cores()
    assert (quota := cpu_quota()) is None or quota > 0
    assert all(core <= cpu for cpu, core in physical_cores().items())


def test_the_room_loads_nothing_heavy() -> None:
    rooms = ", ".join(f"mpinfer.cluster.{name}" for name in ("context", "binding", "launch", "doctor"))
    check = f"import sys, {rooms}; print({{'torch', 'numpy', 'mpi4py'}} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\n"
