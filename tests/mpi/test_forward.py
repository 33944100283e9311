"""Models of any kind in worlds: many records, errors of single records, memory, resuming, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from harness import REPO, Mpi, complete_run, mpirun, read_jsonl, read_timing
from PIL import Image


def write_job(directory: Path, **sections: Any) -> Path:
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump({"output": {"path": str(directory / "out")}, **sections}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, np.random.default_rng(0).random((30_000, 8), dtype=np.float32))
    return path


def test_many_tiny_records_take_no_more_memory_than_few(one_mpi: Mpi, rows: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.npy"
    np.save(few, np.load(rows)[:1000])
    peaks = []
    for path in (few, rows):
        job = write_job(tmp_path, model={"path": "tests.modules:linear", "task": "forward"}, input={"path": str(path)})
        output = complete_run(one_mpi, 2, job, tmp_path / path.stem, cwd=REPO)
        peaks.append([rank["peak_memory_bytes"] for rank in read_timing(output)["ranks"]])
    # 29,000 records more: no more than the books of rank 0, of some hundred bytes a record.
    assert peaks[1][0] - peaks[0][0] < 20e6
    assert peaks[1][1] - peaks[0][1] < 10e6
    results = read_jsonl(output / "results.jsonl")
    assert [result["index"] for result in results] == list(range(30_000))
    places = [result["output"]["output"] for result in results]
    arrays = {name: np.load(output / name) for name in {place["file"] for place in places}}
    from tests import modules

    found = np.stack([arrays[place["file"]][place["row"]] for place in places])
    np.testing.assert_allclose(found, modules.linear_of(np.load(rows)), rtol=1e-5, atol=1e-6)


def test_a_broken_image_is_an_error_of_its_own(mpi: Mpi, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (40, 30), (40 * number, 10, 200)).save(folder / f"{number}.png")
    (folder / "0.png").write_bytes(b"no image")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    job = write_job(
        tmp_path,
        model={"path": "tests.modules:convolution", "task": "classify"},
        input={"path": str(folder)},
        images={"resize": 16, "crop": 16},
        parallel={"stages": 2, "micro_batch": 2},
    )
    run = mpirun(mpi, 2, ["mpinfer", "run", job], cwd=REPO)
    assert run.returncode == 1, run.stderr
    results = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert [result["id"] for result in results] == [f"{number}.png" for number in range(6)]
    assert [number for number, result in enumerate(results) if "error" in result] == [0, 3]
    assert all(str(folder) in results[number]["error"]["message"] for number in (0, 3))


def test_a_model_beyond_the_memory_limit_runs_split(one_mpi: Mpi, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((4, 512), dtype=np.float32))
    model = {"path": "tests.modules:wide", "task": "forward"}
    limit = {"memory_limit_gb": 0.009}  # the model's weights take 8.4 MB
    job = write_job(tmp_path, model=model, input={"path": str(tmp_path / "x.npy")}, parallel=limit)
    alone = mpirun(one_mpi, None, ["mpinfer", "run", job], cwd=REPO)
    assert alone.returncode == 2
    assert "model of 8 MB: does not fit 1 ranks of 9 MB" in alone.stderr
    output = complete_run(one_mpi, 2, job, tmp_path / "split", "parallel.shards=1", cwd=REPO)
    timing = read_timing(output)
    assert timing["plan"]["stages"] == 2
    of_ranks = [rank["weight_bytes"] for rank in timing["ranks"]]  # the cut depends on how the layers were timed
    assert sum(of_ranks) == 8 * (512 * 512 + 512) * 4
    assert 0 < max(of_ranks) < min(9e6, sum(of_ranks))


def test_a_model_that_cannot_be_cut_runs_whole_or_not_at_all(one_mpi: Mpi, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(12, dtype=np.float32).reshape(3, 4) - 4)
    model = {"path": "tests.modules:looks_at_its_numbers", "task": "forward"}
    job = write_job(
        tmp_path,
        model=model,
        input={"path": str(tmp_path / "x.npy")},
        parallel={"micro_batch": 1},
        output={"arrays": "inline"},
    )
    output = complete_run(one_mpi, 2, job, tmp_path / "whole", cwd=REPO)
    values = [result["output"]["output"] for result in read_jsonl(output / "results.jsonl")]
    assert values == [[-4, -3, -2, -1], [0, 2, 4, 6], [8, 10, 12, 14]]
    run = mpirun(one_mpi, 2, ["mpinfer", "run", job, "--set", "parallel.stages=2"], cwd=REPO)
    assert run.returncode == 2
    assert "parallel.stages=2: the model cannot be cut" in run.stderr


def test_batches_beyond_the_memory_are_computed_in_halves(one_mpi: Mpi, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((20, 8), dtype=np.float32))
    model = {"path": "tests.modules:hungry", "task": "forward"}
    job = write_job(
        tmp_path,
        model=model,
        input={"path": str(tmp_path / "x.npy")},
        parallel={"stages": 2, "micro_batch": 8},
        output={"arrays": "inline"},
    )
    halved = complete_run(one_mpi, 2, job, tmp_path / "halved", cwd=REPO)
    small = complete_run(one_mpi, 2, job, tmp_path / "small", "parallel.micro_batch=4", cwd=REPO)
    counts = [sum(rank["halved_batches"] for rank in read_timing(d)["ranks"]) for d in (halved, small)]
    assert counts == [2, 0]  # of three batches the last has four records
    found, wanted = ([r["output"]["output"] for r in read_jsonl(d / "results.jsonl")] for d in (halved, small))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_record_beyond_the_memory_fails_alone(one_mpi: Mpi, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[1.0], [2.0], [9.0], [1.0], [3.0], [8.0]], dtype=np.float32))
    job = write_job(
        tmp_path,
        model={"path": "tests.modules:greedy", "task": "forward"},
        input={"path": str(tmp_path / "x.npy")},
        parallel={"micro_batch": 4},
        output={"arrays": "inline"},
    )
    run = mpirun(one_mpi, 1, ["mpinfer", "run", job, "--output", tmp_path / "out"], cwd=REPO)
    assert run.returncode == 1, run.stderr
    assert "ran out of memory" in run.stdout + run.stderr
    results = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert [r["output"]["output"] if "output" in r else None for r in results] == [[1], [2], None, [1], [3], None]
    assert "needs more memory than its rank has, even alone" in results[2]["error"]["message"]


def test_a_killed_run_goes_on_under_another_layout(one_mpi: Mpi, rows: Path, tmp_path: Path) -> None:
    """Its journal keeps the results whose arrays are durable; shards that it left behind are gone at the end."""
    job = write_job(tmp_path, model={"path": "tests.modules:deep", "task": "forward"}, input={"path": str(rows)})
    whole = complete_run(one_mpi, 2, job, tmp_path / "whole", cwd=REPO)
    broken = tmp_path / "broken"
    broken.mkdir()
    journal = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (broken / "journal.jsonl").write_bytes(b"".join(journal[:2000]))
    kept = {json.loads(line[9:])["output"]["output"]["file"] for line in journal[1:2000]}
    (broken / "arrays").mkdir()
    for name in kept:
        (broken / name).write_bytes((whole / name).read_bytes())
    (broken / "arrays" / "000029999.output.npy").write_bytes(b"left behind")
    output = complete_run(one_mpi, 2, job, broken, "parallel.stages=2", resume=True, cwd=REPO)
    assert read_timing(output)["records"] == 30_000 - 1999
    for left, right in zip(read_jsonl(whole / "results.jsonl"), read_jsonl(output / "results.jsonl"), strict=True):
        assert left["id"] == right["id"]
    named = {result["output"]["output"]["file"] for result in read_jsonl(output / "results.jsonl")}
    assert {f"arrays/{path.name}" for path in (output / "arrays").iterdir()} == named
    arrays = {d: {p.name: np.load(p) for p in (d / "arrays").iterdir()} for d in (whole, output)}

    def row(directory: Path, result: dict[str, Any]) -> np.ndarray:
        place = result["output"]["output"]
        return arrays[directory][Path(place["file"]).name][place["row"]]

    for directory in (whole, output):
        assert mpirun(one_mpi, None, ["mpinfer", "verify", directory]).returncode == 0
    pairs = zip(read_jsonl(whole / "results.jsonl"), read_jsonl(output / "results.jsonl"), strict=True)
    for left, right in list(pairs)[::97]:
        np.testing.assert_allclose(row(whole, left), row(output, right), rtol=1e-5, atol=1e-6)
