"""A Slurm cluster on one machine, whose controller and nodes are hosts of `lab.py`.

    python tests/slurm_lab.py --nodes 4 -- srun -N 4 -n 4 --mpi=pmix .venv/bin/mpinfer doctor

brings it up in a second or two, runs the command on the controller's host, and takes all down. Needs what `lab.py`
needs, slurm-wlm and munge, and libpmix-dev for `--mpi=pmix` (the plugin opens libpmix.so without a version).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lab

_CONTROLLER = "ctl"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
_PMIX = "/usr/lib/*/pmix2/lib/libpmix.so"
_UP_WITHIN_S = 20

# Slurm's plugin for pmi2 now and then misreads the long addresses that MPICH's ranks exchange at the start where UCX
# carries their messages ("value not properly terminated in client request"); libfabric's are short.
_SHORT_ADDRESSES = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}

_CONFIGURATION = """
ClusterName=lab
SlurmctldHost=ctl
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=10
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
TmpFS={directory}/%n
SlurmctldPidFile={directory}/ctl.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/ctl.log
SlurmdLogFile={directory}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
MpiDefault=none
ReturnToService=1
SlurmdTimeout=10
KillWait=5
OverTimeLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[1-{nodes}] CPUs=32 Gres=gpu:4 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def missing() -> str | None:
    """Why there can be no Slurm cluster here, or None."""
    if problem := lab.missing():
        return problem
    absent = [program for program in _PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no {', '.join(absent)} in PATH: install slurm-wlm and munge"
    return None if list(Path("/").glob(_PMIX[1:])) else f"no {_PMIX}: install libpmix-dev"


class SlurmLab:
    """Nodes node1, node2, ... of one Slurm cluster, up until `close`, which leaves nothing.

    Raises `RuntimeError` where this cannot be, with the end of the logs.
    """

    def __init__(self, nodes: int) -> None:
        if problem := missing():
            raise RuntimeError(problem)
        names = [f"node{number}" for number in range(1, nodes + 1)]
        self._lab = lab.Lab([_CONTROLLER, *names])
        self._directory = Path(tempfile.mkdtemp(prefix="slurm-lab-"))
        try:
            self._start_munge()
            (self._directory / "state").mkdir()
            self._configuration.write_text(_CONFIGURATION.format(directory=self._directory, nodes=nodes))
            self._make_gpus(4)
            self._do(_CONTROLLER, "slurmctld", "-c")
            for name in names:
                (self._directory / name).mkdir()
                self._do(name, "slurmd", "-N", name)
            self._wait_for(nodes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "SlurmLab":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def environ(self) -> dict[str, str]:
        """For Slurm's commands, and for MPI between the nodes."""
        return {**self._lab.environ, **_SHORT_ADDRESSES, "SLURM_CONF": str(self._configuration)}

    def command(self, args: Sequence[Any]) -> list[str]:
        """The command line that runs another one on the controller's host."""
        return self._lab.command(_CONTROLLER, args)

    def tasks(self, job: str) -> list[dict[str, str]]:
        """What Slurm knows of a job, or of each task of an array."""
        lines = self.do("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]

    def power_off(self, node: str) -> None:
        self._lab.power_off(node)

    def do(self, *args: str) -> str:
        """What a command on the controller's host prints."""
        return self._do(_CONTROLLER, *args)

    def close(self) -> None:
        self._lab.close()
        shutil.rmtree(self._directory)

    @property
    def _configuration(self) -> Path:
        return self._directory / "slurm.conf"

    def _start_munge(self) -> None:
        directory = self._directory / "munge"
        directory.mkdir(mode=0o755)
        self._directory.chmod(0o755)  # its socket must be within reach
        key = directory / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = [f"--{option}-file={directory / option}" for option in ("key", "pid", "log", "seed")]
        self._do(_CONTROLLER, "munged", "--force", f"--socket={directory / 'socket'}", *files)

    def _make_gpus(self, count: int) -> None:
        """For Slurm to count, and to hand out in name."""
        for number in range(count):
            (self._directory / f"gpu{number}").touch()
        (self._directory / "gres.conf").write_text(f"Name=gpu File={self._directory}/gpu[0-{count - 1}]\n")

    def _wait_for(self, nodes: int) -> None:
        deadline = time.monotonic() + _UP_WITHIN_S
        while len(self.do("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) < nodes:
            if time.monotonic() > deadline:
                logs = "\n".join(log.read_text()[-500:] for log in sorted(self._directory.glob("*.log")))
                raise RuntimeError(f"{nodes} nodes were not idle within {_UP_WITHIN_S} s\n{logs}")
            time.sleep(0.1)

    def _do(self, host: str, *args: str) -> str:
        """What a command prints. Daemons go to the background by themselves."""
        command, environ = self._lab.command(host, args), {**os.environ, **self.environ}
        done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{host}: {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4, help="(%(default)s)")
    parser.add_argument("command", nargs="+", help="runs on the controller's host")
    options = parser.parse_args()
    lab.exit_on_sigterm()
    try:
        slurm = SlurmLab(options.nodes)
    except RuntimeError as error:
        print(f"slurm_lab: {error}", file=sys.stderr)
        return 2
    with slurm:
        return subprocess.run(
            slurm.command(options.command), env={**os.environ, **slurm.environ}, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
