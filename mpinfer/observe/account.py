"""Where a rank's time goes. Every second of the loop belongs to exactly one phase."""

import time
from types import TracebackType
from typing import Literal, get_args

from mpinfer.observe.recorder import Recorder

Phase = Literal["compute", "send_wait", "receive_wait", "idle", "overhead"]
PHASES: tuple[Phase, ...] = get_args(Phase)
_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}


class Account:
    """Seconds per phase. Outside any `phase` block, time is overhead; nested blocks count for the inner phase.

    `recorder` is told of each phase that is over.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder or Recorder()
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._current: Phase = "overhead"
        self._since = time.perf_counter()

    def phase(self, name: Phase) -> "_Span":
        return _Span(self, name)

    def switch(self, name: Phase) -> Phase:
        """Start counting for `name`; returns the phase that was counting."""
        now = time.perf_counter()
        previous = self._current
        self.seconds[previous] += now - self._since
        self.recorder.add(_NUMBERS[previous], self._since, now)
        self._current, self._since = name, now
        return previous

    def restart(self) -> None:
        """Forget what was counted: the loop begins now."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()
        self.recorder.restart(self._since)

    def close(self) -> dict[Phase, float]:
        self.switch("overhead")
        return self.seconds


class _Span:
    __slots__ = ("_account", "_name", "_previous")

    def __init__(self, account: Account, name: Phase) -> None:
        self._account, self._name = account, name

    def __enter__(self) -> None:
        self._previous = self._account.switch(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._account.switch(self._previous)
