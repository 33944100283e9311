"""What `mpinfer top` shows of a status, and what rank 0 writes into one."""

import json
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from mpinfer.cli import main
from mpinfer.coordinator.progress import Progress
from mpinfer.coordinator.status import StatusFile
from mpinfer.errors import ExitCode
from mpinfer.observe.top import frame

NOW = 10_000.0


def rank(number: int, **other: Any) -> dict[str, Any]:
    seconds = {"compute": 50.0, "send_wait": 0.0, "receive_wait": 25.0, "idle": 25.0, "overhead": 0.0}
    return {
        "rank": number,
        "host": f"node{number // 4}",
        "coordinates": {"replica": number // 4, "stage": number % 4, "shard": 0},
        "doing": "computing for 0.1 s",
        "heard_s_ago": 1.0,
        "moved_s_ago": 0.1,
        "records_done": 7,
        "memory_bytes": 1_500_000_000,
        "seconds": seconds,
        **other,
    }


def status(*ranks: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {
        "state": "running",
        "updated_unix_s": NOW - 1,
        "started_unix_s": NOW - 300,
        "host": "node0",
        "records": {"total": 200, "done": 50, "failed": 1},
        "records_per_s": 1.0,
        "recent_records_per_s": 2.0,
        "new_tokens_per_s": 30.0,
        "left_s": 75.0,
        "ranks": list(ranks),
        **other,
    }


def lines(shown: dict[str, Any], width: int = 120) -> list[str]:
    return list(frame(shown, NOW, width, "out/run"))


def test_a_running_job() -> None:
    title, bar, figures, _, _, *ranks, _ = lines(status(*map(rank, range(4))))
    assert title == "out/run: running, rank 0 on node0, for 5 min"
    assert bar.count("=") == 22  # a quarter of 90
    assert bar.endswith("25.0%")
    expected = "50 of 200 records, 1 failed; 2.00 records/s, 1.00 on average; 30 new tokens/s; about 75 s left"
    assert figures == expected
    assert len(ranks) == 4
    assert ranks[2].split()[:5] == ["2", "0/2/0", "7", "1500", "MB"]
    assert f"{'#' * 15}{'r' * 7}{'.' * 8}" in ranks[0] or f"{'#' * 15}{'r' * 8}{'.' * 7}" in ranks[0]
    assert all(line.endswith("computing for 0.1 s") for line in ranks)


@pytest.mark.parametrize(
    ("wrong", "mark"),
    [
        ({"heard_s_ago": 70.0}, "! silent for 70 s on node0"),
        ({"moved_s_ago": 40.0}, "! has not moved for 40 s on node0: computing for 0.1 s"),
        (
            {"seconds": {**rank(0)["seconds"], "compute": 90.0}},
            "! straggler on node0: computed for 90 s, its replica 50 s",
        ),
        ({"heard_s_ago": 70.0, "moved_s_ago": None}, "computing"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_rank_is_marked(wrong: dict[str, Any], mark: str) -> None:
    shown = lines(status(rank(0), rank(1), rank(2), rank(3, **wrong)), 200)
    assert [line for line in shown if mark in line][-1].split()[0] == "3"
    assert sum("! " in line for line in shown) == ("!" in mark)


def test_of_many_ranks_the_worst_are_shown() -> None:
    shown = lines(status(*(rank(n, moved_s_ago=30.0 if n == 300 else 0.1) for n in range(512))), 80)
    assert len(shown) < 30
    assert max(map(len, shown)) <= 120
    assert next(line for line in shown if line.startswith("512 ranks, 1 marked, at most 1.50 GB"))
    assert shown[6].split()[0] == "300"


def test_a_status_that_nobody_writes_any_more_says_so() -> None:
    assert "NOT UPDATED for 100 s" in lines(status(updated_unix_s=NOW - 100))[1]
    assert not any("NOT UPDATED" in line for line in lines(status(updated_unix_s=NOW - 100, state="complete")))


def test_before_anything_is_known() -> None:
    starting = status(state="starting")
    for key in ("records_per_s", "recent_records_per_s", "new_tokens_per_s", "left_s"):
        del starting[key]
    assert lines(starting)[2] == "50 of 200 records, 1 failed"
    assert lines({**starting, "records": {"total": 0, "done": 0, "failed": 0}})[1].endswith("100.0%")


def test_top_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "status.json").write_text(json.dumps(status(state="interrupted")))
    assert main(["top", str(tmp_path)]) == 0
    assert "interrupted" in capsys.readouterr().out
    (tmp_path / "status.json").write_text(json.dumps(status(rank(0))))
    assert main(["top", str(tmp_path), "--once"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "no status of this version"),
        ("{}", "no status of this version"),
        ('{"state": "running"}', "no status of this version"),
    ],
)
def test_top_refuses_what_is_no_status(
    held: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if held is not None:
        (tmp_path / "status.json").write_text(held)
    assert main(["top", str(tmp_path), "--once"]) == 2
    assert f"status.json: {says}" in capsys.readouterr().err


def test_the_states_of_a_run(tmp_path: Path) -> None:
    def read() -> dict[str, Any]:
        return json.loads((tmp_path / "status.json").read_text())

    file = StatusFile(tmp_path, total=10, done=4, failed=1)
    assert (read()["state"], read()["records"]) == ("starting", {"total": 10, "done": 4, "failed": 1})
    assert stat.S_IMODE((tmp_path / "status.json").stat().st_mode) == 0o600
    progress = Progress(10, 4, failed=1)
    file.run(progress, lambda: [rank(0)])
    for result in ({"output": {"token_ids": [1, 2]}}, {"output": {"samples": [{"token_ids": [3]}]}}, {"error": {}}):
        progress.advance(result)
    file.write()
    shown = read()
    assert shown["state"] == "running"
    assert shown["records"] == {"total": 10, "done": 7, "failed": 2}
    assert shown["new_tokens_per_s"] > 0
    assert 0 <= shown["left_s"] < 60
    assert shown["ranks"] == [rank(0)]
    assert lines(shown)
    file.state = "stopping"
    file.write()
    assert read()["state"] == "stopping"
    file.close(ExitCode.INTERRUPTED)
    file.write()  # the last word is written
    assert read()["state"] == "interrupted"


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (ExitCode.COMPLETE, "complete"),
        (ExitCode.RECORDS_FAILED, "complete"),
        (ExitCode.BAD_INPUT, "fault"),
        (ExitCode.FAULT, "fault"),
        (ExitCode.INTERRUPTED, "interrupted"),
    ],
)
def test_the_end_of_a_run(code: ExitCode, state: str, tmp_path: Path) -> None:
    StatusFile(tmp_path, 1, 0, 0).close(code)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == state


def test_the_status_keeps_itself_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpinfer.coordinator.status.EVERY_S", 0.01)
    file, progress = StatusFile(tmp_path, 10, 0, 0), Progress(10, 0)
    file.run(progress, list)
    progress.advance({})
    deadline = time.monotonic() + 20
    while json.loads((tmp_path / "status.json").read_text())["records"]["done"] != 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    written = (tmp_path / "status.json").stat().st_mtime_ns
    time.sleep(0.2)
    assert (tmp_path / "status.json").stat().st_mtime_ns == written  # nothing has happened
    file.close(0)


def test_a_disk_that_takes_nothing_is_no_fault_of_the_run(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "missing", 1, 0, 0)
    file.close(0)
    assert not list(tmp_path.iterdir())


def test_a_status_that_cannot_be_told_is_no_fault_of_the_run(tmp_path: Path) -> None:
    def ranks() -> list[dict[str, Any]]:
        raise KeyError("a rank that nobody knows")

    file = StatusFile(tmp_path, 1, 0, 0)
    file.run(Progress(1, 0), ranks)
    file.close(0)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "starting"
