"""`mpinfer top`: a running job in a terminal, from nothing but the `status.json` that its rank 0 writes."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from mpinfer.errors import ExitCode, SpecError

ENDS = ("complete", "interrupted", "fault")
STALE_S = 30.0  # it is written every 10 s at least
SLOW_S = 20.0  # that a rank may go on without moving, or being heard of, before it is marked
_BEHIND = 1.5  # times as much computing as the median of its like
_MOST_RANKS, _WORST = 40, 16
_LETTERS = {"compute": "#", "send_wait": "s", "receive_wait": "r", "idle": ".", "overhead": "o"}
_CLEAR = "\x1b[H\x1b[2J"


def watch(directory: Path, every_s: float, once: bool) -> ExitCode:
    """Show the run until it has ended, or once. Raises `SpecError` where there is no status."""
    path = directory / "status.json"
    try:
        while True:
            try:
                status = json.loads(path.read_text(encoding="utf-8"))
                lines = list(frame(status, time.time(), shutil.get_terminal_size().columns, str(directory)))
            except (OSError, ValueError) as error:
                raise SpecError(
                    f"{path}: cannot be read ({error}); give the output.path of a run that has begun"
                ) from None
            except (KeyError, TypeError) as error:
                raise SpecError(
                    f"{path}: no status of this version of mpinfer ({error!r}); use the run's own"
                ) from None
            print("\n".join(lines) if once else _CLEAR + "\n".join(lines), flush=True)
            if once or status["state"] in ENDS:
                return ExitCode.COMPLETE
            time.sleep(every_s)
    except KeyboardInterrupt:
        return ExitCode.COMPLETE


def frame(status: dict[str, Any], now: float, width: int, title: str) -> Iterator[str]:
    """The lines of one look; `now` in seconds of the epoch."""
    state, age_s = status["state"], now - status["updated_unix_s"]
    until = status["updated_unix_s"] if state in ENDS else now
    yield f"{title}: {state}, rank 0 on {status['host']}, for {span(until - status['started_unix_s'])}"
    if state not in ENDS and age_s > STALE_S:
        yield f"NOT UPDATED for {span(age_s)}: the run has ended without a word, or {status['host']} hangs"
    yield from _records(status, min(width, 100))
    if status["ranks"] and state not in ("complete", "interrupted"):  # whose account says more
        yield from _ranks(status["ranks"], width)


def _records(status: dict[str, Any], width: int) -> Iterator[str]:
    records = status["records"]
    share = records["done"] / records["total"] if records["total"] else 1.0
    filled = int(share * (width - 10))
    yield f"[{'=' * filled}{' ' * (width - 10 - filled)}] {share:6.1%}"
    failed = f", {records['failed']} failed" if records["failed"] else ""
    line = f"{records['done']} of {records['total']} records{failed}"
    if "records_per_s" in status:
        line += f"; {status['recent_records_per_s']:.2f} records/s, {status['records_per_s']:.2f} on average"
        if status["new_tokens_per_s"]:
            line += f"; {status['new_tokens_per_s']:.0f} new tokens/s"
        if status["state"] not in ENDS:
            left_s = status["left_s"]
            line += "; no end in sight" if left_s is None else f"; about {span(left_s)} left"
    yield line


def _ranks(ranks: list[dict[str, Any]], width: int) -> Iterator[str]:
    marks = {rank["rank"]: mark for rank in ranks if (mark := _mark(rank, ranks))}
    shown = ranks
    yield ""
    if len(ranks) > _MOST_RANKS:
        memory_bytes = max(rank["memory_bytes"] or 0 for rank in ranks)
        most = f", at most {memory_bytes / 1e9:.2f} GB of memory each" if memory_bytes else ""
        yield f"{len(ranks)} ranks, {len(marks)} marked{most}; {_bar(_summed(ranks), 30)}; the worst of them:"
        shown = sorted(ranks, key=lambda rank: _badness(rank, rank["rank"] in marks), reverse=True)[:_WORST]
    bar = max(10, min(30, width - 62))
    letters = ", ".join(f"{letter} {phase.replace('_', ' ')}" for phase, letter in _LETTERS.items())
    yield f"{'rank':>5} {'place':<9} {'records':>8} {'memory':>8}  {'time so far':<{bar}}  doing"
    for rank in shown:
        place = "/".join(str(rank["coordinates"][axis]) for axis in ("replica", "stage", "shard"))
        memory = f"{rank['memory_bytes'] / 1e6:.0f} MB" if rank["memory_bytes"] else "-"
        line = (
            f"{rank['rank']:>5} {place:<9} {rank['records_done']:>8} {memory:>8}  {_bar(rank['seconds'], bar):<{bar}}  "
        )
        yield (line + (marks.get(rank["rank"]) or rank["doing"]))[:width]
    yield f"records: of its replica; time: {letters}"


def _mark(rank: dict[str, Any], ranks: list[dict[str, Any]]) -> str:
    """What is wrong with a rank, if anything."""
    host = f" on {rank['host']}" if rank["host"] else ""
    if rank["moved_s_ago"] is None:  # nothing was heard of it yet, nor will be where there is no watchdog
        return ""
    if rank["heard_s_ago"] > SLOW_S:
        return f"! silent for {span(rank['heard_s_ago'])}{host}"
    if rank["moved_s_ago"] > SLOW_S:
        return f"! has not moved for {span(rank['moved_s_ago'])}{host}: {rank['doing']}"
    place = rank["coordinates"]
    like = [r["seconds"]["compute"] for r in ranks if r["seconds"] and r["coordinates"]["replica"] == place["replica"]]
    if rank["seconds"] and len(like) > 1 and rank["seconds"]["compute"] > max(1.0, _BEHIND * median(like)):
        return f"! straggler{host}: computed for {rank['seconds']['compute']:.0f} s, its replica {median(like):.0f} s"
    return ""


def _badness(rank: dict[str, Any], marked: bool) -> tuple[bool, float, float]:
    seconds = rank["seconds"] or {}
    return marked, max(rank["heard_s_ago"], rank["moved_s_ago"] or 0.0), seconds.get("compute", 0.0)


def _summed(ranks: list[dict[str, Any]]) -> dict[str, float]:
    return {phase: sum(rank["seconds"][phase] for rank in ranks if rank["seconds"]) for phase in _LETTERS}


def _bar(seconds: dict[str, float] | None, width: int) -> str:
    """A letter for each piece of time."""
    total = sum(seconds.values()) if seconds else 0.0
    if not seconds or not total:
        return ""
    ends, so_far = [], 0.0
    for phase, letter in _LETTERS.items():
        so_far += seconds[phase]
        ends.append((round(so_far / total * width), letter))
    text = ""
    for end, letter in ends:
        text += letter * (end - len(text))
    return text


def span(seconds: float) -> str:
    """As people say it."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    return f"{whole / 3600:.1f} h"
