"""`status.json`: how a run stands, for whoever looks at the output directory meanwhile (`mpinfer top`).

A thread of rank 0 writes it every two seconds, or less often while nothing happens; it calls no MPI, and reads what the
main thread keeps anyway. No run fails for want of it.
"""

import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from mpinfer.coordinator.progress import Progress
from mpinfer.errors import ExitCode
from mpinfer.observe.account import PHASES, Account
from mpinfer.observe.vitals import vitals
from mpinfer.plan.layout import Plan
from mpinfer.records.files import STATUS, write_atomically
from mpinfer.transport.endpoint import Endpoint

State = Literal["starting", "running", "stopping", "complete", "interrupted", "fault"]

EVERY_S, QUIET_S = 2.0, 10.0  # between two writes: while something happens, and at most
_RECENT_S = 30.0  # that `recent_records_per_s` looks back
_ENDS: dict[int, State] = {
    ExitCode.COMPLETE: "complete",
    ExitCode.RECORDS_FAILED: "complete",
    ExitCode.INTERRUPTED: "interrupted",
}


class StatusFile:
    """From its creation until `close`. `total`, `done`, `failed`: records, before anything is computed."""

    def __init__(self, directory: Path, total: int, done: int, failed: int) -> None:
        self._path = directory / STATUS
        self._counts = {"total": total, "done": done, "failed": failed}
        self._progress: Progress | None = None
        self._ranks: Callable[[], list[dict[str, Any]]] = list
        self._recent: deque[tuple[float, int]] = deque()
        self._written: tuple[float, Any] = 0.0, None
        self._started = time.time()
        self._turn = threading.Lock()
        self._over, self._wake = threading.Event(), threading.Event()
        self._code: int | None = None
        self.state: State = "starting"
        self.write()
        threading.Thread(target=self._keep_up, name="status", daemon=True).start()

    def run(self, progress: Progress, ranks: Callable[[], list[dict[str, Any]]]) -> None:
        """The loop has begun; `ranks` tells what is known of each of them."""
        self._ranks, self._progress, self.state = ranks, progress, "running"

    def close(self, code: int) -> None:
        """The run has ended, or is about to, with an exit code."""
        self._over.set()
        self._wake.set()
        with self._turn:
            self.state = _ENDS.get(code, "fault")
            self._write()

    def end(self, code: int) -> None:
        """Like `close`, for who cannot wait: the disk may hang, and so may whoever holds Python's lock."""
        self._code = code
        self._wake.set()

    def write(self) -> None:
        """Unless the last word is written."""
        with self._turn:
            if not self._over.is_set():
                self._write()

    def _keep_up(self) -> None:
        while not self._over.is_set():
            self._wake.wait(EVERY_S)
            if self._code is not None:
                self.close(self._code)
                return
            progress = self._progress
            now, news = time.monotonic(), (self.state, progress and progress.done)
            if news != self._written[1] or now - self._written[0] >= QUIET_S:
                self._written = now, news
                self.write()

    def _write(self) -> None:
        with suppress(Exception):  # who writes results will say what is wrong with the disk
            text = json.dumps(self.facts(), indent=1)
            write_atomically(self._path, text.encode() + b"\n", durable=False)

    def facts(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "updated_unix_s": round(time.time(), 3),
            "started_unix_s": round(self._started, 3),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "records": self._counts,
            **(self._pace(self._progress) if self._progress else {}),
            "ranks": self._ranks(),
        }

    def _pace(self, progress: Progress) -> dict[str, Any]:
        now, done = time.perf_counter(), progress.done
        self._recent.append((now, done))
        while len(self._recent) > 2 and now - self._recent[1][0] >= _RECENT_S:
            self._recent.popleft()
        wall_s = now - progress.started_s
        mean = (done - progress.at_start) / wall_s
        (since, before), left = self._recent[0], progress.total - done
        recent = (done - before) / (now - since) if now > since else mean
        pace = recent or mean
        return {
            "records": {"total": progress.total, "done": done, "failed": progress.failed},
            "wall_s": round(wall_s, 3),
            "records_per_s": round(mean, 4),
            "recent_records_per_s": round(recent, 4),
            "new_tokens_per_s": round(progress.new_tokens / wall_s, 2),
            "left_s": round(left / pace, 1) if pace else None,
        }


class RankStates:
    """What rank 0 knows of every rank: of itself, and of the others by their last sign of life. `done`: records that
    replicas have computed, by leader."""

    def __init__(self, endpoint: Endpoint, plan: Plan, account: Account, done: Callable[[], dict[int, int]]) -> None:
        self._endpoint, self._plan, self._account, self._done = endpoint, plan, account, done

    def __call__(self) -> list[dict[str, Any]]:
        now, done, signs = time.monotonic(), self._done(), dict(self._endpoint.pulse.signs)
        own, activity = self._endpoint.rank, self._endpoint.activity
        heard = {rank: (sign.heard_s, sign.moved_s, sign.doing, sign.vitals) for rank, sign in signs.items()}
        heard[own] = now, activity.moved_s, str(activity), vitals(self._account)
        return [self._state(rank, now, done, *heard[rank]) for rank in sorted(heard)]

    def _state(
        self, rank: int, now: float, done: dict[int, int], heard_s: float, moved_s: float | None, doing: str, told: Any
    ) -> dict[str, Any]:
        place, replica = self._plan.coordinates(rank), self._plan.replica_of(rank)
        host, memory_bytes, seconds = told or (None, None, None)
        return {
            "rank": rank,
            "host": host,
            "coordinates": asdict(place),
            "doing": doing,
            "heard_s_ago": round(now - heard_s, 1),
            "moved_s_ago": None if moved_s is None else round(now - moved_s, 1),
            "records_done": done.get(replica.leader, 0),  # of its replica
            "memory_bytes": memory_bytes,
            "seconds": seconds and dict(zip(PHASES, seconds, strict=True)),
        }
