"""What a run does not do: unpickle, listen on a port, write files that others can read."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import yaml
from harness import REPO, Mpi, Tiny, mpirun

AUDITED = Path(__file__).with_name("audited_rank.py")


@pytest.mark.parametrize("kind", ["decoder", "module"])
def test_a_run_neither_unpickles_nor_listens_and_keeps_its_files_private(
    one_mpi: Mpi, tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    np.save(tmp_path / "x.npy", np.ones((5, 8), dtype=np.float32))
    output, job = tmp_path / "out", tmp_path / "job.yaml"
    model, records = {"path": "tests.modules:linear", "task": "forward"}, {"path": str(tmp_path / "x.npy")}
    job.write_text(tiny.job.read_text() if kind == "decoder" else yaml.safe_dump({"model": model, "input": records}))
    umask = os.umask(0o022)
    try:
        run = mpirun(one_mpi, 2, ["python", AUDITED, "run", job, "--output", output], cwd=REPO)
    finally:
        os.umask(umask)
    assert run.returncode == 0, run.stderr
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [output, *output.rglob("*")] if path.is_file()}
    assert {output / "results.jsonl", output / "journal.jsonl", output / "manifest.json"} <= modes.keys()
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(output.stat().st_mode) == 0o700


def test_the_audit_would_tell(one_mpi: Mpi) -> None:
    run = mpirun(one_mpi, None, ["python", AUDITED, "--self-test"])
    assert run.returncode == 99
    assert "audited: pickle.find_class" in run.stderr
