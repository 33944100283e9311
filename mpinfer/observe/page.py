"""`report.html`: a finished run on one page that needs nothing else. Each section is a function of plain dicts: of what
`timing.json`, `timeline.json` and `bench.json` hold."""

from html import escape
from numbers import Real
from typing import Any

from mpinfer.observe import drawings
from mpinfer.observe.account import PHASES
from mpinfer.observe.drawings import size, words
from mpinfer.observe.hints import hints
from mpinfer.observe.timeline import bubble

_MANY = 32  # rows of a table that need not be open
_STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --ink: #1c2430; --faint: #5c6675; --line: #d9dde4;
  --accent: #2463b4; --compute: #2f7d5b; --send_wait: #d98324; --receive_wait: #c44e52; --idle: #c3c9d3;
  --overhead: #7568b0 }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --card: #1a2028; --ink: #e4e8ee; --faint: #9aa5b4;
  --line: #333c48; --accent: #6ea8ee; --compute: #4fb286; --send_wait: #e8a557; --receive_wait: #e07a7d;
  --idle: #4d5664; --overhead: #a398d8 } }
* { box-sizing: border-box }
body { background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 1180px;
  margin: 0 auto; padding: 1.2em }
h1 { font-size: 1.4em; margin: 0 0 .6em; overflow-wrap: anywhere } h2 { font-size: 1em; margin: 0 0 .6em }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1em; margin: 0 0 1em }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: .7em 1.2em }
.tiles b { display: block; font-size: 1.25em; font-variant-numeric: tabular-nums; white-space: nowrap }
.tiles span, .note, th, .small, .host { color: var(--faint); fill: var(--faint) }
.tiles span { font-size: .85em }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1em }
.pair section { margin: 0 } .pair { margin: 0 0 1em }
.note { margin: 0 0 .6em; font-size: .9em }
ul { margin: 0; padding-left: 1.2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9em; white-space: nowrap }
th, td { padding: 2px 14px 2px 0; text-align: right; border-bottom: 1px solid var(--line) }
th { font-weight: normal } td:first-child, th:first-child { text-align: left }
summary { cursor: pointer; color: var(--accent) }
.wide { overflow-x: auto }
svg { display: block; width: 100% }
.rows { display: grid; grid-template-columns: minmax(64px, max-content) 1fr; gap: 0 .8em; font-size: 12px }
.labels { max-width: 30vw } .labels div { height: 22px; line-height: 22px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap }
.axis { position: relative; height: 22px; color: var(--faint) } .axis span { position: absolute;
  border-left: 1px solid var(--faint); padding-left: 3px; white-space: nowrap }
svg.plan { width: auto; max-width: none } svg.scaling { max-width: 640px }
svg text { fill: var(--ink); font-size: 12px } svg text.small, svg text.host { fill: var(--faint); font-size: 11px }
.name { font-weight: 600 }
.rank { fill: var(--ground); stroke: var(--accent) } .node { fill: none; stroke: var(--faint); stroke-dasharray: 4 3 }
.arrow { fill: none; stroke: var(--faint) } .tick { stroke: var(--line); stroke-width: .5; fill: none }
.line { fill: none; stroke: var(--accent); stroke-width: 2 } .ideal { fill: none; stroke: var(--faint);
  stroke-dasharray: 5 4 } .mean { stroke: var(--ink); stroke-dasharray: 3 3 } .bytes { fill: var(--accent) }
