"""This rank's end of the world: control messages, progress and waiting, over MPI.

MPI moves data only when somebody calls it, so every wait here polls, and `Endpoint.progress` is called
between layers. Waiting ranks back off to short sleeps: a rank that waits must not burn the core that
another rank computes on.

Imports neither torch nor numpy: a run binds its threads and refuses bad input before they load.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

from mpi4py import MPI

from mpinfer.errors import ExitCode, MpinferError, TransportError
from mpinfer.transport.control import ACCOUNT
from mpinfer.transport.lost import acknowledge, is_loss
from mpinfer.transport.pulse import Activity, Pulse

_CONTROL_TAG = 1
# Poll without sleeping for so long, and sleep no longer: with a core for every rank, and where ranks share cores.
# Shards that compute the same wait for each other less than the first; a message on its way arrives within the second.
_SPIN_S, _SPIN_SHARING_S = 1e-3, 50e-6
_LONGEST_SLEEP_S, _LONGEST_SLEEP_SHARING_S = 0.25e-3, 1e-3
# Of what has been waited already: a wait costs little and overshoots little, however long it is.
_SLEEP_SHARE, _SLEEP_SHARE_SHARING = 1 / 64, 1 / 16
_SPINS = 100  # without looking at anything else
_POLLS = 16  # of what is waited for, in about the time of one look at everything else
_COLLECTIVE_SLEEP_S = 10e-3  # start and end of a run, where ranks wait for seconds
_FORWARD_S = 0.1  # for the launcher to pass on what a rank said last: an abort may overtake it
_ABORT_S = 2.0  # for an abort to return, or what is flushed before it; then this process ends alone

T = TypeVar("T")
Handler = Callable[[int, Any], None]


class Progressive(Protocol):
    """Something with sends of its own to complete at progress points."""

    def complete_finished(self) -> None: ...


class Endpoint:
    """This rank's end of the world. Create one, on the main thread, before anything else talks MPI."""

    def __init__(self) -> None:
        world = MPI.COMM_WORLD
        self.rank, self.size = world.rank, world.size
        # Communicators of our own: no message of the user's program or of another layer can match ours.
        self._collective = world.Dup()
        self._control = world.Dup()
        self.data = world.Dup()  # for channels
        self.activity = Activity()
        self.pulse = Pulse(self.activity)
        self._sends: deque[tuple[MPI.Request, bytes]] = deque()
        self._receives: deque[tuple[MPI.Request, bytearray, int]] = deque()  # handled in order of arrival
        self._channels: list[Progressive] = []
        self._handlers: dict[str, Handler] = {}
        self.lost: set[int] = set()  # ranks that have died, where MPI tolerates that
        self.when_lost: Callable[[set[int]], None] = _end_without
        # Told the exit code before this rank ends the world; must not wait.
        self.last_words: Callable[[int], None] = lambda code: None
        self.serving: Callable[[], AbstractContextManager[Any]] = nullcontext  # accounts for the time of handlers
        self.control_bytes_sent = 0
        self.control_bytes_received = 0
        self.neighbours = frozenset(range(self.size))  # ranks of this node; to be set once they are known
        self.shares_cores = True  # whether ranks outnumber cores; to be set once that is known
        self.epoch: int = self.broadcast(int.from_bytes(os.urandom(4)) >> 1)  # tells this run's messages from others

    # -- progress ------------------------------------------------------------------------------------------------

    def progress(self) -> None:
        """Let MPI move data, complete what is done, and answer control messages. Called between layers."""
        if not self.activity.waiting:
            self.activity.move()
        self._complete_sends()
        for channel in self._channels:
            channel.complete_finished()
        self._serve()

    def spin(self, done: Callable[[], bool]) -> bool:
        """Whether `done` holds now or, on a core of this rank's own, within some microseconds. For what comes as soon
        as a message can, or when shards have computed the same: that is over before a wait could be accounted for."""
        if done():
            return True
        return not self.shares_cores and any(done() for _ in range(_SPINS))

    def wait_until(self, done: Callable[[], bool], operation: object = "a control message") -> None:
        """Poll `done`, making progress: first giving way to whoever wants the core, then with growing sleeps.

        `operation` is what the watchdog says that this rank waits for.
        """
        outer = self.activity.wait_for(operation)
        spin_s = _SPIN_SHARING_S if self.shares_cores else _SPIN_S
        longest_s = _LONGEST_SLEEP_SHARING_S if self.shares_cores else _LONGEST_SLEEP_S
        share = _SLEEP_SHARE_SHARING if self.shares_cores else _SLEEP_SHARE
        polls = 1 if self.shares_cores else _POLLS
        started = time.perf_counter()
        while True:
            for _ in range(polls):
                if done():
                    self.activity.resume(outer)
                    return
            self.progress()
            waited_s = time.perf_counter() - started
            if waited_s < spin_s:
                os.sched_yield()
            else:
                time.sleep(min(share * waited_s, longest_s))

    @contextmanager
    def blocking(self, operation: object) -> Iterator[None]:
        """What happens inside waits for other ranks in calls of MPI, where none is heard or served."""
        outer = self.activity.wait_for(operation)
        yield
        self.activity.resume(outer)

    # -- control messages ----------------------------------------------------------------------------------------

    def send(self, destination: int, kind: str, body: Any) -> None:
        """Start sending a JSON message; the buffer lives until the send is complete."""
        if destination in self.lost:
            return
        buffer = json.dumps([kind, body]).encode()
        request = self._control.Isend([buffer, MPI.BYTE], dest=destination, tag=_CONTROL_TAG)
        self._sends.append((request, buffer))
        self.control_bytes_sent += len(buffer)

    def on(self, kind: str, handler: Handler) -> None:
        """Have control messages of a kind handled by `handler(source, body)`, at progress points."""
        self._handlers[kind] = handler

    def _complete_sends(self) -> None:
        while self._sends:
            try:
                if not self._sends[0][0].Test():
                    return
            except MPI.Exception as error:
                if not is_loss(error):
                    raise
                self.find_lost()
            self._sends.popleft()

    def find_lost(self) -> set[int]:
        """All ranks that have died; tells `when_lost` of those that were not known."""
        new = acknowledge(self._control) - self.lost
        if new:
            self.lost |= new
            self.pulse.forget(new)
            self.when_lost(new)
        return self.lost

    def _arrived(self, status: MPI.Status) -> MPI.Message | None:
        """The next control message. No rank dies unnoticed, since it could have sent one."""
        try:
            return self._control.Improbe(MPI.ANY_SOURCE, _CONTROL_TAG, status)
        except MPI.Exception as error:
            if not is_loss(error):
                raise
            self.find_lost()
            return None

    def _serve(self) -> None:
        status = MPI.Status()
        while (message := self._arrived(status)) is not None:
            buffer = bytearray(status.Get_count(MPI.BYTE))
            self._receives.append((message.Irecv([buffer, MPI.BYTE]), buffer, status.Get_source()))
        while self._receives and self._receives[0][0].Test():
            _, buffer, source = self._receives.popleft()
            self.activity.move()
            with self.serving():
                kind, body = json.loads(buffer)
                if kind != ACCOUNT:  # which no rank counts as sent: its account is closed by then
                    self.control_bytes_received += len(buffer)
                self._handlers[kind](source, body)

    def flush(self) -> None:
        """Wait until every control message that was sent is complete."""
        self.wait_until(lambda: not self._sends)

    # -- collectives: only before the loop and after it ----------------------------------------------------------

    def broadcast(self, body: Any, root: int = 0) -> Any:
        """Rank `root`'s JSON-able body on every rank."""
        buffer = bytearray(json.dumps(body).encode() if self.rank == root else b"")
        length = bytearray(len(buffer).to_bytes(8, "little"))
        self._finish(self._collective.Ibcast([length, MPI.BYTE], root=root))
        if self.rank != root:
            buffer = bytearray(int.from_bytes(length, "little"))
        self._finish(self._collective.Ibcast([buffer, MPI.BYTE], root=root))
        return json.loads(buffer)

    def all_gather(self, body: Any) -> list[Any]:
        """Every rank's JSON-able body, by rank, on every rank."""
        data = json.dumps(body).encode()
        gathered = bytearray(8 * self.size)
        self._finish(self._collective.Iallgather([len(data).to_bytes(8, "little"), MPI.BYTE], [gathered, MPI.BYTE]))
        lengths = [int.from_bytes(gathered[i : i + 8], "little") for i in range(0, len(gathered), 8)]
        ends = list(accumulate(lengths))
        bodies = bytearray(ends[-1])
        self._finish(self._collective.Iallgatherv([data, MPI.BYTE], [bodies, lengths, None, MPI.BYTE]))
        return [json.loads(bodies[end - n : end]) for end, n in zip(ends, lengths, strict=True)]

    def _finish(self, request: MPI.Request) -> None:
        outer = self.activity.wait_for("all other ranks")
        started = time.perf_counter()
        while not request.Test():
            self.find_lost()
            time.sleep(min(_SLEEP_SHARE_SHARING * (time.perf_counter() - started), _COLLECTIVE_SLEEP_S))
        self.activity.resume(outer)

    # -- the data plane and the end ------------------------------------------------------------------------------

    def attach(self, channel: Progressive) -> None:
        """Have a channel's sends completed at progress points."""
        self._channels.append(channel)

    def detach(self, channel: Progressive) -> None:
        """Leave its sends as they are."""
        self._channels.remove(channel)

    def leave(self, code: int) -> NoReturn:
        """End this process in a world that has lost ranks: MPI's own end may wait for them."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))

    def abort(self, code: int) -> NoReturn:
        """End the whole world at once, and this process even where nobody hears of it."""
        alone = threading.Timer(_ABORT_S, os._exit, [int(code)])
        alone.daemon = True
        alone.start()
        self.last_words(int(code))
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_FORWARD_S)
        MPI.COMM_WORLD.Abort(int(code))
        os._exit(int(code))  # an Abort may return


def _end_without(lost: set[int]) -> None:
    raise TransportError(f"rank {', '.join(map(str, sorted(lost)))} has died, and all are needed before the loop")


def agree(endpoint: Endpoint, decide: Callable[[], T]) -> T:
    """What rank 0's `decide` returns (JSON-able), on every rank; what it raises of `MpinferError`, on every rank.

    Raises `Agreed`: every rank does, so every rank can leave in order.
    """
    outcome: dict[str, Any] = {}
    if endpoint.rank == 0:
        try:
            outcome = {"value": decide()}
        except MpinferError as error:
            outcome = {"error": str(error), "code": error.exit_code}
    outcome = endpoint.broadcast(outcome)
    if "error" in outcome:
        raise Agreed(outcome["error"], ExitCode(outcome["code"]), endpoint.rank)
    return outcome["value"]


def everywhere(endpoint: Endpoint, work: Callable[[], T]) -> T:
    """Run `work` on every rank; when any of them raises `MpinferError`, all raise the first one's as `Agreed`."""
    error: MpinferError | None = None
    try:
        value = work()
    except MpinferError as raised:
        error = raised
    for outcome in endpoint.all_gather([str(error), int(error.exit_code)] if error else None):
        if outcome is not None:
            raise Agreed(outcome[0], ExitCode(outcome[1]), endpoint.rank)
    return value


class Agreed(Exception):
    """An error that every rank raises at the same point of the program."""

    def __init__(self, message: str, exit_code: ExitCode, rank: int) -> None:
        super().__init__(message)
        self.exit_code, self.rank = exit_code, rank


def install_abort_hook(endpoint: Endpoint, where: Callable[[], str]) -> None:
    """From now on an uncaught exception on one rank says where it happened and ends the world.

    Without this the other ranks would wait for ever.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.stderr.write(f"mpinfer: interrupted on {where()}; --resume continues the run\n")
            endpoint.abort(ExitCode.INTERRUPTED)
        if isinstance(error, MpinferError):
            sys.stderr.write(f"mpinfer: fatal on {where()}: {error}; --resume continues the run\n")
        else:
            text = "".join(traceback.format_exception(kind, error, trace))
            sys.stderr.write(f"mpinfer: fatal on {where()}; --resume continues the run\n{text}")
        endpoint.abort(ExitCode.FAULT)

    sys.excepthook = hook


def library_version() -> str:
    """The MPI library in use, on one line."""
    return MPI.Get_library_version().split(",")[0].split("\n")[0].replace("\t", " ").strip(" \0")
