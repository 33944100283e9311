import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpinfer.errors import OutputError
from mpinfer.records import journal as journal_module
from mpinfer.records.journal import Journal, Progress, read_progress

IDENTITY = {"model.path": "/models/m", "model.dtype": "float32", "generate.temperature": 0.0}
SHA = "ab" * 32
IDS: list[str | int] = ["a", 1, "é", "d", "e", "f"]


def result(index: int, ids: list[str | int] = IDS) -> dict[str, Any]:
    if index % 4 == 3:
        return {"index": index, "id": ids[index], "error": {"type": "RecordError", "message": "too long"}}
    return {"index": index, "id": ids[index], "output": {"text": f"né {index}\n", "token_ids": [index] * index}}


def open_journal(directory: Path, resume: bool = False, **changes: Any) -> Journal:
    arguments = {"identity": IDENTITY, "input_sha256": SHA, "ids": IDS, **changes}
    return Journal.open(directory, resume=resume, **arguments)


def write(directory: Path, *indices: int, resume: bool = False) -> None:
    with closing(open_journal(directory, resume)) as journal:
        for index in indices:
            journal.append(result(index))


def held(directory: Path) -> list[dict[str, Any]]:
    with closing(open_journal(directory, resume=True)) as journal:
        return [json.loads(line) for line in journal.results_in_order()]


def refusal(directory: Path, resume: bool = False, **changes: Any) -> str:
    with pytest.raises(OutputError) as caught:
        open_journal(directory, resume, **changes).close()
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# What is written


def test_results_come_back_by_index(tmp_path: Path) -> None:
    with closing(open_journal(tmp_path)) as journal:
        for index in (4, 0, 5, 3):
            journal.append(result(index))
        assert journal.done == {0, 3, 4, 5}
        assert journal.errors == 1
        assert [json.loads(line) for line in journal.results_in_order()] == [result(i) for i in (0, 3, 4, 5)]
        journal.append(result(1))
        assert [json.loads(line)["index"] for line in journal.results_in_order()] == [0, 1, 3, 4, 5]


def test_text_stays_readable_and_one_line(tmp_path: Path) -> None:
    with closing(open_journal(tmp_path)) as journal:
        journal.append(result(2))
        (line,) = journal.results_in_order()
    assert '"id": "é"'.encode() in line
    assert b"\n" not in line


def test_half_a_surrogate_pair_is_kept(tmp_path: Path) -> None:
    ids: list[str | int] = ["\ud83d"]
    entry = {"index": 0, "id": "\ud83d", "output": {"text": "\ud83d"}}
    with closing(open_journal(tmp_path, ids=ids)) as journal:
        journal.append(entry)
    with closing(open_journal(tmp_path, resume=True, ids=ids)) as journal:
        (line,) = journal.results_in_order()
    assert json.loads(line.decode()) == entry


def test_the_first_result_of_a_record_wins(tmp_path: Path) -> None:
    with closing(open_journal(tmp_path)) as journal:
        journal.append(result(0))
        journal.append({"index": 0, "id": "a", "error": {"type": "RecordError", "message": "late"}})
        assert journal.errors == 0
    with closing(open_journal(tmp_path, resume=True)) as journal:
        journal.append({"index": 0, "id": "a", "error": {"type": "RecordError", "message": "later"}})
        assert journal.errors == 0
    assert held(tmp_path) == [result(0)]
    assert len((tmp_path / "journal.jsonl").read_bytes().splitlines()) == 2


@pytest.mark.parametrize(
    "entry",
    [
        {"index": 6, "id": "g", "output": {}},
        {"index": -1, "id": "f", "output": {}},
        {"index": 0, "id": "b", "output": {}},
        {"index": 0, "id": "a"},
        {"index": 0, "id": "a", "output": {}, "error": {}},
        {"index": 0, "id": "a", "output": {"score": float("nan")}},
    ],
)
def test_a_result_that_cannot_be_of_this_run_is_a_bug_of_the_caller(tmp_path: Path, entry: dict[str, Any]) -> None:
    with closing(open_journal(tmp_path)) as journal:
        with pytest.raises(ValueError, match=r"record|JSON"):
            journal.append(entry)
        assert journal.done == set()


