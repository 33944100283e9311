"""The control plane: small JSON messages between rank 0 and the replicas."""

from collections.abc import Callable, Set
from typing import Any, Protocol

COORDINATOR = 0
"""The rank that hands out records and gathers results."""

# Kinds of control messages.
WANT = "want"  # leader to coordinator: how many records it could take
RECORDS = "records"  # the answer: records, and whether there may be more; without any but with more, it will come later
DROP = "drop"  # coordinator to leader: indices of records that need not be computed any more
COMPUTED = "computed"  # to the coordinator, from a last stage: indices of records whose results will follow
RESULTS = "results"  # to the coordinator, from the first or the last stage of a replica
STOP = "stop"  # any rank to the coordinator: it was told to
FINISH = "finish"  # coordinator to leader: what has begun, and nothing else
ACCOUNT = "account"  # every rank to the coordinator, at its end
END = "end"  # the answer to all of them: the exit code


class Progressive(Protocol):
    """Something to be called at progress points."""

    def complete_finished(self) -> None: ...


class Control(Protocol):
    """Small messages of any size between any two ranks, as JSON, handled at progress points."""

    @property
    def size(self) -> int: ...

    @property
    def lost(self) -> Set[int]:
        """Ranks that have died."""

    def send(self, destination: int, kind: str, body: Any) -> None: ...

    def on(self, kind: str, handler: Callable[[int, Any], None]) -> None: ...

    def attach(self, channel: Progressive) -> None: ...

    def wait_until(self, done: Callable[[], bool]) -> None: ...
