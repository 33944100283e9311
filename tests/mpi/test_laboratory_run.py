"""`mpinfer bench JOB.yaml` starts real worlds and compares what they gave; weights that are made up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from harness import Mpi, Tiny, mpirun, read_jsonl, read_timing

from mpinfer.experiments.table import COLUMNS


def test_strategies_are_run_and_compared(one_mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    matrix = {
        "strategies": {"data": None, "static": None, "wire-int8": None, "wide": {"parallel.shards": 4}},
        "ranks": 2,
        "repeats": 1,
    }
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(matrix, sort_keys=False))
    command = ["mpinfer", "bench", tiny.job, "--matrix", tmp_path / "matrix.yaml", "--output", tmp_path / "bench"]
    bench = mpirun(one_mpi, None, command, timeout_s=300)
    assert bench.returncode == 0, bench.stderr
    report = json.loads((tmp_path / "bench/bench.json").read_text())
    rows = {row["strategy"]: row for row in report["rows"]}
    assert [row["layout"] for row in report["rows"] if row["status"] == "complete"] == ["2x1x1", "2x1x1", "1x2x1"]
    assert rows["wide"]["status"] == "failed"
    assert "parallel.shards=4" in rows["wide"]["problem"]
    assert rows["wide"]["problem"] in bench.stdout
    assert rows["static"]["verdict"] == "identical"
    assert rows["wire-int8"]["verdict"] == "lossy"
    assert rows["wire-int8"]["perplexity"] > 1
    assert rows["wire-int8"]["bytes_sent"] > rows["data"]["bytes_sent"]
    for row in (rows["data"], rows["static"], rows["wire-int8"]):
        assert (row["records"], row["failed_records"]) == (len(tiny.prompts), 0)
        assert row["wall_s"] > 0
        assert row["peak_memory_bytes"] > row["weight_bytes"] > 0
        assert {row["strategy"], row["layout"]} <= set((tmp_path / "bench/bench.md").read_text().split())
    # An even share of the records each, by number.
    replicas = [rank["prompt_tokens"] for rank in read_timing(tmp_path / "bench/runs/static-2-1")["ranks"]]
    half = len(tiny.prompts) // 2
    lengths = [len(prompt) for prompt in tiny.prompts]
    assert replicas == [sum(lengths[:half]), sum(lengths[half:])]
    assert report["machine"]["cores"] >= 1
    assert all(column.head in bench.stdout for column in COLUMNS)


def test_fake_weights_take_the_place_of_real_ones(
    one_mpi: Mpi, tiny: Tiny, run_layout: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(tiny.model / "config.json", tmp_path / "model")
    outputs = []
    for axis in ("stages", "shards"):
        output = tmp_path / axis
        keys = [f"model.path={tmp_path / 'model'}", "model.weights=fake", f"parallel.{axis}=2"]
        options = [part for key in keys for part in ("--set", key)]
        run = mpirun(one_mpi, 2, ["mpinfer", "run", tiny.job, "--output", output, *options])
        assert run.returncode == 0, run.stderr
        assert "warning: model.weights=fake: results mean nothing" in run.stderr
        assert json.loads((output / "manifest.json").read_text())["fake_weights"] is True
        assert sum(rank["read_bytes"] for rank in read_timing(output)["ranks"]) == 0
        outputs.append([result["output"]["token_ids"] for result in read_jsonl(output / "results.jsonl")])
    assert outputs[0] == outputs[1]  # the same numbers in every layout
    real, fake = read_timing(run_layout(one_mpi, 1, 2)), read_timing(tmp_path / "stages")
    held = [sum(rank["weight_bytes"] for rank in timing["ranks"]) for timing in (real, fake)]
    assert held[1] == pytest.approx(held[0], rel=0.1)  # a tied tensor may be held packed, too
    assert json.loads((run_layout(one_mpi, 1, 2) / "manifest.json").read_text())["fake_weights"] is False