def test_a_closed_journal_takes_and_gives_nothing(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.close()
    journal.close()
    with pytest.raises(ValueError, match="closed"):
        journal.append(result(0))
    with pytest.raises(ValueError, match="closed"):
        next(journal.results_in_order())


# When it is written


@pytest.fixture
def no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SYNC_INTERVAL_S", 600.0)


@pytest.mark.usefixtures("no_interval")
def test_a_full_batch_is_written_without_waiting(tmp_path: Path) -> None:
    ids: list[str | int] = list(range(200))
    with closing(open_journal(tmp_path, ids=ids)) as journal:
        for index in range(63):
            journal.append(result(index, ids))
        time.sleep(0.05)
        assert read_progress(tmp_path) == Progress(0, 0, 200)
        journal.append(result(63, ids))
        wait_until(lambda: read_progress(tmp_path) == Progress(64, 16, 200))


def test_a_lone_result_is_written_after_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SYNC_INTERVAL_S", 0.05)
    with closing(open_journal(tmp_path)) as journal:
        journal.append(result(0))
        wait_until(lambda: read_progress(tmp_path) == Progress(1, 0, 6))


@pytest.mark.usefixtures("no_interval")
def test_flush_and_close_do_not_wait_for_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), synced.append(os.fstat(fd).st_size)))
    path = tmp_path / "journal.jsonl"
    with closing(open_journal(tmp_path)) as journal:
        journal.append(result(0))
        journal.flush()
        assert synced[-1] == path.stat().st_size
        assert read_progress(tmp_path) == Progress(1, 0, 6)
        journal.append(result(1))
    assert synced[-1] == path.stat().st_size
    assert read_progress(tmp_path) == Progress(2, 0, 6)


def test_append_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids: list[str | int] = list(range(500))
    journal = open_journal(tmp_path, ids=ids)
    disk = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda fd: disk.wait(30))
    start_s = time.monotonic()
    for index in range(500):
        journal.append(result(index, ids))
    assert time.monotonic() - start_s < 10
    assert journal._durable < journal._end
    disk.set()
    journal.close()
    assert read_progress(tmp_path) == Progress(500, 125, 500)


# A disk that fails


def full_disk(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_told_by_append_and_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(journal_module, "SYNC_INTERVAL_S", 0.01)
    journal = open_journal(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        journal.append(result(0))
        journal._writer.join(10)
        with pytest.raises(OutputError, match=r"journal\.jsonl: .*No space left on device.*--resume"):
            journal.append(result(1))
        with pytest.raises(OutputError, match="No space left"):
            next(journal.results_in_order())
        with pytest.raises(OutputError, match="No space left"):
            journal.close()
    write(tmp_path, *range(6), resume=True)  # the lock is free and the file is good
    assert held(tmp_path) == [result(index) for index in range(6)]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_told_by_close_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    journal = open_journal(tmp_path)
    journal.append(result(0))
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OutputError, match="No space left"):
        journal.close()


def test_a_disk_that_fills_within_a_line_leaves_a_torn_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 0)
    journal = open_journal(tmp_path, resume=True)
    os_write = os.write
    room = iter([7])

    def nearly_full_disk(fd: int, data: bytes) -> int:
        return os_write(fd, data[: next(room, 0)]) or full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", nearly_full_disk)
        journal.append(result(1))
        with pytest.raises(OutputError, match="No space left"):
            journal.close()
    assert not (tmp_path / "journal.jsonl").read_bytes().endswith(b"\n")
    assert held(tmp_path) == [result(0)]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: os_write(fd, data[:5]))
    write(tmp_path, 2, 0, 1)
    assert held(tmp_path) == [result(0), result(1), result(2)]


def test_a_disk_that_is_full_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_disk)
        assert "No space left" in refusal(tmp_path)
    write(tmp_path, 0)
    assert held(tmp_path) == [result(0)]


def test_a_result_damaged_after_it_was_written_is_not_given_out(tmp_path: Path) -> None:
    with closing(open_journal(tmp_path)) as journal:
        journal.append(result(0))
        journal.flush()
        path = tmp_path / "journal.jsonl"
        path.write_bytes(path.read_bytes().replace("né 0".encode(), "né 9".encode()))
        with pytest.raises(OutputError, match="record 0 was damaged"):
            list(journal.results_in_order())


# Resuming


def test_resume_goes_on(tmp_path: Path) -> None:
    write(tmp_path, 5, 3)
    with closing(open_journal(tmp_path, resume=True)) as journal:
        assert journal.done == {3, 5}
        assert journal.errors == 1
        assert not journal.complete
        for index in (0, 4, 2, 1):
            journal.append(result(index))
        assert [json.loads(line) for line in journal.results_in_order()] == [result(i) for i in range(6)]
    assert held(tmp_path) == [result(i) for i in range(6)]


