"""Runs over several hosts: network namespaces of this machine (`lab.py`)."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Mpi, Tiny, mpirun, read_timing
from lab import Lab, missing

HOSTS = ["h1", "h2", "h3", "h4"]
needs_lab = pytest.mark.skipif(missing() is not None, reason=str(missing()))
needs_delays = pytest.mark.skipif(missing(delay=True) is not None, reason=str(missing(delay=True)))

_ECHO = """
import socket
server = socket.create_server(("", 5000))
print("up", flush=True)
connection, _ = server.accept()
connection.sendall(connection.recv(100) + b" at " + socket.gethostname().encode())
"""

_ASK = """
import os, socket, time
connection = socket.create_connection(("h2", 5000), timeout=10)
started = time.perf_counter()
connection.sendall(socket.gethostname().encode())
answer = connection.recv(100).decode()
print(time.perf_counter() - started, len(os.sched_getaffinity(0)), answer, *os.listdir("/sys/class/net"), sep=",")
"""

_COUNT = """
import socket
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.bind(("", 5000))
print("up", flush=True)
receiver.settimeout(2)
count = 0
try:
    while receiver.recv(10):
        count += 1
except TimeoutError:
    print(count)
"""

_SEND_400 = """
import socket
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(400):
    sender.sendto(b"x", ("h2", 5000))
"""


def surroundings() -> dict[str, Any]:
    """What a lab could leave behind."""
    namespaces = set()
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            namespaces.add(os.readlink(path))
        except OSError:
            continue
    return {
        "namespaces": namespaces,
        "interfaces": sorted(os.listdir("/sys/class/net")),
        "mounts": Path("/proc/self/mounts").read_text(),
        "files": sorted(Path(tempfile.gettempdir()).glob("*lab-*")),
        "name": socket.gethostname(),
    }


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(RuntimeError, match="need root"):
        Lab(["h1"])
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda program: None if program == "nft" else program)
    with pytest.raises(RuntimeError, match="no nft in PATH: install nftables"):
        Lab(["h1"])


@pytest.mark.parametrize("delay_ms", [0, pytest.param(20, marks=needs_delays)])
@needs_lab
def test_hosts_know_each_other_and_leave_nothing(delay_ms: float) -> None:
    before = surroundings()
    with Lab(["h1", "h2"], rate_mbit=100, delay_ms=delay_ms) as lab:
        server = subprocess.Popen(lab.command("h2", [sys.executable, "-c", _ECHO]), stdout=subprocess.PIPE)
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        asked = subprocess.run(lab.command("h1", [sys.executable, "-c", _ASK]), capture_output=True, text=True)
        left = subprocess.Popen(lab.command("h1", ["sleep", "1000"]))
        assert surroundings() != before
    assert asked.returncode == 0, asked.stderr
    answered_s, cores, answer, *interfaces = asked.stdout.strip().split(",")
    assert answer == "h1 at h2"
    assert sorted(interfaces) == ["eth0", "lo"]
    assert int(cores) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert float(answered_s) >= 2 * delay_ms / 1e3
    assert left.wait() != 0, "it was killed"
    server.communicate()
    assert surroundings() == before


@needs_lab
def test_a_host_that_cannot_be_made_leaves_nothing() -> None:
    before = surroundings()
    with pytest.raises(RuntimeError, match=r"h1: nft .* < 20000 drop.* exceeds valid range"):
        Lab(["h1"], loss_percent=200)
    assert surroundings() == before


@needs_lab
def test_of_packets_the_given_share_is_lost() -> None:
    with Lab(["h1", "h2"], loss_percent=20) as lab:
        counting = subprocess.Popen(lab.command("h2", [sys.executable, "-c", _COUNT]), stdout=subprocess.PIPE)
        assert counting.stdout is not None
        assert counting.stdout.readline() == b"up\n"
        subprocess.run(lab.command("h1", [sys.executable, "-c", _SEND_400]), check=True)
        counted, _ = counting.communicate()
    assert 270 < int(counted) < 370, "320 expected; beyond 5 standard deviations on either side"


@needs_lab
def test_four_hosts_that_lose_packets_give_the_results_of_one(
    mpi: Mpi, tiny: Tiny, run_layout: Callable[..., Path], tmp_path: Path, sample: Callable[[bool], None]
) -> None:
    sample(mpi.name == "openmpi")
    launch = [mpi.bin_dir / "mpinfer", "launch", "-n", 4, "--hosts", ",".join(HOSTS), tiny.job, "--output", tmp_path]
    layout = ["--set", "parallel.replicas=2", "--set", "parallel.stages=2"]
    with Lab(HOSTS, loss_percent=1) as lab:
        run = mpirun(mpi, None, lab.command(HOSTS[0], [*launch, *layout]), env=lab.environ)
    assert run.returncode == 0, run.stderr
    assert "nodes 4" in run.stderr
    assert [rank["host"] for rank in read_timing(tmp_path)["ranks"]] == HOSTS
    assert json.loads((tmp_path / "manifest.json").read_text())["complete"] is True
    results = (tmp_path / "results.jsonl").read_bytes()
    assert results == (run_layout(mpi, 2, 2) / "results.jsonl").read_bytes()