.key { margin-right: 1.2em; white-space: nowrap }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px }
""" + "".join(f".{phase} {{ fill: var(--{phase}) }} i.{phase} {{ background: var(--{phase}) }}\n" for phase in PHASES)


def page(
    timing: dict[str, Any] | None,
    title: str,
    times: dict[str, Any] | None = None,
    bench: dict[str, Any] | None = None,
) -> str:
    """The whole page; what is not known is not on it."""
    body = (_run(timing, times) if timing else "") + (_section("Scaling", scaling(bench)) if bench else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )


def _run(timing: dict[str, Any], times: dict[str, Any] | None) -> str:
    ranks = timing["ranks"]
    pairs = [
        _section(
            "Load balance: seconds of computing", drawings.columns(ranks, _of(ranks, "compute_s"), "s", "compute")
        ),
        _section("Sent by each rank", drawings.columns(ranks, _of(ranks, "bytes_sent", 1e6), "MB", "bytes")),
        _section("Progress of records", drawings.curve(times, timing["wall_s"]) if times else ""),
        _section("From hand-out to result", latency(timing)),
    ]
    sections = [
        _section("In short", summary(timing)),
        _section("Hints", listed(hints(timing))),
        _section("The plan", drawings.plan(timing)),
        _section("What ranks did over time", over_time(timing, times) if times else ""),
        _section("Where each rank's time went", ("" if times else key(timing)) + drawings.bars(timing)),
        f'<div class="pair">{"".join(pairs)}</div>\n',
        _section("Ranks", table(timing)),
    ]
    return "".join(sections)


def _section(name: str, content: str) -> str:
    return f"<section><h2>{escape(name)}</h2>\n{content}</section>\n" if content else ""


def summary(timing: dict[str, Any]) -> str:
    overlap, tokens = timing["overlap"], timing["all_tokens_per_s"]
    facts = {
        "records": f"{timing['records']}",
        "wall": _duration(timing["wall_s"]),
        "predicted": _duration(timing["predicted_wall_s"]),
        "start-up and loading": _duration(timing["start_s"] + timing["load_s"]),
        "records/s": f"{timing['records_per_s']:.2f}",
        "tokens/s with prompts": f"{tokens:.1f}" if tokens else "",
        "new tokens/s": f"{timing['tokens_per_s']:.1f}" if tokens else "",
        "bubble": f"{timing['bubble']:.1%}",
        "overlap": "none sent" if overlap is None else f"{overlap:.1%}",
        "imbalance": f"{timing['imbalance']:.1%}",
        "ranks": f"{len(timing['ranks'])}",
        "nodes": f"{len({rank['host'] for rank in timing['ranks']})}",
        "sent": size(sum(_of(timing["ranks"], "bytes_sent"))),
        "most memory of a rank": size(max(_of(timing["ranks"], "peak_memory_bytes"))),
        "lost ranks": ", ".join(map(str, timing["lost_ranks"])),
    }
    return _tiles(facts)


def over_time(timing: dict[str, Any], times: dict[str, Any]) -> str:
    share = bubble(times, timing["wall_s"])
    said = f"Each column shows how its time was shared among phases. Bubble by this chart: {share:.1%}."
    return f'{key(timing)}<p class="note">{said}</p>{drawings.gantt(timing, times)}'


def key(timing: dict[str, Any]) -> str:
    """The colours of phases, with their share of all time."""
    seconds = {phase: sum(_of(timing["ranks"], f"{phase}_s")) for phase in PHASES}
    total = sum(seconds.values()) or 1.0
    spans = [f'<span class="key"><i class="{p}"></i> {words(p)} {s / total:.1%}</span>' for p, s in seconds.items()]
    return f"<p>{''.join(spans)}</p>"


def latency(timing: dict[str, Any]) -> str:
    """Of records; their wait in a replica counts."""
    found = timing.get("latency_s")
    return _tiles({name: f"{seconds:.3g} s" for name, seconds in found.items()}) if found else ""


def table(timing: dict[str, Any]) -> str:
    rows = [
        [
            str(rank["rank"]),
            rank["host"],
            "/".join(str(rank["coordinates"][axis]) for axis in ("replica", "stage", "shard")),
            *(f"{rank[f'{phase}_s']:.2f} s" for phase in PHASES),
            *(size(rank[key]) for key in ("bytes_sent", "bytes_received", "weight_bytes", "peak_memory_bytes")),
        ]
        for rank in timing["ranks"]
    ]
    head = ["rank", "host", "place", *map(words, PHASES), "sent", "received", "weights", "peak"]
    whole = f'<div class="wide">{_table(head, rows)}</div>'
    return whole if len(rows) <= _MANY else f"<details><summary>{len(rows)} ranks</summary>{whole}</details>"


def listed(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def scaling(bench: dict[str, Any]) -> str:
    """Of a laboratory, what can be drawn: its rows with numbers of ranks and speed-ups."""
    series = speed_ups(bench)
    if not series:
        return ""
    shown = ("strategy", "ranks", "wall_s", "records_per_s", "speed_up", "efficiency")
    rows = [[_cell(row.get(name)) for name in shown] for row in bench["rows"] if isinstance(row, dict)]
    whole = _table([words(name) for name in shown], rows)
    return f'{drawings.scaling(series, ideals(bench))}<div class="wide">{whole}</div>'


def speed_ups(bench: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Ranks and speed-up of each strategy, in order of ranks."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in bench.get("rows", []):
        if isinstance(row, dict) and isinstance(row.get("ranks"), Real) and isinstance(row.get("speed_up"), Real):
            series.setdefault(str(row.get("strategy")), []).append((row["ranks"], row["speed_up"]))
    return {strategy: sorted(points) for strategy, points in series.items()}


def ideals(bench: dict[str, Any]) -> list[tuple[float, float]]:
    """Ranks, and the speed-up that they would have at best: what rows say of it, or one more for each rank."""
    rows = [row for row in bench.get("rows", []) if isinstance(row, dict) and isinstance(row.get("ranks"), Real)]
    said = {row["ranks"]: row["ideal"] for row in rows if isinstance(row.get("ideal"), Real)}
    most = max((row["ranks"] for row in rows), default=1)
    points = sorted(said.items()) if said else [(most, most)]
    return points if len(points) > 1 else [(0, 0), *points]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _duration(seconds: float) -> str:
    if seconds < 1000:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def _of(ranks: list[dict[str, Any]], key: str, unit: float = 1.0) -> list[float]:
    return [rank[key] / unit for rank in ranks]


def _tiles(facts: dict[str, str]) -> str:
    tiles = (f"<div><b>{escape(value)}</b><span>{name}</span></div>" for name, value in facts.items() if value)
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