def test_the_first_of_two_results_in_the_file_wins(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    late = {"index": 0, "id": "a", "error": {"type": "RecordError", "message": "late"}}
    write(tmp_path, 0, 1)
    path.write_bytes(path.read_bytes() + journal_module._encode(late))
    assert held(tmp_path) == [result(0), result(1)]
    assert read_progress(tmp_path) == Progress(2, 0, 6)


def test_resume_without_a_journal_starts(tmp_path: Path) -> None:
    write(tmp_path / "new" / "deep", 0, resume=True)
    assert held(tmp_path / "new" / "deep") == [result(0)]


def test_a_tail_torn_at_any_byte_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(tmp_path, 0, 3, 2)
    whole = path.read_bytes()
    *_, last = whole.splitlines(keepends=True)
    start = len(whole) - len(last)
    for size in range(start, len(whole)):
        path.write_bytes(whole[:size])
        assert held(tmp_path) == [result(0), result(3)], size
        assert path.read_bytes() == whole[:start], size
        write(tmp_path, 2, resume=True)
        assert path.read_bytes() == whole, size


def test_a_header_torn_at_any_byte_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(tmp_path, 0)
    whole = path.read_bytes()
    for size in range(len(whole.splitlines(keepends=True)[0])):
        path.write_bytes(whole[:size])
        write(tmp_path, 0, resume=True)
        assert path.read_bytes() == whole, size


def test_every_flipped_byte_of_the_tail_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(tmp_path, 0, 3)
    whole = path.read_bytes()
    for position in range(whole.index(b"\n", whole.index(b"\n") + 1) + 1, len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert held(tmp_path) == [result(0)], position


def test_a_tail_of_several_bad_lines_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(tmp_path, 0)
    good = path.read_bytes()
    path.write_bytes(good + b"\0" * 4096 + b"\nrubbish\n\n12345678 {")
    assert held(tmp_path) == [result(0)]
    assert path.read_bytes() == good


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("torn_tail", [b"", b"0123"])
def test_damage_before_good_lines_is_refused(tmp_path: Path, number: int, torn_tail: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    write(tmp_path, 0, 1, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = lines[number - 1].replace(b"output", b"outpux")
    damaged = b"".join(lines) + torn_tail
    path.write_bytes(damaged)
    message = refusal(tmp_path, resume=True)
    assert f"line {number} is damaged" in message
    assert f"keep only its first {number - 1} lines" in message
    assert path.read_bytes() == damaged
    path.write_bytes(b"".join(lines[: number - 1]))  # the fix that the message gives
    assert held(tmp_path) == [result(index) for index in range(number - 2)]


@pytest.mark.parametrize("content", [b"somebody's\n", b"somebody's", b'{"log": 1}\n{"log": 2}\n', b"\n"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.jsonl").write_bytes(content)
    assert "line 1 is not the header" in refusal(tmp_path, resume=True)
    assert (tmp_path / "journal.jsonl").read_bytes() == content


def test_a_journal_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "FORMAT", 2)
        write(tmp_path, 0)
    assert "journal format 2 is not 1" in refusal(tmp_path, resume=True)
    assert read_progress(tmp_path) is None


def test_results_of_other_ids_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 0)
    assert "line 2 is a result for record 0 with id 'a', not 'b'" in refusal(tmp_path, resume=True, ids=["b"])


def test_another_identity_is_refused_by_its_first_key(tmp_path: Path) -> None:
    write(tmp_path, 0)
    message = refusal(
        tmp_path, resume=True, identity={**IDENTITY, "model.dtype": "bfloat16", "generate.temperature": 1.0}
    )
    assert "model.dtype is 'bfloat16' but the run was begun with 'float32'" in message
    assert "temperature" not in message


def test_a_key_that_only_one_side_has_is_a_difference(tmp_path: Path) -> None:
    write(tmp_path, 0)
    message = refusal(tmp_path, resume=True, identity={**IDENTITY, "new": "absent"})
    assert "new is 'absent' but the run was begun with absent" in message
    message = refusal(tmp_path, resume=True, identity={"model.path": "/models/m"})
    assert "model.dtype is absent but the run was begun with 'float32'" in message


def test_an_identity_is_compared_as_json(tmp_path: Path) -> None:
    identity = {"cuts": (1, 2)}
    open_journal(tmp_path, identity=identity).close()
    open_journal(tmp_path, resume=True, identity=identity).close()


def test_another_input_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 0)
    message = refusal(tmp_path, resume=True, input_sha256="cd" * 32)
    assert "the input file changed" in message
    assert SHA in message
    assert "cd" * 32 in message


@pytest.mark.parametrize(
    ("manifest", "complete"), [('{"complete": true}', True), ('{"complete": false}', False), ("{", False)]
)
def test_a_complete_run_says_so_and_keeps_its_files(tmp_path: Path, manifest: str, complete: bool) -> None:
    write(tmp_path, 0)
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "results.jsonl").write_text("x")
    with closing(open_journal(tmp_path, resume=True)) as journal:
        assert journal.complete is complete
        assert journal.done == {0}
    assert (tmp_path / "manifest.json").read_text() == manifest
    assert (tmp_path / "results.jsonl").read_text() == "x"


# The directory


def test_foreign_files_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    write(tmp_path, 0)
    assert held(tmp_path) == [result(0)]


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path, 0)
    before = (tmp_path / "journal.jsonl").read_bytes()
    message = refusal(tmp_path)
    assert "holds an unfinished run" in message
    assert "use --resume" in message
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_a_run_that_ended_before_its_first_result_may_be_begun_again_as_another_job(tmp_path: Path) -> None:
    write(tmp_path)
    with closing(open_journal(tmp_path, identity={"model.path": "/models/other"})) as journal:
        journal.append(result(0))
    assert "model.path is '/models/m'" in refusal(tmp_path, resume=True)
    assert read_progress(tmp_path) == Progress(1, 0, 6)


@pytest.mark.parametrize("resume", [True, False])
def test_a_file_of_somebody_else_is_not_overwritten(tmp_path: Path, resume: bool) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text("one\ntwo\n")
    refusal(tmp_path, resume)
    assert path.read_text() == "one\ntwo\n"


def test_a_complete_run_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path, 0)
    (tmp_path / "manifest.json").write_text('{"complete": true}')
    assert "holds a complete run" in refusal(tmp_path)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"), [("manifest.json", "a complete run"), ("results.jsonl", "an unfinished run")]
)
def test_results_without_a_journal_are_not_overwritten(tmp_path: Path, resume: bool, name: str, kind: str) -> None:
    (tmp_path / name).write_text('{"complete": true}')
    message = refusal(tmp_path, resume)
    assert f"holds {kind} ({name})" in message
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_or_a_place_below_one_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    assert "is not a directory; choose another" in refusal(tmp_path / "out")
    assert "Not a directory" in refusal(tmp_path / "out" / "deeper")
    assert (tmp_path / "out").read_text() == "x"


