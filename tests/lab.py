"""Several hosts on one machine: network namespaces with a host name, addresses, shared memory and cores of their own.

    python tests/lab.py --hosts h1 h2 --rate-mbit 1000 --delay-ms 0.5 --loss-percent 1 -- mpirun -n 2 --host h1,h2 RANK

brings the hosts up, runs the command on the first one, and takes all down. mpirun and mpiexec, and with them
`mpinfer launch --hosts h1,h2`, start ranks on the others by a script that stands in for ssh. Needs root, iproute2,
nftables and util-linux. The switch between the hosts has a network namespace of its own: nothing leaves.

Here and not in `slurm/`: only tests and benchmarks use it, and it knows nothing of Slurm.
"""

import argparse
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from fcntl import ioctl
from pathlib import Path
from typing import Any

_PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables", "unshare": "util-linux", "taskset": "util-linux"}
_TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_LONGEST_FRAME = 65536
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")

# A fresh /sys shows the interfaces of this host, as UCX reads them; control groups stay.
_HOST = """
set -e
hostname "$0"
echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
mount --bind "$1/hosts" /etc/hosts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --rbind /sys/fs/cgroup "$1/cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$1/cgroup" /sys/fs/cgroup
echo up
exec sleep infinity
"""

_BRIDGE = """
set -e
ip link add bridge type bridge
ip link set bridge up
for pid; do
    ip link add "port$pid" type veth peer name eth0 netns "$pid"
    ip link set "port$pid" master bridge up
done
echo up
exec sleep infinity
"""

_SSH = """#!/bin/sh
# Stands in for ssh. Unlike sshd it passes the environment on.
while :; do
    case $1 in
    -[bcEeFIiJLlmOopQRSWw]) shift 2 ;;
    -*) shift ;;
    *) break ;;
    esac
done
host=$1
shift
exec {on} "$host" sh -c "$*" </dev/null
"""


def missing(delay: bool = False) -> str | None:
    """Why there can be no lab here, or None; with `delay`, none whose links have one."""
    if os.geteuid() != 0:
        return "hosts in network namespaces need root"
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            return f"no {program} in PATH: install {package}"
    if delay and not _TUN.exists():
        return f"no {_TUN}: links with a delay need TAP devices"
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True, check=False)
    return f"namespaces are refused: {tried.stderr.strip()}" if tried.returncode else None


