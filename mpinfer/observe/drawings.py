"""Drawings of a run, as SVG that a page holds. Each is a function of plain values; colours are the page's variables."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from typing import Any

from mpinfer.observe.account import PHASES
from mpinfer.observe.recorder import MICRO

MOST_ROWS = 64  # of ranks or nodes
_EXTREMES = 12  # ranks that computed least and most, where not all are drawn
_MOST_COLUMNS = 240  # of a Gantt chart's row
_WIDTH, _ROW, _AXIS = 1000, 22, 24  # pixels
_CELL_W, _CELL_H, _GAP, _PAD = 112, 52, 26, 12
_MOST_REPLICAS, _MOST_STAGES, _MOST_SHARDS = 8, 16, 8


@dataclass(frozen=True)
class Row:
    """Of a drawing: one rank, or the mean of several."""

    label: str
    ranks: list[int]  # places in `timing.json`


@dataclass(frozen=True)
class _Box:
    """Of a node."""

    host: str
    left: int
    top: int
    right: int
    bottom: int

    def over(self, below: "_Box") -> "_Box":
        return replace(self, right=max(self.right, below.right), bottom=below.bottom)

    def __str__(self) -> str:
        width, name = self.right - self.left, _short(self.host, (self.right - self.left) // 7)
        box = f'x="{self.left}" y="{self.top}" width="{width}" height="{self.bottom - self.top}" rx="8"'
        return (
            f'<rect class="node" {box}><title>{escape(self.host)}</title></rect>'
            f'<text class="host" x="{self.left + 4}" y="{self.top - 3}">{escape(name)}</text>'
        )


def rows(ranks: Sequence[dict[str, Any]]) -> tuple[list[Row], str]:
    """What is drawn of so many ranks, and what to say of the rest. All of them by node, or else nodes, and the ranks
    that differ most."""
    hosts: dict[str, list[int]] = {}
    for place, rank in enumerate(ranks):
        hosts.setdefault(rank["host"], []).append(place)
    short = {host: host.split(".")[0] for host in hosts}
    name = short if len(set(short.values())) == len(hosts) else dict(zip(hosts, hosts, strict=True))
    singly = [Row(f"{rank['rank']} · {name[rank['host']]}", [place]) for place, rank in enumerate(ranks)]
    if len(ranks) <= MOST_ROWS:
        return [singly[place] for places in hosts.values() for place in places], ""
    nodes = [Row(f"{name[host]} · {len(places)} ranks", places) for host, places in hosts.items()]
    nodes, left_out = nodes[: MOST_ROWS - 2 * _EXTREMES], nodes[MOST_ROWS - 2 * _EXTREMES :]
    order = sorted(range(len(ranks)), key=lambda place: ranks[place]["compute_s"])
    extremes = [singly[place] for place in order[:_EXTREMES] + order[-_EXTREMES:]]
    more = f", without {len(left_out)} more nodes" if left_out else ""
    said = f"{len(ranks)} ranks: the mean of each node{more}; then the {_EXTREMES} ranks that computed least and most."
    return nodes + extremes, said


def gantt(timing: dict[str, Any], times: dict[str, Any]) -> str:
    """Every row's phases over time: in each column the share of the time that each had."""
    recorded = {rank["rank"]: rank for rank in times["ranks"]}
    shown, said = rows(timing["ranks"])
    longest = max((len(row) for rank in times["ranks"] for row in rank["microseconds"]), default=0)
    fold = max(1, math.ceil(longest / _MOST_COLUMNS))
    width_s, wall_s = times["bin_s"] * fold, max(timing["wall_s"], times["bin_s"])
    scale = _WIDTH / wall_s
    shapes = []
    for number, row in enumerate(shown):
        own = [recorded[timing["ranks"][place]["rank"]] for place in row.ranks]
        left = sum(rank["start_s"] for rank in own) / len(own) * scale
        place = f"translate({left:.2f} {(number + 1) * _ROW - 2}) scale({width_s * scale:.4f} -.18)"
        shapes.append(f'<g transform="{place}">{"".join(_areas(own, fold, width_s, row.label))}</g>')
    return _note(said) + _beside(shown, "".join(shapes), wall_s, "gantt")


