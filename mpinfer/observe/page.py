"""`report.html`: a finished run on one page that needs nothing else. Each section is a function of a plain dict."""

from html import escape
from typing import Any

from mpinfer.observe.account import PHASES
from mpinfer.observe.hints import hints

_WIDTH, _ROW, _LABEL = 640, 22, 120  # of drawings, in pixels
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2430; --faint: #667; --line: #d5d9e0; --compute: #2f7d5b;
  --send_wait: #d98324; --receive_wait: #c44e52; --idle: #b8bec9; --overhead: #7568b0 }
@media (prefers-color-scheme: dark) { :root { --ground: #14181f; --ink: #e4e8ee; --faint: #98a; --line: #39414d;
  --compute: #4fb286; --send_wait: #e8a557; --receive_wait: #e07a7d; --idle: #5b6472; --overhead: #a398d8 } }
body { background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 960px;
  margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 2px 12px 2px 0; text-align: right; border-bottom: 1px solid var(--line) }
th { color: var(--faint); font-weight: normal }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100% } svg text { fill: var(--ink); font-size: 12px }
.key { margin-right: 1.2em; white-space: nowrap } .key i { display: inline-block; width: .8em; height: .8em }
"""


def page(timing: dict[str, Any], title: str, times: dict[str, Any] | None = None) -> str:
    """The whole page, of what `timing.json` holds."""
    sections = {
        "In short": summary(timing),
        "Who did what": plan(timing),
        "Where each rank's time went": bars(timing),
        "Ranks": table(timing),
        "Hints": listed(hints(timing)),
    }
    body = "\n".join(f"<h2>{name}</h2>\n{section}" for name, section in sections.items() if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def summary(timing: dict[str, Any]) -> str:
    overlap = timing["overlap"]
    facts = {
        "records": f"{timing['records']}",
        "wall": f"{timing['wall_s']:.2f} s",
        "predicted": f"{timing['predicted_wall_s']:.2f} s",
        "start-up and loading": f"{timing['start_s'] + timing['load_s']:.2f} s",
        "records/s": f"{timing['records_per_s']:.2f}",
        "tokens/s, prompts included": f"{timing['all_tokens_per_s']:.1f}",
        "bubble": f"{timing['bubble']:.1%}",
        "overlap": "none sent" if overlap is None else f"{overlap:.1%}",
        "imbalance": f"{timing['imbalance']:.1%}",
        "lost ranks": ", ".join(map(str, timing["lost_ranks"])) or "none",
    }
    return _table([], [[name, value] for name, value in facts.items()])


def plan(timing: dict[str, Any]) -> str:
    """A row a replica; its ranks in order of stages, and of shards in a stage."""
    hosts = {rank["rank"]: rank["host"] for rank in timing["ranks"]}
    rows = []
    for number, layout in enumerate(timing["plan"]["layouts"]):
        shards = layout["shards"]
        stages = [layout["ranks"][first : first + shards] for first in range(0, len(layout["ranks"]), shards)]
        cells = []
        for stage, ranks in enumerate(stages):
            first, end = layout["cuts"][stage : stage + 2]
            who = ", ".join(f"rank {rank} on {hosts.get(rank, 'a host that left no account')}" for rank in ranks)
            cells.append(f"blocks {first} to {end - 1}: {who}")
        rows.append([f"replica {number}", f"{layout['share']:.0%} of the records", " → ".join(cells)])
    return _table(["", "planned share", "stages"], rows)


def bars(timing: dict[str, Any]) -> str:
    """A bar a rank, as long as its share of the longest, in the colours of phases."""
    longest = max(sum(rank[f"{phase}_s"] for phase in PHASES) for rank in timing["ranks"])
    shapes = []
    for row, rank in enumerate(timing["ranks"]):
        y, x = row * _ROW, float(_LABEL)
        shapes.append(f'<text x="0" y="{y + 15}">rank {rank["rank"]}, {escape(rank["host"][:10])}</text>')
        for phase in PHASES:
            seconds = rank[f"{phase}_s"]
            width = seconds / longest * (_WIDTH - _LABEL) if longest else 0.0
            tip = f"<title>{_words(phase)} {seconds:.2f} s</title>"
            box = f'x="{x:.2f}" y="{y + 3}" width="{width:.2f}" height="{_ROW - 6}"'
            shapes.append(f'<rect {box} style="fill: var(--{phase})">{tip}</rect>')
            x += width
    key = "".join(f'<span class="key"><i style="background: var(--{p})"></i> {_words(p)}</span>' for p in PHASES)
    size = f'width="{_WIDTH}" height="{_ROW * len(timing["ranks"])}"'
    box = f'viewBox="0 0 {_WIDTH} {_ROW * len(timing["ranks"])}"'
    return f"<p>{key}</p>\n<svg {size} {box}>{''.join(shapes)}</svg>"


def table(timing: dict[str, Any]) -> str:
    rows = [
        [
            str(rank["rank"]),
            rank["host"],
            *(f"{rank[f'{phase}_s']:.2f} s" for phase in PHASES),
            *(f"{rank[key] / 1e6:.1f} MB" for key in ("bytes_sent", "weight_bytes", "peak_memory_bytes")),
        ]
        for rank in timing["ranks"]
    ]
    return _table(["rank", "host", *map(_words, PHASES), "sent", "weights", "peak"], rows)


def listed(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(head, 'th') if head else ''}{''.join(line(row, 'td') for row in rows)}</table>"


def _words(phase: str) -> str:
    return phase.replace("_", " ")
