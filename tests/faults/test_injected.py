"""Every call that makes an output durable, killed once and failed once: nothing is lost, doubled, or claimed too early.

The program below is rank 0's part of a run alone: journal, array files, merge. `strace` has its k-th call of a kind end
with a signal or an error, for every k that there is.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mpinfer.records.manifest import verify

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from mpinfer.errors import MpinferError
from mpinfer.records.journal import Journal
from mpinfer.records.manifest import merge
from mpinfer.records.shards import ShardWriter

directory, ids = Path(sys.argv[1]), [f"r{index}" for index in range(6)]
try:
    journal = Journal.open(directory, {"model.path": "m"}, "ab" * 32, ids, resume=True)
    if not journal.complete:
        writer = ShardWriter(directory)
        for index in sorted(set(range(6)) - journal.done):
            if index == 3:
                journal.append({"index": 3, "id": ids[3], "error": {"type": "RecordError", "message": "no"}})
            else:
                writer.add(index, {"output": np.full(4, index)})
                for number, places in writer.flush():
                    journal.append({"index": number, "id": ids[number], "output": places})
            journal.flush()  # so that calls come in one order
        merge(directory, journal, len(ids), {})
    journal.close()
except MpinferError as error:
    sys.exit(f"mpinfer: error: {error}")
"""
CALLS = ["openat", "write", "fsync", "rename", "ftruncate", "mkdir"]
HARMS = {"killed": "signal=KILL", "full": "error=ENOSPC", "broken": "error=EIO"}
MOST = 40  # calls of a kind: the program makes fewer

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="no strace: install it to inject faults")


def run(directory: Path, harm: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    if harm:
        files = ["", "/journal.jsonl", "/results.jsonl.tmp", "/results.jsonl", "/manifest.json.tmp", "/manifest.json"]
        files += ["/arrays", *(f"/arrays/{index:09}.output.npy{end}" for index in range(6) for end in ("", ".tmp"))]
        paths = [part for file in files for part in ("-P", f"{directory}{file}")]
        command = ["strace", "-f", "-qq", "-o", f"{directory}.trace", *paths, "-e", f"inject={harm}", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def state(directory: Path) -> dict[str, bytes]:
    """Every file of a finished run; the order of a journal's lines is that of arrival."""
    files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    return {name: b"\n".join(sorted(data.splitlines())) if "journal" in name else data for name, data in files.items()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("unbroken") / "out"
    assert run(directory).returncode == 0
    assert len(directory.joinpath("results.jsonl").read_text().splitlines()) == 6
    return state(directory)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_once(
    call: str, harm: str, unbroken: dict[str, bytes], tmp_path: Path, sample: Callable[[bool], None]
) -> None:
    sample(harm != "broken" and call != "openat")
    for number in range(1, MOST):
        directory = tmp_path / str(number)
        harmed = run(directory, f"{call}:{HARMS[harm]}:when={number}")
        if not any(mark in Path(f"{directory}.trace").read_text() for mark in ("(INJECTED)", "killed by SIGKILL")):
            break
        where = f"{call} {number} {harm}: {harmed.returncode} {harmed.stderr}"
        if harm == "killed":
            assert harmed.returncode != 0, where
        elif harmed.returncode:
            assert "Traceback" not in harmed.stderr, where
            assert harmed.stderr.startswith(f"mpinfer: error: {directory}"), where
            assert "--resume" in harmed.stderr, where
            assert harm != "full" or "free some space" in harmed.stderr, where
        claimed = verify(directory).complete
        assert not claimed or state(directory) == unbroken, where
        assert harmed.returncode != 0 or claimed, where
        resumed = run(directory)
        assert resumed.returncode == 0, f"{where}; resumed: {resumed.stderr}"
        assert state(directory) == unbroken, where
        assert verify(directory).complete, where
    else:
        pytest.fail(f"more than {MOST} calls of {call}")
    assert number > 1, f"the program makes no call of {call}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system")
def test_small_disk(unbroken: dict[str, bytes], tmp_path: Path) -> None:
    """Full after ever more pages; then there is room."""
    fulls = 0
    for pages in range(2, MOST):
        disk = tmp_path / str(pages)
        disk.mkdir()
        size = f"size={4096 * pages}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], check=True, timeout=60)
        try:
            filled = run(disk / "out")
            if filled.returncode == 0:
                assert state(disk / "out") == unbroken
                break
            fulls += 1
            assert filled.stderr.startswith(f"mpinfer: error: {disk}/out"), filled.stderr
            assert "free some space and run again with --resume" in filled.stderr, filled.stderr
            assert not verify(disk / "out").complete
            subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True, timeout=60)
            assert run(disk / "out").returncode == 0
            assert state(disk / "out") == unbroken
        finally:
            subprocess.run(["umount", disk], check=True, timeout=60)
    assert fulls > 5
