"""What rank 0 knows of a replica: what it has in hand, how fast it is, when it should be done."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Replica:
    """A leader's records and its pace. Costs are in any unit, the same for all; times in seconds of one clock.

    `expected` is its speed relative to the others', before anything is known.
    """

    leader: int
    expected: float
    wanted: int = 0  # records that it has asked for and got no answer to
    done: int = 0  # records
    held: dict[int, float] = field(default_factory=dict)  # when each record was handed out, in that order
    held_cost: float = 0.0
    quickest_s: float = 0.0  # from hand-out to result, for each unit of cost: what any record takes at least
    _work: float = 0.0  # cost finished and the time it took; what is long ago counts less
    _work_s: float = 0.0
    _busy_s: float = 0.0  # all time with records in hand
    _counted: float = 0.0  # until when
    _on_time: float = 0.0  # when the work before what it holds should have been over

    def give(self, index: int, cost: float, now: float) -> None:
        if not self.held:
            self._counted = self._on_time = now
            self.held_cost = 0.0
        self.held[index] = now
        self.held_cost += cost

    def finish(self, index: int, cost: float, now: float) -> float:
        """It has computed a record that it held; returns the seconds since it got it."""
        held_s = now - self.held.pop(index)
        took_s = held_s / cost if cost else 0.0
        self.quickest_s = min(self.quickest_s or took_s, took_s)
        self.done += 1
        self.held_cost -= cost
        if (elapsed_s := now - self._counted) > 0:
            # A moment's weight is its place in the replica's life, so that the recent half has three quarters of the
            # say whatever the length of the run.
            faded = self._busy_s / (self._busy_s + elapsed_s)
            self._work *= faded
            self._work_s = self._work_s * faded + elapsed_s
            self._busy_s += elapsed_s
        self._work += cost
        self._counted = self._on_time = now
        return held_s

    def lose(self, index: int, cost: float, now: float, rate: float) -> None:
        """It need not compute a record that it held. `rate`: its own, in cost per second."""
        del self.held[index]
        self.held_cost -= cost
        self._on_time = max(self._on_time, min(now, self._on_time + cost / rate))  # who was late stays late

    @property
    def trust(self) -> float:
        """The say of its measured pace against the expected one, from 0 to 1.

        Each counts by its variance: what is in hand, half done on the average, is missing in the measured one, and the
        expected one may be off by as much as itself.
        """
        if not self._work_s or not self._work:
            return 0.0
        return 1 / (1 + (self.held_cost / (2 * self._work)) ** 2)

    @property
    def pace(self) -> float:
        """Cost finished per second in hand; 0 before anything is."""
        return self._work / self._work_s if self._work_s else 0.0

    def speed(self, scale: float) -> float:
        """Relative to the others'; `scale`: see `pace_of_speed`."""
        trust = self.trust if scale else 0.0
        return self.expected + trust * (self.pace / scale - self.expected) if trust else self.expected

    def left_s(self, now: float, rate: float) -> float:
        """Seconds until it has nothing in hand, at `rate` of cost per second. What is late is expected to take as long
        again as it is late: so does a replica that has stopped become the last of all."""
        return abs(self._on_time + self.held_cost / rate - now) if self.held else 0.0

    def is_late(self, now: float, rate: float) -> bool:
        return bool(self.held) and now > self._on_time + self.held_cost / rate


def pace_of_speed(replicas: Iterable[Replica]) -> float:
    """Cost per second of a replica of speed 1; 0 before anything is finished.

    It makes the measured speeds add up to the expected ones, so that a share needs no sum over replicas.
    """
    measured = expected = 0.0
    for replica in replicas:
        measured += replica.trust * replica.pace
        expected += replica.trust * replica.expected
    return measured / expected if expected else 0.0
