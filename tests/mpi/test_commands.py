"""The other commands: help, plan, doctor, launch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from harness import Mpi, Tiny, assert_token_rule, mpirun, read_jsonl, read_timing

_HELP = """
import sys
from mpinfer.cli import main
try:
    main(["--help"])
except SystemExit:
    print(sorted({"torch", "transformers", "numpy", "mpi4py"} & sys.modules.keys()), file=sys.stderr)
"""

_WITHOUT_MPI = """
import sys
sys.modules["mpi4py"] = None  # importing it fails
from mpinfer.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_help_loads_nothing_heavy() -> None:
    shown = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, check=True)
    assert "run" in shown.stdout
    assert shown.stderr.strip() == "[]"


def test_plan_shows_stages(one_mpi: Mpi, tiny: Tiny) -> None:
    options = ["--ranks", 6, "--set", "parallel.stages=3", "--set", "parallel.shards=1"]
    plan = mpirun(one_mpi, None, ["mpinfer", "plan", tiny.job, *options])
    assert plan.returncode == 0, plan.stderr
    assert "2 replicas x 3 stages x 1 shards = 6 ranks" in plan.stdout
    table = plan.stdout.partition("  layout ")[0]
    stages = re.findall(r"^ +(\d+) +(\S.*?) +[0-9.]+ MB", table, re.MULTILINE)
    assert [number for number, _ in stages] == ["0", "1", "2"]
    assert stages[0][1].startswith("embed")
    assert stages[-1][1].endswith("head")


def test_plan_as_json(one_mpi: Mpi, tiny: Tiny) -> None:
    options = ["--ranks", 6, "--set", "parallel.stages=3", "--set", "parallel.shards=1", "--json"]
    plan = mpirun(one_mpi, None, ["mpinfer", "plan", tiny.job, *options])
    assert plan.returncode == 0, plan.stderr
    layout = json.loads(plan.stdout)
    assert (layout["replicas"], layout["stages"]) == (2, 3)
    cuts = layout["cuts"]
    assert len(cuts) == 4
    assert cuts == sorted(set(cuts)), "every stage holds a block"
    assert (cuts[0], cuts[-1]) == (0, 8), "6 layers, embedding and head"


def test_plan_needs_no_mpi(tiny: Tiny) -> None:
    command = [sys.executable, "-c", _WITHOUT_MPI, "plan", tiny.job, "--ranks", "2", "--json"]
    plan = subprocess.run(command, capture_output=True, text=True, check=False)
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["replicas"] == 2


def test_doctor_sees_both_ranks(mpi: Mpi) -> None:
    doctor = mpirun(mpi, 2, ["mpinfer", "doctor"])
    assert doctor.returncode == 0, doctor.stderr
    assert "2 ranks on 1 node" in doctor.stdout
    assert "ranks 0-1" in doctor.stdout
    if len(os.sched_getaffinity(0)) >= 2:
        assert "warning" not in doctor.stdout, "each rank has cores of its own"


def test_launch(mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    run = mpirun(mpi, None, ["mpinfer", "launch", "-n", 2, tiny.job, "--output", "out"], cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert_token_rule(read_jsonl(tmp_path / "out" / "results.jsonl"), tiny.references)
    assert [rank["rank"] for rank in read_timing(tmp_path / "out")["ranks"]] == [0, 1]


def test_dry_run_leaves_nothing(mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    options = ["--output", tmp_path / "out", "--dry-run", "--set", "parallel.stages=2"]
    run = mpirun(mpi, 2, ["mpinfer", "run", tiny.job, *options])
    assert run.returncode == 0, run.stderr
    assert "1 replicas x 2 stages" in run.stderr
    assert not (tmp_path / "out").exists()
