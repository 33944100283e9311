"""`mpinfer.run` and `mpinfer.Pipeline` in a program of the user's own, on every rank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import MAX_NEW_TOKENS, Mpi, Tiny, assert_token_rule, mpirun, read_jsonl

_PROGRAM = f"""
import json, signal, sys, threading
from pathlib import Path
from mpi4py import MPI
import mpinfer

job, model, records, answers = map(Path, sys.argv[1:])
rank = MPI.COMM_WORLD.rank
before = (signal.getsignal(signal.SIGINT), sys.excepthook)
told = []
try:
    mpinfer.run({{"model": {{"path": "nowhere"}}, "generate": {{"max_new_tokens": 4}}}}, [{{"token_ids": [1]}}])
except Exception as error:
    told = [type(error).__name__, str(error)]
lines = (json.loads(line) for line in records.open()) if rank == 0 else None
pipeline = mpinfer.Pipeline.from_pretrained(
    model, generate={{"max_new_tokens": {MAX_NEW_TOKENS}}}, parallel={{"stages": MPI.COMM_WORLD.size}}
)
answer = {{
    "rank": rank,
    "told": told,
    "pipeline": pipeline(lines),
    "job": mpinfer.run(job),
    "given back": before == (signal.getsignal(signal.SIGINT), sys.excepthook),
    "threads": [thread.name for thread in threading.enumerate() if thread.name == "stop" and thread.is_alive()],
}}
Path(answers, f"{{rank}}.json").write_text(json.dumps(answer))
"""


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_program_of_ones_own(mpi: Mpi, tiny: Tiny, tmp_path: Path, ranks: int) -> None:
    """Three runs, the first refused: results on rank 0, and nothing is left behind."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    job = tmp_path / "job.yaml"
    job.write_text(tiny.job.read_text().replace(str(tiny.directory / "out"), str(tmp_path / "out")))
    ran = mpirun(mpi, ranks, ["python", program, job, tiny.model, tiny.records, tmp_path], cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    first, *others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks))
    for results in (first["pipeline"], first["job"]):
        assert_token_rule(results, tiny.references)
    assert first["job"] == read_jsonl(tmp_path / "out" / "results.jsonl")
    assert all((other["pipeline"], other["job"]) == (None, None) for other in others)
    for answer in (first, *others):
        assert answer["given back"]
        assert answer["threads"] == []
        assert answer["told"][0] == "MpinferError"
        assert "nowhere" in answer["told"][1]


def test_import_is_light() -> None:
    program = "import sys, mpinfer; print(sorted({'mpi4py', 'torch', 'numpy', 'yaml'} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
