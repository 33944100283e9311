"""Arrays of results in files beside them: what a result names is where its array is."""

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpinfer.errors import OutputError
from mpinfer.records import shards
from mpinfer.records.journal import Journal
from mpinfer.records.manifest import merge, verify
from mpinfer.records.shards import ShardWriter, named_files, remove_others

Places = dict[str, Any]


def read(directory: Path, place: Places) -> np.ndarray:
    rows = np.load(directory / place["file"])
    row: np.ndarray = rows[place["row"]]
    return row


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "arrays").iterdir())


# Shards


def test_every_array_is_where_its_result_says(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    rng = np.random.default_rng(0)
    wanted: dict[int, dict[str, np.ndarray]] = {}
    for index in (7, 3, 12, 4, 5):
        length = 2 + index % 2  # two shapes of one output, mixed
        states = rng.random((length, 3), dtype=np.float32)
        wanted[index] = {"states": states, "count": np.array(index, np.int64), "states.0": rng.random(2) > 0.5}
        writer.add(index, wanted[index])
    places = writer.flush()
    assert [index for index, _ in places] == [7, 3, 12, 4, 5]
    for index, by_output in places:
        assert by_output.keys() == wanted[index].keys()
        for name, array in wanted[index].items():
            found = read(tmp_path, by_output[name])
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert np.array_equal(found, array)
    assert files(tmp_path) == [
        "000000007-1.states.npy",
        "000000007.count.npy",
        "000000007.states.0.npy",
        "000000007.states.npy",
    ]
    assert dict(places)[3]["count"] == {"file": "arrays/000000007.count.npy", "row": 1}


def test_an_output_of_two_types_is_two_files(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add(0, {"x": np.array([1], np.int32)})
    writer.add(1, {"x": np.array([0.5], np.float32)})
    (_, first), (_, second) = writer.flush()
    assert first["x"]["file"] != second["x"]["file"]
    assert read(tmp_path, first["x"]).dtype == np.int32
    assert read(tmp_path, second["x"]).tolist() == [0.5]


def test_outputs_whose_names_look_like_numbered_files_stay_apart(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add(0, {"x": np.zeros(1), "x.1": np.full(2, 5.0)})
    writer.add(1, {"x": np.ones(2), "x.1": np.full(2, 6.0)})
    (_, first), (_, second) = writer.flush()
    assert [read(tmp_path, second[name]).tolist() for name in ("x", "x.1")] == [[1, 1], [6, 6]]
    assert read(tmp_path, first["x.1"]).tolist() == [5, 5]


@pytest.mark.parametrize("name", ["a/b", "../../a", "/a", "..", "né", "a\0b", ""])
def test_files_of_any_names_of_outputs_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    writer = ShardWriter(tmp_path / "out")
    (tmp_path / "out").mkdir()
    writer.add(0, {name: np.ones(1), "other": np.zeros(1)})
    ((_, places),) = writer.flush()
    assert read(tmp_path / "out", places[name]).tolist() == [1]
    assert len(files(tmp_path / "out")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_shard_has_files_of_its_own(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    assert writer.flush() == []
    assert not (tmp_path / "arrays").exists()
    writer.add(4, {"x": np.zeros(2)})
    ((_, first),) = writer.flush()
    writer.add(2, {"x": np.ones(2)})
    ((_, second),) = writer.flush()
    assert writer.flush() == []
    assert files(tmp_path) == ["000000002.x.npy", "000000004.x.npy"]
    assert [read(tmp_path, place["x"]).tolist() for place in (first, second)] == [[0, 0], [1, 1]]


def test_a_shard_that_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays" / "000000004.x.npy").write_bytes(b"half")
    (tmp_path / "arrays" / "000000004.x.npy.tmp").write_bytes(b"half")
    writer = ShardWriter(tmp_path)
    writer.add(4, {"x": np.ones(2)})
    ((_, places),) = writer.flush()
    assert read(tmp_path, places["x"]).tolist() == [1, 1]
    assert files(tmp_path) == ["000000004.x.npy"]


def test_a_shard_is_full_by_bytes_or_by_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    monkeypatch.setattr(shards, "SHARD_RECORDS", 3)
    writer = ShardWriter(tmp_path)
    fullness = []
    for index, size in enumerate([96, 4, 1, 1, 1]):
        writer.add(index, {"x": np.zeros(size, np.int8)})
        fullness.append(writer.is_full)
        if writer.is_full:
            writer.flush()
    assert fullness == [False, True, False, False, True]


def test_a_shard_is_named_only_when_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real = Path.replace

    def replace(path: Path, target: Path) -> Path:
        done.append("replace")
        return real(path, target)

    monkeypatch.setattr(shards.os, "fsync", lambda _: done.append("fsync"))
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(shards, "sync_directory", lambda _: done.append("sync directory"))
    writer = ShardWriter(tmp_path)
    writer.add(0, {"x": np.zeros(1), "y": np.zeros(1)})
    writer.flush()
    of_the_directory, *of_the_files = done
    assert of_the_directory == "fsync", "its name, in the output directory"
    assert of_the_files == ["fsync", "replace", "fsync", "replace", "sync directory"]


def test_a_shard_that_cannot_be_written_is_an_error_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "arrays").write_bytes(b"a file")
    writer = ShardWriter(tmp_path)
    writer.add(0, {"x": np.zeros(1)})
    with pytest.raises(OutputError, match="arrays: cannot be read or written"):
        writer.flush()


@pytest.mark.parametrize(
    ("result", "names"),
    [
        ({"output": {"x": {"file": "a", "row": 0}, "y": {"file": "b", "row": 0}, "n": 1}}, {"a", "b"}),
        ({"output": {"file": {"file": "a", "row": 0}}}, {"a"}),
        ({"output": {"label": "x", "file": "b"}}, set()),
        ({"output": {"text": 'the "file"'}}, set()),
        ({"id": "file", "error": {"message": "file"}}, set()),
    ],
)
def test_files_that_a_result_names(result: dict[str, Any], names: set[str]) -> None:
    assert named_files(json.dumps(result, separators=(",", ":")).encode()) == names


def test_removing_others_leaves_what_is_no_shard(tmp_path: Path) -> None:
    remove_others(tmp_path, set())  # no arrays: nothing to do
    (tmp_path / "arrays" / "folder").mkdir(parents=True)
    for name in ("a.npy", "b.npy", "c.npy.tmp"):
        (tmp_path / "arrays" / name).touch()
    (tmp_path / "d.npy").touch()
    remove_others(tmp_path, {"arrays/a.npy"})
    assert files(tmp_path) == ["a.npy", "folder"]
    assert (tmp_path / "d.npy").exists()


# With the manifest


def run(directory: Path) -> dict[str, Any]:
    """Four records, of which one is an error, in two shards."""
    ids = ["a", "b", "c", "d"]
    with closing(Journal.open(directory, {"model.path": "m"}, "ab" * 32, ids, resume=False)) as journal:
        writer = ShardWriter(directory)
        for indices in ([2, 0], [3]):
            for index in indices:
                writer.add(index, {"x": np.full(3, index, np.float32), "y": np.array(index)})
            for index, places in writer.flush():
                journal.append({"index": index, "id": ids[index], "output": places})
        journal.append({"index": 1, "id": "b", "error": {"type": "RecordError", "message": "broken"}})
        return merge(directory, journal, len(ids), {})


def test_the_manifest_knows_the_sizes_of_the_shards(tmp_path: Path) -> None:
    manifest = run(tmp_path)
    names = ["000000002.x.npy", "000000002.y.npy", "000000003.x.npy", "000000003.y.npy"]
    assert manifest["arrays_bytes"] == {f"arrays/{n}": (tmp_path / "arrays" / n).stat().st_size for n in names}
    assert files(tmp_path) == names
    verdict = verify(tmp_path)
    assert (verdict.complete, verdict.records, verdict.failed) == (True, 4, 1)
    for line in (tmp_path / "results.jsonl").read_bytes().splitlines():
        result = json.loads(line)
        if "output" in result:
            assert read(tmp_path, result["output"]["x"]).tolist() == [result["index"]] * 3


def test_merging_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / "arrays").mkdir()
    for name in ("000000001.x.npy", "000000000.x.npy.tmp"):
        (tmp_path / "arrays" / name).write_bytes(b"left")
    run(tmp_path)
    assert len(files(tmp_path)) == 4
    assert verify(tmp_path).complete


def test_a_missing_shard_is_found(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "arrays" / "000000003.x.npy").unlink()
    assert verify(tmp_path).problems == ["arrays/000000003.x.npy is missing, and results name it."]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_of_another_size_is_found(tmp_path: Path, change: int) -> None:
    run(tmp_path)
    path = tmp_path / "arrays" / "000000002.y.npy"
    size_bytes = path.stat().st_size
    os.truncate(path, size_bytes + change)
    problem = f"arrays/000000002.y.npy has {size_bytes + change} bytes, not {size_bytes}."
    assert verify(tmp_path).problems == [problem]


def test_a_shard_that_no_result_names_does_no_harm_to_a_complete_run(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "arrays" / "notes.txt").touch()
    assert verify(tmp_path).complete


@pytest.mark.parametrize("arrays_bytes", [[1], "text", 1, {"a\0b": 1}])
def test_a_manifest_with_damaged_sizes_is_a_problem(tmp_path: Path, arrays_bytes: Any) -> None:
    manifest = run(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "arrays_bytes": arrays_bytes}))
    assert not verify(tmp_path).complete


def test_resuming_without_the_shards_is_an_error_of_the_output(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "arrays" / "000000002.x.npy").unlink()
    journal = Journal.open(tmp_path, {"model.path": "m"}, "ab" * 32, ["a", "b", "c", "d"], resume=True)
    with closing(journal), pytest.raises(OutputError, match=r"000000002\.x\.npy"):
        merge(tmp_path, journal, 4, {})
