import os
from pathlib import Path

import pytest

from mpinfer.cluster.memory import local_memory_bytes

TOTAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MIB = 2**20


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": "1048576"}, MIB),
        ("0::/job\n", {"job/memory.max": "max"}, TOTAL),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "2097152"}, 2 * MIB),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, TOTAL),
    ],
)
def test_control_groups_limit_memory(tmp_path: Path, groups: str, files: dict[str, str], limit: int) -> None:
    assert local_memory_bytes(fake_root(tmp_path, groups, files), {}) == limit


@pytest.mark.parametrize(
    ("environ", "limit"),
    [
        ({"SLURM_MEM_PER_NODE": "100"}, 100 * MIB),
        ({"SLURM_MEM_PER_NODE": "1G"}, 1024 * MIB),
        ({"SLURM_MEM_PER_NODE": "512Kb"}, MIB // 2),
        ({"SLURM_MEM_PER_CPU": "10", "SLURM_CPUS_ON_NODE": "4"}, 40 * MIB),
        ({"SLURM_MEM_PER_CPU": "1"}, (os.cpu_count() or 1) * MIB),
        ({"SLURM_MEM_PER_NODE": "100", "SLURM_MEM_PER_CPU": "10", "SLURM_CPUS_ON_NODE": "4"}, 40 * MIB),
        ({"SLURM_MEM_PER_NODE": str(TOTAL // MIB + 1)}, TOTAL),
    ],
)
def test_slurm_limits_memory(tmp_path: Path, environ: dict[str, str], limit: int) -> None:
    assert local_memory_bytes(tmp_path, environ) == limit


@pytest.mark.parametrize("text", ["0", "", "all", "-1"])
def test_no_limit_of_slurm(tmp_path: Path, text: str) -> None:
    environ = {"SLURM_MEM_PER_NODE": text, "SLURM_MEM_PER_CPU": text, "SLURM_CPUS_ON_NODE": "2"}
    assert local_memory_bytes(tmp_path, environ) == TOTAL


def test_the_least_limit_counts(tmp_path: Path) -> None:
    root = fake_root(tmp_path, "0::/job\n", {"job/memory.max": str(30 * MIB)})
    assert local_memory_bytes(root, {"SLURM_MEM_PER_NODE": "20"}) == 20 * MIB
    assert local_memory_bytes(root, {"SLURM_MEM_PER_NODE": "40"}) == 30 * MIB


def test_this_machine_has_memory() -> None:
    assert local_memory_bytes() > MIB


def fake_root(root: Path, groups: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root
