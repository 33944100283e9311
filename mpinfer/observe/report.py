"""The account of a run: `timing.json`, and the same as a table for people."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mpinfer.observe.account import PHASES
from mpinfer.plan.layout import Plan


@dataclass(frozen=True)
class Before:
    """What was known when the loop began, in seconds, of rank 0."""

    laps: Mapping[str, float]  # from the start of the process to the plan, by part
    load_s: float  # reading the weights and building channels, until the last rank was done
    planned_wall_s: float  # as predicted when the layout was chosen, of all records
    predicted_wall_s: float  # from steps timed on the loaded stages, of the records that are left

    @property
    def start_s(self) -> float:
        return sum(self.laps.values())


def timing(
    plan: Plan,
    records: int,
    wall_s: float,
    before: Before,
    accounts: list[dict[str, Any]],
    lost: Collection[int] = (),
    latency: dict[str, float] | None = None,
) -> dict[str, Any]:
    """What `timing.json` holds. Times in seconds; `wall_s` runs from the first record handed out
    to the last result, and rates exclude start-up and load.

    `bubble` is the share of all ranks' loop time spent waiting (for messages, for slots, for work); `overlap`
    the share of the time sends were in flight that no rank waited for them (null when nothing was sent);
    `imbalance` how far the busiest rank's compute lies above the mean, as a fraction of the mean; `latency_s` how long
    records took from when a replica got them to their result, waiting in the replica included (null without any).
    """
    for account in accounts:
        # A rank that finished before the last one had nothing left to do.
        account["idle_s"] += max(0.0, wall_s - sum(account[f"{phase}_s"] for phase in PHASES))
    prompt_tokens = sum(account["prompt_tokens"] for account in accounts)
    new_tokens = sum(account["new_tokens"] for account in accounts)
    compute = [account["compute_s"] for account in accounts]
    waits = sum(account[f"{phase}_s"] for account in accounts for phase in ("send_wait", "receive_wait", "idle"))
    in_flight_s = sum(account["in_flight_s"] for account in accounts)
    send_wait_s = sum(account["send_wait_s"] for account in accounts)
    mean = sum(compute) / len(compute)
    return {
        "wall_s": wall_s,
        "start_s": before.start_s,
        "start": {f"{part}_s": seconds for part, seconds in before.laps.items()},
        "load_s": before.load_s,
        "planned_wall_s": before.planned_wall_s,
        "predicted_wall_s": before.predicted_wall_s,
        "plan": plan.summary(),
        "records": records,
        "lost_ranks": sorted(lost),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "records_per_s": records / wall_s,
        "tokens_per_s": new_tokens / wall_s,
        "all_tokens_per_s": (prompt_tokens + new_tokens) / wall_s,
        "bubble": waits / (wall_s * len(accounts)),
        "overlap": max(0.0, 1 - send_wait_s / in_flight_s) if in_flight_s else None,
        "imbalance": max(compute) / mean - 1 if mean else 0.0,
        "latency_s": latency,
        "ranks": accounts,
    }


def timing_table(timing: dict[str, Any]) -> str:
    """One line a rank, then the whole."""
    lines = [
        f"{'rank':>4} {'host':<14} {'place':<12} {'compute':>8} {'send w':>7} {'recv w':>7} {'idle':>7} {'other':>7} "
        f"{'sent':>9} {'weights':>9} {'peak':>8}"
    ]
    for account in timing["ranks"]:
        place = "/".join(str(account["coordinates"][axis]) for axis in ("replica", "stage", "shard"))
        lines.append(
            f"{account['rank']:>4} {account['host'][:14]:<14} {place:<12} {account['compute_s']:>7.2f}s "
            f"{account['send_wait_s']:>6.2f}s {account['receive_wait_s']:>6.2f}s {account['idle_s']:>6.2f}s "
            f"{account['overhead_s']:>6.2f}s {account['bytes_sent'] / 1e6:>6.1f} MB "
            f"{account['weight_bytes'] / 1e6:>6.1f} MB {account['peak_memory_bytes'] / 1e6:>5.0f} MB"
        )
    fetched = [account["storage_bytes"] for account in timing["ranks"]]
    storage = "" if None in fetched else f", {sum(fetched) / 1e6:.0f} MB fetched from storage"
    overlap = "none sent" if timing["overlap"] is None else f"{timing['overlap']:.1%}"
    lines.append(
        f"{timing['records']} records in {timing['wall_s']:.2f} s: {timing['records_per_s']:.2f} records/s, "
        f"{timing['tokens_per_s']:.1f} new tokens/s, {timing['all_tokens_per_s']:.1f} tokens/s with prompts; "
        f"predicted {timing['predicted_wall_s']:.2f} s"
    )
    lines.append(
        f"bubble {timing['bubble']:.1%}, overlap {overlap}, imbalance {timing['imbalance']:.1%}; before that "
        f"{timing['start_s']:.2f} s of start-up and {timing['load_s']:.2f} s of loading "
        f"({sum(account['read_bytes'] for account in timing['ranks']) / 1e6:.0f} MB of weights read{storage})"
    )
    return "\n".join(lines)
