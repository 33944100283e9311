"""Replicas of uneven pace in a world: what one of them is stuck with is done by another."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from harness import FAULTY_RANK, REPO, Mpi, mpirun, read_jsonl, read_timing

from mpinfer.records.manifest import verify
from tests import modules

BATCHES, STALL_S, FOR_EVER_S = 40, 0.5, 600.0
STALLS_AFTER = 4  # forwards


@pytest.mark.parametrize(("stall_s", "arrays"), [(STALL_S, "npy"), (FOR_EVER_S, "inline")])
def test_a_replica_that_stalls_does_not_hold_records_up(
    one_mpi: Mpi, tmp_path: Path, stall_s: float, arrays: str
) -> None:
    rows = np.random.default_rng(0).random((2 * BATCHES, 8), dtype=np.float32)
    np.save(tmp_path / "rows.npy", rows)
    output = tmp_path / "out"
    sections = {
        "model": {"path": "tests.modules:linear", "task": "forward"},
        "input": {"path": str(tmp_path / "rows.npy")},
        "output": {"path": str(output), "arrays": arrays},
        "parallel": {"replicas": 2, "micro_batch": 2},
    }
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(sections), encoding="utf-8")
    run = mpirun(one_mpi, 2, ["python", FAULTY_RANK, 1, STALLS_AFTER, stall_s, "run", job], cwd=REPO)
    if stall_s == FOR_EVER_S:
        assert "no word of rank 1" in run.stderr
    else:
        assert run.returncode == 0, run.stderr
    assert verify(output).complete
    results = read_jsonl(output / "results.jsonl")
    assert [result["index"] for result in results] == list(range(len(rows)))
    assert len(journal_of(output)) == len(rows)
    found = [result["output"]["output"] for result in results]
    if arrays == "npy":
        found = [np.load(output / place["file"])[place["row"]] for place in found]
    np.testing.assert_allclose(found, modules.linear_of(rows), rtol=1e-5, atol=1e-6)
    # Half of the batches would have taken the stalling replica ten seconds, and all that it had in hand at first three.
    assert read_timing(output)["wall_s"] < 5 * STALL_S


def journal_of(output: Path) -> list[str]:
    """The journal's results, as they came."""
    return (output / "journal.jsonl").read_text(encoding="utf-8").splitlines()[1:]
