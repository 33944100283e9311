import errno
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mpinfer.errors import OutputError
from mpinfer.records import journal as journal_module
from mpinfer.records.journal import Journal
from mpinfer.records.manifest import Verdict, merge, verify

IDENTITY = {"model.path": "/models/é", "model.dtype": "float32"}
IDS: list[str | int] = ["a", 1, "é", "d"]
FACTS = {"spec_fingerprint": "f" * 64, "versions": {"mpinfer": "0"}}


def result(index: int) -> dict[str, Any]:
    if index == 3:
        return {"index": index, "id": IDS[index], "error": {"type": "RecordError", "message": "empty"}}
    return {"index": index, "id": IDS[index], "output": {"text": f"né {index}\u2028\n"}}


def open_journal(directory: Path, resume: bool = False) -> Journal:
    return Journal.open(directory, IDENTITY, "ab" * 32, IDS, resume)


def run(directory: Path, order: tuple[int, ...] = (2, 3, 0, 1)) -> dict[str, Any]:
    with closing(open_journal(directory)) as journal:
        for index in order:
            journal.append(result(index))
        return merge(directory, journal, len(IDS), FACTS)


def refusal(verdict: Verdict) -> str:
    assert not verdict.complete
    assert verdict.problems
    assert all(problem.endswith(".") and "\n" not in problem for problem in verdict.problems)
    return " ".join(verdict.problems)