class Lab:
    """Hosts that are up until `close`, which leaves no process, interface, mount or file behind.

    Each host has 10.77.0.N on eth0, knows the others by name, and has its share of this machine's cores; of more hosts
    than cores several share one. What a host sends is limited to `rate_mbit` (None: by nothing), and arrives
    `delay_ms` later; of what it receives `loss_percent` is lost. A delay is made by a process that copies every frame,
    since not every kernel has netem: it takes a part of a core, and tops out below 2 Gbit/s on two cores.

    Raises `RuntimeError` where this cannot be.
    """

    def __init__(
        self, names: Sequence[str], rate_mbit: float | None = None, delay_ms: float = 0, loss_percent: float = 0
    ) -> None:
        if problem := missing(delay=delay_ms > 0):
            raise RuntimeError(problem)
        self._directory = Path(tempfile.mkdtemp(prefix="lab-"))
        self._processes: list[subprocess.Popen[str]] = []
        self._namespaces: set[str] = set()
        self._pids: dict[str, int] = {}  # of the process that holds each host's namespaces
        try:
            self._bring_up(names, delay_ms)
            self._shape(names, rate_mbit, loss_percent)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def environ(self) -> dict[str, str]:
        """What makes MPI start ranks on the hosts and use the network between them.

        UCX would share memory with what it takes for the same machine.
        """
        ssh = str(self._directory / "ssh")
        return {
            "PRTE_MCA_plm_ssh_agent": ssh,
            "OMPI_MCA_pml": "ob1",
            "OMPI_MCA_btl": "self,sm,tcp",
            "OMPI_MCA_btl_tcp_if_include": "eth0",
            "HYDRA_LAUNCHER": "ssh",
            "HYDRA_LAUNCHER_EXEC": ssh,
            "UCX_TLS": "tcp,self",
            "UCX_NET_DEVICES": "eth0",
        }

    def command(self, host: str, args: Sequence[Any]) -> list[str]:
        """The command line that runs another one on a host, in the caller's directory and environment."""
        return [str(self._directory / "on"), host, *map(str, args)]

    def cut(self, host: str) -> None:
        """Take its link down; what runs on it goes on."""
        self._do(host, "ip link set eth0 down")

    def power_off(self, host: str) -> None:
        """Nobody is told: the link goes first."""
        self.cut(host)
        pid = self._pids[host]
        self._empty({os.readlink(f"/proc/{pid}/ns/net")}, keep=pid)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self._empty(self._namespaces)
        for process in self._processes:
            process.communicate()
        shutil.rmtree(self._directory)

    def _bring_up(self, names: Sequence[str], delay_ms: float) -> None:
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, start=1)}
        lines = [f"{address} {name}" for name, address in addresses.items()]
        (self._directory / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        (self._directory / "cgroup").mkdir()
        unshare = ["unshare", "--net", "--uts", "--ipc", "--mount", "--propagation", "private"]
        pids = [self._start([*unshare, "sh", "-c", _HOST, name, str(self._directory)]) for name in names]
        self._pids = dict(zip(names, pids, strict=True))
        self._write_scripts(names, pids)
        ports = [str(pid) for pid in pids]
        if delay_ms:
            self._start(["unshare", "--net", sys.executable, __file__, "--switch", str(delay_ms), *ports])
        else:
            self._start(["unshare", "--net", "sh", "-c", _BRIDGE, "bridge", *ports])
        for name, address in addresses.items():
            self._do(name, f"ip link set lo up && ip addr add {address}/24 dev eth0 && ip link set eth0 up")

    def _shape(self, names: Sequence[str], rate_mbit: float | None, loss_percent: float) -> None:
        for name in names:
            if rate_mbit is not None:  # bursts below 64 kB, one segment as veth passes it, distort
                self._do(name, f"tc qdisc add dev eth0 root tbf rate {rate_mbit}mbit burst 256kb latency 50ms")
            if loss_percent:
                lost = f"numgen random mod 10000 < {round(100 * loss_percent)} drop"
                self._do(
                    name, "nft add table ip lab && nft 'add chain ip lab in { type filter hook input priority 0; }'"
                )
                self._do(name, f"nft 'add rule ip lab in iifname eth0 {lost}'")

    def _start(self, command: Sequence[str]) -> int:
        """Start what lives in namespaces of its own; returns its process id once it says that it is up."""
        process = subprocess.Popen(
            [*_DIES_WITH_US, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        self._processes.append(process)
        assert process.stdout is not None
        if process.stdout.readline() != "up\n":
            raise RuntimeError(f"{command[:4]} did not come up; what it said is above")
        self._namespaces.add(os.readlink(f"/proc/{process.pid}/ns/net"))
        return process.pid

    def _write_scripts(self, names: Sequence[str], pids: Sequence[int]) -> None:
        cores = sorted(os.sched_getaffinity(0))
        cases = []
        for number, (name, pid) in enumerate(zip(names, pids, strict=True)):
            own = cores[number :: len(names)] or [cores[number % len(cores)]]
            cases.append(f"{name}) pid={pid} cores={','.join(map(str, own))} ;;")
        refusal = '*) echo "$0: $1: no such host" >&2; exit 255 ;;'
        enter = 'exec nsenter --target $pid --net --uts --ipc --mount --wd="$PWD" taskset -c $cores "$@"'
        on = self._directory / "on"
        on.write_text("\n".join(["#!/bin/sh", "case $1 in", *cases, refusal, "esac", "shift", enter, ""]))
        ssh = self._directory / "ssh"
        ssh.write_text(_SSH.format(on=on))
        for script in (on, ssh):
            script.chmod(0o755)

    def _do(self, host: str, script: str) -> None:
        done = subprocess.run(self.command(host, ["sh", "-c", script]), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{host}: {script}: {done.stderr.strip()}")

    def _empty(self, namespaces: set[str], keep: int | None = None) -> None:
        """Kill all that runs in network namespaces, but for one process."""
        while pids := set(self._inhabitants(namespaces)) - {keep}:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)

    def _inhabitants(self, namespaces: set[str]) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/ns/net"):
            try:
                if os.readlink(path) in namespaces:
                    found.append(int(path.parts[2]))
            except OSError:  # ended meanwhile
                continue
        return found


def switch(delay_s: float, pids: Sequence[str]) -> None:
    """An Ethernet switch whose every frame arrives `delay_s` after it was sent. Never returns.

    Makes a TAP device for each of the processes, which becomes eth0 in its network namespace.
    """
    ports = [_port(pid) for pid in pids]
    at_port: dict[bytes, int] = {}  # hardware addresses
    under_way: deque[tuple[float, int, bytes]] = deque()  # when due, where; one delay for all: in order
    print("up", flush=True)
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for port in select.select(ports, [], [], wait_s)[0]:
            frame = os.read(port, _LONGEST_FRAME)
            due = time.monotonic() + delay_s
            at_port[frame[6:12]] = port
            known = at_port.get(frame[:6])
            others = [other for other in ports if other != port]
            under_way.extend((due, other, frame) for other in (others if known is None else [known]))
        while under_way and under_way[0][0] <= time.monotonic():
            _, port, frame = under_way.popleft()
            os.write(port, frame)


def _port(pid: str) -> int:
    """A TAP device in the network namespace of a process; the file stays here."""
    port = os.open(_TUN, os.O_RDWR)
    name = f"port{pid}"
    ioctl(port, _TUNSETIFF, name.encode().ljust(16, b"\0") + (_IFF_TAP | _IFF_NO_PI).to_bytes(24, "little"))
    subprocess.run(["ip", "link", "set", name, "mtu", "9000", "txqueuelen", "2000"], check=True)
    subprocess.run(["ip", "link", "set", name, "netns", pid, "name", "eth0"], check=True)
    return port


def exit_on_sigterm() -> None:
    """Have `timeout` and the like end this process in order, so that nothing is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main() -> int:
    if sys.argv[1:2] == ["--switch"]:
        switch(float(sys.argv[2]) / 1e3, sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", default=["h1", "h2"], metavar="NAME", help="(h1 h2)")
    parser.add_argument("--rate-mbit", type=float, help="of what a host sends (default: no limit)")
    parser.add_argument("--delay-ms", type=float, default=0, help="of every frame, one way (%(default)s)")
    parser.add_argument("--loss-percent", type=float, default=0, help="of what a host receives (%(default)s)")
    parser.add_argument("command", nargs="+", help="runs on the first host")
    options = parser.parse_args()
    exit_on_sigterm()
    try:
        lab = Lab(options.hosts, options.rate_mbit, options.delay_ms, options.loss_percent)
    except RuntimeError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    with lab:
        environ = {**os.environ, **lab.environ}
        return subprocess.run(lab.command(options.hosts[0], options.command), env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
