"""`timeline.json`: where every rank's time went, and when. Its sums are those of `timing.json`."""

from collections.abc import Sequence
from typing import Any

from mpinfer.observe.account import PHASES
from mpinfer.observe.bins import Bins
from mpinfer.observe.recorder import MICRO

_IDLE = PHASES.index("idle")
_MOST_BINS = 512  # as many as any rank has


def timeline(ranks: Sequence[dict[str, Any]], traces: Sequence[dict[str, Any]], records: Bins) -> dict[str, Any]:
    """Of `ranks` as `timing.json` has them, and what each has recorded and its clock, in the same order.

    All in bins of one width. `microseconds`: of each phase, by rank; `records`: results that came to rank 0.
    """
    every = [Bins.from_dict(trace["bins"], _MOST_BINS, MICRO) for trace in traces]
    for rank, bins in zip(ranks, every, strict=True):
        # What `timing` has added at the end, for a rank that was through before the last one.
        ended_s, missing_s = sum(bins.sums()), rank["idle_s"] - bins.sums()[_IDLE]
        bins.add(_IDLE, ended_s, ended_s + max(0.0, missing_s))
    done = Bins.from_dict(records.to_dict(), _MOST_BINS)
    width_s = max(bins.width_s for bins in (*every, done))
    for bins in (*every, done):
        bins.widen(width_s)
    return {
        "bin_s": width_s,
        "phases": list(PHASES),
        "ranks": [
            {"rank": rank["rank"], "start_s": start_s, "microseconds": bins.to_dict(MICRO)["rows"]}
            for rank, start_s, bins in zip(ranks, starts_s(traces), every, strict=True)
        ],
        "records": done.to_dict()["rows"][0],
    }


def starts_s(traces: Sequence[dict[str, Any]]) -> list[float]:
    """When each rank's loop began, after the first one's, by rank 0's clock."""
    begun = [trace["origin_s"] + trace["clock"]["offset_s"] for trace in traces]
    return [start - min(begun) for start in begun]


def bubble(timeline: dict[str, Any], wall_s: float) -> float:
    """The share of time that ranks waited, by the bins."""
    waits = [n for n, phase in enumerate(timeline["phases"]) if phase in ("send_wait", "receive_wait", "idle")]
    waited = sum(sum(rank["microseconds"][row]) for rank in timeline["ranks"] for row in waits)
    return waited / MICRO / (wall_s * len(timeline["ranks"]))