def _areas(ranks: Sequence[dict[str, Any]], fold: int, width_s: float, label: str) -> Iterator[str]:
    """One over the other, the tallest first: each is as high as its phase and those below it."""
    columns = [_folded([rank["microseconds"][row] for rank in ranks], fold) for row in range(len(PHASES))]
    unit = width_s * MICRO * len(ranks) / 100
    heights = [0.0] * len(columns[0])
    paths = []
    for phase, amounts in zip(PHASES, columns, strict=True):
        heights = [height + amount / unit for height, amount in zip(heights, amounts, strict=True)]
        tip = f"{label}: {words(phase)} {sum(amounts) / MICRO / len(ranks):.2f} s"
        paths.append(f'<path class="{phase}" d="{_steps(heights)}"><title>{escape(tip)}</title></path>')
    return reversed(paths)


def _folded(series: Sequence[Sequence[int]], fold: int) -> list[int]:
    columns = [0] * math.ceil(max(map(len, series)) / fold)
    for amounts in series:
        for place, amount in enumerate(amounts):
            columns[place // fold] += amount
    return columns


def _steps(heights: Sequence[float]) -> str:
    path, last = ["M0 0"], -1
    for place, height in enumerate(heights):
        if (now := min(100, round(height))) != last:
            path.append(f"H{place}V{now}")
            last = now
    return "".join([*path, f"H{len(heights)}V0Z"])


def bars(timing: dict[str, Any]) -> str:
    """A bar a row, as long as its share of the longest, in the colours of phases."""
    ranks, (shown, said) = timing["ranks"], rows(timing["ranks"])
    longest = max(sum(rank[f"{phase}_s"] for phase in PHASES) for rank in ranks) or 1.0
    shapes = []
    for number, row in enumerate(shown):
        x = 0.0
        for phase in PHASES:
            seconds = sum(ranks[place][f"{phase}_s"] for place in row.ranks) / len(row.ranks)
            width = seconds / longest * _WIDTH
            box = f'x="{x:.2f}" y="{number * _ROW + 3}" width="{width:.2f}" height="{_ROW - 6}"'
            tip = escape(f"{row.label}: {words(phase)} {seconds:.2f} s")
            shapes.append(f'<rect class="{phase}" {box}><title>{tip}</title></rect>')
            x += width
    return _note(said) + _beside(shown, "".join(shapes), longest, "bars")


def _beside(shown: Sequence[Row], shapes: str, most_s: float, kind: str) -> str:
    """A drawing as wide as there is room, beside the names of its rows, above seconds: no text is stretched."""
    height = _ROW * len(shown)
    labels = "".join(f"<div>{escape(row.label)}</div>" for row in shown)
    box = f'role="img" viewBox="0 0 {_WIDTH} {height}" preserveAspectRatio="none" style="height: {height}px"'
    return (
        f'<div class="rows"><div class="labels">{labels}</div><div><svg class="{kind}" {box}>{shapes}</svg>'
        f'<div class="axis">{"".join(_seconds(most_s))}</div></div></div>'
    )


def _seconds(most_s: float) -> Iterator[str]:
    for at_s in _marks(most_s, 5):
        yield f'<span style="left: {at_s / most_s:.2%}">{at_s:g}{"" if at_s else " s"}</span>'


def columns(ranks: Sequence[dict[str, Any]], values: Sequence[float], unit: str, kind: str) -> str:
    """A column a rank, however many, with a line at the mean."""
    width, height, left = 480, 150, 64
    most, mean = max(values) or 1.0, sum(values) / len(values)
    each = (width - left) / len(values)
    shapes = []
    for number, (rank, value) in enumerate(zip(ranks, values, strict=True)):
        tall = value / most * height
        tip = escape(f"rank {rank['rank']} on {rank['host']}: {value:.4g} {unit}")
        box = (
            f'x="{left + number * each:.2f}" y="{height - tall + 8:.2f}" width="{each * 0.86:.2f}" height="{tall:.2f}"'
        )
        shapes.append(f'<rect class="{kind}" {box}><title>{tip}</title></rect>')
    y = height - mean / most * height + 8
    shapes.append(f'<path class="mean" d="M{left} {y:.1f}H{width}"><title>mean {mean:.4g} {unit}</title></path>')
    shapes += [_text(0, 16, f"{_number(most)} {unit}", 10), _text(0, height + 8, "0", 9)]
    shapes.append(_text(left, height + 24, f"rank {ranks[0]['rank']}", 12))
    if len(ranks) > 1:
        last = f'<text x="{width}" y="{height + 24}" text-anchor="end">rank {ranks[-1]["rank"]}</text>'
        shapes.append(last)
    return _svg(width, height + 30, "".join(shapes), f"columns {kind}")


def curve(times: dict[str, Any], wall_s: float) -> str:
    """Records done over time, beside an even pace."""
    width, height, left = 480, 150, 64
    done, total = 0, sum(times["records"]) or 1
    scale = (width - left) / max(wall_s, times["bin_s"])
    path = [f"M{left} {height + 8}"]
    for place, count in enumerate(times["records"], start=1):
        if count:
            done += count
            x = min(width, left + place * times["bin_s"] * scale)
            path.append(f"H{x:.1f}V{height + 8 - done / total * height:.1f}")
    even = f'<path class="ideal" d="M{left} {height + 8}L{width} 8"><title>an even pace</title></path>'
    line = f'<path class="line" d="{"".join(path)}H{width}"><title>records done</title></path>'
    axis = "".join(_axis(wall_s, width - left, height + 8, left, "s"))
    ends = _text(0, 16, str(done), 9) + _text(0, height + 8, "0", 9)
    return _svg(width, height + 8 + _AXIS, even + line + ends + axis, "progress")


def scaling(series: dict[str, list[tuple[float, float]]], ideals: Sequence[tuple[float, float]]) -> str:
    """Speed-up over ranks for each strategy, beside the ideal."""
    width, height, left = 480, 260, 64
    every = [*ideals, *(point for points in series.values() for point in points)]
    most, top = (max(values) for values in zip(*every, strict=True))

    def at(ranks: float, speed_up: float) -> str:
        return f"{left + ranks / most * (width - left - 8):.1f} {height + 8 - speed_up / top * height:.1f}"

    best = "L".join(at(*point) for point in ideals)
    shapes = [f'<path class="ideal" d="M{best}"><title>ideal</title></path>']
    for number, (name, points) in enumerate(series.items()):
        style = f'style="stroke: hsl({number * 137 % 360} 60% 50%)"'
        path = "L".join(at(*point) for point in points)
        shapes.append(f'<path class="line" {style} d="M{path}"><title>{escape(name)}</title></path>')
        for ranks, speed_up in points:
            x, y = at(ranks, speed_up).split()
            tip = escape(f"{name}: {speed_up:.2f} times as fast on {ranks:g} ranks")
            dot = f'style="fill: hsl({number * 137 % 360} 60% 50%)" cx="{x}" cy="{y}" r="4"'
            shapes.append(f"<circle {dot}><title>{tip}</title></circle>")
    shapes += [_text(0, 16, f"{top:.3g} x", 9), *_axis(most, width - left - 8, height + 8, left, "ranks")]
    keys = "".join(
        f'<span class="key"><i style="background: hsl({number * 137 % 360} 60% 50%)"></i> {escape(name)}</span>'
        for number, name in enumerate(series)
    )
    ideal = '<span class="key small">dashed: ideal</span>'
    return f"<p>{keys}{ideal}</p>" + _svg(width, height + 8 + _AXIS, "".join(shapes), "scaling")


def plan(timing: dict[str, Any]) -> str:
    """Replicas as rows, their stages from left to right, shards below one another, in boxes of their nodes."""
    ranks = {rank["rank"]: rank for rank in timing["ranks"]}
    layouts = timing["plan"]["layouts"]
    shapes: list[str] = []
    boxes: list[_Box] = []
    y, width, alone = _PAD, 0, False
    for number, layout in enumerate(layouts[:_MOST_REPLICAS]):
        y += 20  # for the names of nodes
        stages = _stages(layout)
        height = min(layout["shards"], _MOST_SHARDS) * (_CELL_H + 6) - 6
        middle = y + height // 2
        shapes.append(_text(0, middle + 4, f"replica {number} · {layout['share']:.0%}", 20))
        for stage, members in enumerate(stages[:_MOST_STAGES]):
            if stage:
                shapes.append(f'<path class="arrow" d="M{_left(stage) - 18} {middle}h10l-5 -4m5 4l-5 4"/>')
            shapes += _stage(_left(stage), y, stage, members, layout["cuts"][stage : stage + 2], ranks)
        own = list(_boxes(stages[:_MOST_STAGES], ranks, y, height))
        if alone and len(own) == 1 and own[0].host == boxes[-1].host:  # so did the replica before
            boxes[-1] = boxes[-1].over(own[0])
        else:
            boxes += own
        alone = len(own) == 1
        width = max(width, own[-1].right + _PAD)
        if len(stages) > _MOST_STAGES:
            shapes.append(_text(own[-1].right + 8, middle + 4, f"+ {len(stages) - _MOST_STAGES} stages", 20))
            width = max(width, own[-1].right + 100)
        y += height + 18
    nodes = "".join(map(str, boxes))
    more = len(layouts) - _MOST_REPLICAS
    said = f"{more} more replicas are not drawn." if more > 0 else ""
    size = f'width="{width}" height="{y}" viewBox="0 0 {width} {y}"'
    return f'{_note(said)}<div class="wide"><svg class="plan" role="img" {size}>{nodes}{"".join(shapes)}</svg></div>'


def _stages(layout: dict[str, Any]) -> list[list[int]]:
    shards = layout["shards"]
    return [layout["ranks"][first : first + shards] for first in range(0, len(layout["ranks"]), shards)]


def _stage(
    x: int, y: int, stage: int, members: Sequence[int], cuts: Sequence[int], ranks: dict[int, dict[str, Any]]
) -> Iterator[str]:
    first, end = cuts
    for shard, rank in enumerate(members[:_MOST_SHARDS]):
        top = y + shard * (_CELL_H + 6)
        known = ranks.get(rank)
        weights = size(known["weight_bytes"]) if known else "left no account"
        host = known["host"] if known else "a host that left no account"
        blocks = f"blocks {first} to {end - 1}"
        tip = escape(f"rank {rank} on {host}: stage {stage}, shard {shard}, {blocks}, {weights}")
        box = f'x="{x}" y="{top}" width="{_CELL_W}" height="{_CELL_H}" rx="5"'
        yield f'<rect class="rank" {box}><title>{tip}</title></rect>'
        yield f'<text x="{x + 8}" y="{top + 17}"><tspan class="name">rank {rank}</tspan></text>'
        yield f'<text class="small" x="{x + 8}" y="{top + 31}">{blocks}</text>'
        yield f'<text class="small" x="{x + 8}" y="{top + 44}">{weights}</text>'
    if len(members) > _MOST_SHARDS:
        yield _text(x + 8, y + _MOST_SHARDS * (_CELL_H + 6) + 4, f"+ {len(members) - _MOST_SHARDS} shards", 16)


def _boxes(stages: Sequence[Sequence[int]], ranks: dict[int, dict[str, Any]], y: int, height: int) -> Iterator[_Box]:
    """Around neighbouring stages of a node."""
    known = [ranks[members[0]]["host"] if members[0] in ranks else "lost" for members in stages]
    for host, group in groupby(range(len(known)), key=lambda stage: known[stage]):
        places = list(group)
        yield _Box(host, _left(places[0]) - 8, y - 6, _left(places[-1]) + _CELL_W + 8, y + height + 8)


def _left(stage: int) -> int:
    return 130 + stage * (_CELL_W + _GAP)


def _axis(most: float, width: float, y: float, left: float, unit: str) -> Iterator[str]:
    """Marks at round numbers."""
    for at in _marks(most, 6):
        x = left + at / most * width
        anchor = "end" if x > left + width - 20 else "middle" if at else "start"
        yield f'<path class="tick" d="M{x:.1f} 0V{y + 4}"/>'
        label = f"{at:g}" if at else f"0 {unit}"
        yield f'<text class="small" x="{x:.1f}" y="{y + 18}" text-anchor="{anchor}">{label}</text>'


def _marks(most: float, count: int) -> list[float]:
    """Round numbers from 0 on."""
    step = _round_step(most / count)
    return [number * step for number in range(int(most / step * 1.0001) + 1)]


def _round_step(least: float) -> float:
    power = 10 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _svg(width: int, height: int, body: str, kind: str) -> str:
    box = f'role="img" viewBox="0 0 {width} {height}" style="aspect-ratio: {width} / {height}"'
    return f'<div class="wide"><svg class="{kind}" {box}>{body}</svg></div>'


def _text(x: float, y: float, text: str, most: int) -> str:
    return f'<text x="{x}" y="{y}">{escape(_short(text, most))}</text>'


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def size(byte_count: float) -> str:
    """In a unit that suits it."""
    power = min(int(math.log10(max(byte_count, 1)) // 3), 4)
    return f"{byte_count / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def words(phase: str) -> str:
    return phase.replace("_", " ")
