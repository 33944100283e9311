"""Plots of a run for papers and slides, by matplotlib: as SVG and PNG."""

from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from mpinfer.errors import SpecError
from mpinfer.observe.account import PHASES
from mpinfer.observe.drawings import Row, rows, words
from mpinfer.observe.page import ideals, speed_ups
from mpinfer.observe.recorder import MICRO

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = dict(zip(PHASES, ("#2f7d5b", "#d98324", "#c44e52", "#c3c9d3", "#7568b0"), strict=True))
_DPI = 200


def plots(
    timing: dict[str, Any] | None, times: dict[str, Any] | None, bench: dict[str, Any] | None
) -> Iterator[tuple[str, bytes]]:
    """Names of files, and what they hold, of all that is known. Raises `SpecError` where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise SpecError("--plots: needs matplotlib; pip install 'mpinfer[plots]'") from None
    matplotlib.use("Agg")
    height = len(rows(timing["ranks"])[0]) if timing else 0
    if timing and times:
        yield from _drawn("gantt", height, lambda axes: _gantt(axes, timing, times))
    if timing:
        yield from _drawn("ranks", height, lambda axes: _ranks(axes, timing))
    if bench and (series := speed_ups(bench)):
        yield from _drawn("scaling", 12, lambda axes: _scaling(axes, series, ideals(bench)))


def _drawn(name: str, height: int, draw: Callable[["Axes"], None]) -> Iterator[tuple[str, bytes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.25 * height), layout="constrained")
    draw(figure.subplots())
    for kind in ("svg", "png"):
        file = BytesIO()
        figure.savefig(file, format=kind, dpi=_DPI)
        yield f"{name}.{kind}", file.getvalue()


def _gantt(axes: "Axes", timing: dict[str, Any], times: dict[str, Any]) -> None:
    """In each row and bin a bar, divided as its time was."""
    recorded = {rank["rank"]: rank for rank in times["ranks"]}
    shown = rows(timing["ranks"])[0]
    for number, row in enumerate(shown):
        own = [recorded[timing["ranks"][place]["rank"]] for place in row.ranks]
        count = max(len(rank["microseconds"][0]) for rank in own)
        edges = [own[0]["start_s"] + place * times["bin_s"] for place in range(count + 1)]
        floor = [number - 0.45] * count
        for place, phase in enumerate(PHASES):
            shares = [
                0.9 * sum(rank["microseconds"][place][n] for rank in own) / MICRO / times["bin_s"] / len(own)
                for n in range(count)
            ]
            top = [low + share for low, share in zip(floor, shares, strict=True)]
            axes.stairs(top, edges, baseline=floor, fill=True, color=_COLOURS[phase])
            floor = top
    axes.set_xlim(0, timing["wall_s"])
    _finish(axes, shown, "seconds")


def _ranks(axes: "Axes", timing: dict[str, Any]) -> None:
    shown = rows(timing["ranks"])[0]
    left = [0.0] * len(shown)
    for phase in PHASES:
        own = [sum(timing["ranks"][p][f"{phase}_s"] for p in row.ranks) / len(row.ranks) for row in shown]
        axes.barh(range(len(shown)), own, left=left, color=_COLOURS[phase])
        left = [before + seconds for before, seconds in zip(left, own, strict=True)]
    _finish(axes, shown, "seconds")


def _finish(axes: "Axes", shown: list[Row], unit: str) -> None:
    from matplotlib.patches import Patch

    axes.set_yticks(range(len(shown)), [row.label for row in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel(unit)
    patches = [Patch(color=_COLOURS[phase], label=words(phase)) for phase in PHASES]
    axes.legend(handles=patches, ncols=len(PHASES), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _scaling(axes: "Axes", series: dict[str, list[tuple[float, float]]], ideal: Sequence[tuple[float, float]]) -> None:
    axes.plot(*zip(*ideal, strict=True), linestyle="--", color="gray", label="ideal")
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xlabel("ranks")
    axes.set_ylabel("speed-up")
    axes.legend(frameon=False)