@pytest.mark.parametrize("call", ["open", "mkdir"])
def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, call, refuse)
    assert "Permission denied" in refusal(tmp_path / "out")


# The lock

OTHER_RUN = """
import os, signal, sys
from pathlib import Path
from mpinfer.records.journal import Journal
journal = Journal.open(Path(sys.argv[1]), {}, "ab", [0, 1, 2], resume=False)
for index in (0, 2):
    journal.append({"index": index, "id": index, "output": {}})
journal.flush()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", OTHER_RUN, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_run_in_another_process_keeps_the_directory_until_it_is_killed(
    tmp_path: Path, other_run: "subprocess.Popen[str]"
) -> None:
    for resume in (True, False):
        assert "is in use by another run" in refusal(tmp_path, resume)
    assert read_progress(tmp_path) == Progress(2, 0, 3)
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    with closing(open_journal(tmp_path, True, identity={}, input_sha256="ab", ids=[0, 1, 2])) as journal:
        assert journal.done == {0, 2}


def test_the_lock_ends_with_close_and_with_a_refused_open(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    assert "is in use" in refusal(tmp_path, resume=True)
    journal.close()
    assert "changed" in refusal(tmp_path, resume=True, input_sha256="cd")
    open_journal(tmp_path, resume=True).close()


@pytest.mark.parametrize(("number", "runs"), [(errno.ENOSYS, True), (errno.ENOLCK, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int, runs: bool
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(journal_module.fcntl, "flock", fail)
    if runs:
        write(tmp_path, 0)
        assert "has no locks" in caplog.text
    else:
        assert os.strerror(errno.EIO) in refusal(tmp_path)


# Progress


def test_progress_by_the_file_alone(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    assert read_progress(tmp_path / "none") is None
    path = tmp_path / "journal.jsonl"
    path.touch()
    assert read_progress(tmp_path) is None
    path.unlink()
    write(tmp_path, 3, 0)
    torn = path.read_bytes()[:-1]
    path.write_bytes(torn)
    assert read_progress(tmp_path) == Progress(1, 1, 6)
    assert path.read_bytes() == torn


# Any history


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(), count=st.integers(1, 12), kills=st.lists(st.floats(0, 1), max_size=4))
def test_any_kills_and_resumes_give_the_unbroken_results(seed: int, count: int, kills: list[float]) -> None:
    order = random.Random(seed)
    ids: list[str | int] = [f"record {index}" for index in range(count)]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "journal.jsonl")
        for kill in [*kills, None]:
            with closing(open_journal(Path(name), resume=True, ids=ids)) as journal:
                missing = sorted(set(range(count)) - journal.done)
                order.shuffle(missing)
                for index in missing if kill is None else missing[: order.randint(0, count)]:
                    journal.append(result(index, ids))
                results = list(journal.results_in_order())
            if kill is not None:
                os.truncate(path, int(kill * path.stat().st_size))
        assert [json.loads(line) for line in results] == [result(index, ids) for index in range(count)]