def test_results_are_merged_in_input_order(tmp_path: Path) -> None:
    manifest = run(tmp_path)
    results = (tmp_path / "results.jsonl").read_bytes()
    assert [json.loads(line) for line in results.split(b"\n")[:-1]] == [result(index) for index in range(4)]
    assert results.endswith(b"\n")
    assert '"né 2'.encode() in results
    assert json.loads((tmp_path / "manifest.json").read_bytes()) == manifest
    assert manifest == {
        "complete": True,
        "records": 4,
        "succeeded": 3,
        "failed": 1,
        "results_sha256": hashlib.sha256(results).hexdigest(),
        "results_bytes": len(results),
        "arrays_bytes": {},
        "input_sha256": "ab" * 32,
        "identity": IDENTITY,
        **FACTS,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.jsonl", "manifest.json", "results.jsonl"]
    assert verify(tmp_path) == Verdict(complete=True, records=4, failed=1, problems=[])


def test_the_order_of_arrival_leaves_no_trace(tmp_path: Path) -> None:
    assert run(tmp_path / "a", (0, 1, 2, 3)) == run(tmp_path / "b", (3, 1, 2, 0))
    assert (tmp_path / "a/results.jsonl").read_bytes() == (tmp_path / "b/results.jsonl").read_bytes()


def test_facts_cannot_replace_what_is_computed(tmp_path: Path) -> None:
    with closing(open_journal(tmp_path)) as journal:
        for index in range(4):
            journal.append(result(index))
        manifest = merge(tmp_path, journal, 4, {"complete": False, "failed": 0, "wall_s": 1.5})
    assert (manifest["complete"], manifest["failed"], manifest["wall_s"]) == (True, 1, 1.5)


def test_a_missing_result_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with closing(open_journal(tmp_path)) as journal:
        journal.append(result(0))
        journal.append(result(3))
        with pytest.raises(OutputError, match="2 of 4 records have no result, record 1 is the first"):
            merge(tmp_path, journal, 4, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_the_manifest_is_the_last_file_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        names.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    run(tmp_path)
    assert names == ["results.jsonl", "manifest.json"]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_run_killed_in_the_merge_is_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    replace = os.replace
    left = iter(range(renames))

    def full_disk(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OutputError, match="No space left"):
            run(tmp_path)
    assert "journal holds 4 of 4" in refusal(verify(tmp_path))
    with closing(open_journal(tmp_path, resume=True)) as journal:
        assert not journal.complete
        merge(tmp_path, journal, 4, FACTS)
    assert verify(tmp_path).complete
    with closing(open_journal(tmp_path, resume=True)) as journal:
        assert journal.complete


# What verify catches


def edit_results(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "results.jsonl"
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))

    return edit


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def forge(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    """Edit the results and make bytes and checksum in the manifest agree: what is left are the other rules."""

    def edit(directory: Path) -> None:
        edit_results(change)(directory)
        content = (directory / "results.jsonl").read_bytes()
        edit_manifest(
            results_sha256=hashlib.sha256(content).hexdigest(),
            results_bytes=len(content),
        )(directory)

    return edit


def swap(lines: list[bytes]) -> list[bytes]:
    return [lines[1], lines[0], *lines[2:]]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (edit_results(lambda lines: [lines[0].replace(b" 0", b" 9"), *lines[1:]]), "results_sha256 is"),
        (edit_results(lambda lines: lines[:-1]), "records is 3, not 4"),
        (edit_results(swap), "Line 1 of results.jsonl has index 1, not 0"),
        (edit_results(lambda lines: [*lines, lines[0]]), "Line 5 of results.jsonl has index 0, not 4"),
        (edit_results(lambda lines: [*lines[:3], lines[3][:-1]]), "results_bytes is"),
        (forge(lambda lines: lines[:-1]), "records is 3, not 4"),
        (forge(lambda lines: [*lines[:1], *lines[2:]]), "Line 2 of results.jsonl has index 2, not 1"),
        (forge(swap), "Line 1 of results.jsonl has index 1, not 0"),
        (forge(lambda lines: [lines[0], lines[1].replace(b'"id": 1', b'"id": "a"'), *lines[2:]]), "repeats the id 'a'"),
        (forge(lambda lines: [lines[0].replace(b'"id"', b'"di"'), *lines[1:]]), "Line 1 of results.jsonl has no id"),
        (forge(lambda lines: [lines[0].replace(b"output", b"outpux"), *lines[1:]]), "not exactly one"),
        (forge(lambda lines: [lines[0].replace(b'"id"', b'"error": {}, "id"'), *lines[1:]]), "not exactly one"),
        (forge(lambda lines: [*lines[:3], lines[3].replace(b"error", b"output")]), "failed is 0, not 1"),
        (forge(lambda lines: [b"{\n", *lines[1:]]), "Line 1 of results.jsonl is not JSON"),
        (forge(lambda lines: [b"\xff\n", *lines[1:]]), "Line 1 of results.jsonl is not JSON"),
        (forge(lambda lines: [b"[]\n", *lines[1:]]), "Line 1 of results.jsonl is not a JSON object"),
        (edit_manifest(complete=False), "does not say that the run is complete"),
        (edit_manifest(records=5), "records is 4, not 5"),
        (edit_manifest(succeeded=4), "succeeded is 3, not 4"),
        (edit_manifest(failed=None), "failed is 1, not None"),
        (edit_manifest(results_sha256="0"), "results_sha256 is"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").unlink(), "journal holds 4 of 4 results"),
        (lambda path: (path / "results.jsonl").unlink(), "results.jsonl is missing"),
    ],
)  # fmt: skip
def test_verify_catches(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    run(tmp_path)
    damage(tmp_path)
    assert words in refusal(verify(tmp_path))


def test_every_changed_byte_of_the_results_is_caught(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert not verify(tmp_path).complete, position
    path.write_bytes(whole)
    assert verify(tmp_path).complete


def test_an_unfinished_run_says_how_far_it_got(tmp_path: Path) -> None:
    with closing(open_journal(tmp_path)) as journal:
        journal.append(result(3))
        journal.append(result(0))
        journal.flush()
        before = (tmp_path / "journal.jsonl").read_bytes()
        verdict = verify(tmp_path)  # while the run has the lock
    assert "journal holds 2 of 4 results; continue it with --resume" in refusal(verdict)
    assert (verdict.records, verdict.failed) == (2, 1)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    assert "holds neither a manifest.json nor a journal.jsonl" in refusal(verify(tmp_path))
    assert "is not a directory" in refusal(verify(tmp_path / "none"))
    (tmp_path / "file").touch()
    assert "is not a directory" in refusal(verify(tmp_path / "file"))


def test_verify_neither_writes_nor_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    monkeypatch.setattr(journal_module.fcntl, "flock", lambda *_: pytest.fail("locked"))
    verify(tmp_path)
    (tmp_path / "manifest.json").rename(tmp_path / "moved.json")
    verify(tmp_path)
    (tmp_path / "moved.json").rename(tmp_path / "manifest.json")
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    refusal(verify(tmp_path))
    (tmp_path / "manifest.json").unlink()
    assert "Permission denied" in refusal(verify(tmp_path))


def test_many_problems_are_cut_short(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(b"x\n" * 500)
    verdict = verify(tmp_path)
    assert len(verdict.problems) == 21
    assert verdict.problems[-1] == "There are 485 more problems."
