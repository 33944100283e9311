"""Memory that ranks of one node share: each writes its own slots, and all read all.

A rank that has written says so by a counter, which the others poll: no call of MPI moves anything. Counters are eight
aligned bytes, each on a cache line of its own. Between a slot and its counter stands `Win.Sync`, a barrier for the
compiler and for processors that reorder (MPI 4.1, 12.5.4): who sees a counter sees what was written before it.

Kernels take turns here, too (`sum_shards` in models/kernels.c), by the addresses and the state of these slots.
"""

import numpy as np
from mpi4py import MPI

_LINE_BYTES = 64
_TURNS = 2  # Who writes in a turn knows that nobody still reads of the last but one: all have said something since.

_TURN, _SAID, SUMMED = range(3)
"""Of the state: the turn, what this rank has said, and how many numbers kernels have summed."""


class SharedSlots:
    """Slots of float32 numbers, a pair for each rank, used in turns."""

    def __init__(self, comm: MPI.Intracomm, capacity: int) -> None:
        """Collective over `comm`, whose ranks are on one node. `capacity`: numbers of a slot."""
        self._window = MPI.Win.Allocate_shared(_LINE_BYTES + _TURNS * capacity * 4, comm=comm)
        self._window.Lock_all(MPI.MODE_NOCHECK)
        parts = [self._window.Shared_query(rank)[0].cast("B") for rank in range(comm.size)]
        counters = [part[:8].cast("q") for part in parts]
        self.counters = [np.frombuffer(counter, np.int64).ctypes.data for counter in counters]  # addresses, by rank
        self._own = counters.pop(comm.rank)
        self._others = counters
        numbers = [np.frombuffer(part[_LINE_BYTES:], np.float32).reshape(_TURNS, capacity) for part in parts]
        self._slots = [[of_rank[turn] for of_rank in numbers] for turn in range(_TURNS)]
        self.slots = [[slot.ctypes.data for slot in of_turn] for of_turn in self._slots]  # addresses
        self.state = np.zeros(3, np.int64)
        self._own[0] = 0
        self._window.Sync()
        comm.Barrier()

    def take_turn(self) -> list[np.ndarray]:
        """The slots of a new turn, by rank. All ranks take it together, and each says something in it."""
        self.state[_TURN] = (self.state[_TURN] + 1) % _TURNS
        return self._slots[self.state[_TURN]]

    def say(self) -> None:
        """Tell the others that what this rank has written is there."""
        self.state[_SAID] += 1
        self._window.Sync()
        self._own[0] = self.state[_SAID]

    def all_said(self) -> bool:
        """Whether all others have said as much as this rank: then what they have written before can be read."""
        said = self.state[_SAID]
        for counter in self._others:
            if counter[0] < said:
                return False
        self._window.Sync()
        return True

    def free(self) -> None:
        """Collective. Nobody uses a slot any more."""
        del self._own, self._others, self._slots
        self._window.Unlock_all()
        self._window.Free()
