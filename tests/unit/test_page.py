"""The page of a run: what it shows, that it needs nothing else, and that a browser shows it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mpinfer.cli import main
from mpinfer.observe import drawings
from mpinfer.observe.account import PHASES
from mpinfer.observe.page import ideals, page, speed_ups

WALL_S, BIN_S = 20.0, 0.5
SECONDS = {"compute": 10.0, "send_wait": 1.0, "receive_wait": 2.0, "idle": 3.0, "overhead": 4.0}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECTIONS = ("In short", "Hints", "The plan", "What ranks did over time", "Where each rank's time went", "Load balance")
SECTIONS += ("Sent by each rank", "Progress of records", "From hand-out to result", "Ranks", "Scaling")


def timing(hosts: tuple[str, ...] = ("node1", "<b>&"), stages: int = 2, shards: int = 1) -> dict[str, Any]:
    """Of as many replicas as hosts can hold, on a host each rank; one has a name that must be escaped."""
    size = stages * shards
    ranks = [
        {
            "rank": rank,
            "host": host,
            "coordinates": {"replica": rank // size, "stage": rank // shards % stages, "shard": rank % shards},
            "cores": [rank],
            "threads": 1,
            "halved_batches": 0,
            **{f"{phase}_s": seconds for phase, seconds in SECONDS.items()},
            "bytes_sent": 10**6,
            "bytes_received": 2 * 10**6,
            "weight_bytes": 3 * 10**6,
            "peak_memory_bytes": 10**9,
        }
        for rank, host in enumerate(hosts)
    ]
    layouts = [
        {
            "stages": stages,
            "shards": shards,
            "cuts": [17 * stage for stage in range(stages + 1)],
            "ranks": list(range(first, first + size)),
            "share": size / len(hosts),
        }
        for first in range(0, len(hosts), size)
    ]
    return {
        "wall_s": WALL_S,
        "predicted_wall_s": 19.0,
        "start_s": 1.0,
        "load_s": 1.0,
        "bubble": 0.3,
        "overlap": None,
        "records": 40,
        "records_per_s": 2.0,
        "tokens_per_s": 50.0,
        "all_tokens_per_s": 100.0,
        "imbalance": 0.0,
        "latency_s": {"p50": 1.0, "p90": 2.0, "p99": 3.0, "max": 4.0},
        "lost_ranks": [],
        "plan": {"layouts": layouts},
        "ranks": ranks,
    }


def times(ranks: int = 2) -> dict[str, Any]:
    """The same seconds, one phase after the other, in 40 bins."""
    order = [place for place, phase in enumerate(PHASES) for _ in range(int(SECONDS[phase] / BIN_S))]
    rows = [[int(BIN_S * 1e6) * (place == row) for place in order] for row in range(len(PHASES))]
    every = [{"rank": rank, "start_s": 0.0, "microseconds": rows} for rank in range(ranks)]
    return {"bin_s": BIN_S, "phases": list(PHASES), "ranks": every, "records": [1] * 40}


def bench() -> dict[str, Any]:
    """With rows that cannot be drawn."""
    rows = [
        {"strategy": name, "ranks": ranks, "wall_s": 8 / ranks, "speed_up": ranks * 0.9, "efficiency": 0.9}
        for name in ("data", "<i>")
        for ranks in (4, 1, 2)
    ]
    return {"rows": [*rows, {"strategy": "tensor", "ranks": 3, "problem": "no"}, "?", {"ranks": "2", "speed_up": None}]}


class Outside(HTMLParser):
    """Whatever a page would fetch, and the tags that stay open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [name for name, _ in attributes if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing() -> None:
    text = page(timing(), "out/<run>", times(), bench())
    seen = Outside(text)
    assert (seen.links, seen.open) == ([], [])
    assert "url(" not in text
    assert "<script" not in text
    for raw in ("<b>&", "<i>", "<run>"):
        assert f">{raw}" not in text
    for words in ("&lt;b&gt;&amp;", "out/&lt;run&gt;", "&lt;i&gt;", *SECTIONS):
        assert words.replace("'", "&#x27;") in text
    for words in ("blocks 17 to 33", "bubble of 30%", "none sent", "prefers-color-scheme: dark", "3 MB", "p99"):
        assert words in text


@pytest.mark.parametrize("known", [(), ("times",), ("bench",)], ids=str)
def test_what_is_not_known_is_not_on_the_page(known: tuple[str, ...]) -> None:
    text = page(timing(), "run", times() if "times" in known else None, bench() if "bench" in known else None)
    assert ("What ranks did over time" in text) == ("times" in known)
    assert ("Scaling" in text) == ("bench" in known)
    assert "Scaling" in page(None, "laboratory", None, bench())


def test_bars_are_as_long_as_phases() -> None:
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drawings.bars(timing()))]
    assert len(widths) == 2 * len(PHASES)
    assert [width / widths[1] for width in widths[:5]] == pytest.approx([10, 1, 2, 3, 4], rel=0.01)


def test_ranks_over_time_are_drawn_as_they_were() -> None:
    """Steps of each phase over 40 columns: the first 20 are compute, the next 2 send wait, and so on."""
    drawn = drawings.gantt(timing(), times())
    paths = dict(re.findall(r'<path class="(\w+)" d="([^"]+)"><title>0 ', drawn))
    assert paths["compute"] == "M0 0H0V100H20V0H40V0Z"
    assert paths["send_wait"] == "M0 0H0V100H22V0H40V0Z"
    assert paths["overhead"] == "M0 0H0V100H40V0Z"
    assert "0 · node1: receive wait 2.00 s" in drawn


@pytest.mark.parametrize(
    ("hosts", "stages", "shards", "boxes"),
    [
        (["a"] * 4, 2, 1, 1),  # two replicas on a node
        (["a", "a", "b", "b"], 2, 1, 2),  # each on its own
        (["a", "b", "a", "b"], 2, 1, 4),  # both across two
        (["a"] * 4 + ["b"] * 4, 4, 2, 2),  # one across two
        (["a"], 1, 1, 1),
    ],
    ids=str,
)
def test_nodes_are_boxes_around_their_ranks(hosts: list[str], stages: int, shards: int, boxes: int) -> None:
    drawn = drawings.plan(timing(tuple(hosts), stages, shards))
    assert drawn.count('class="node"') == boxes
    assert drawn.count('class="rank"') == len(hosts)
    assert drawn.count('class="arrow"') == len(hosts) // shards // stages * (stages - 1)


def test_of_512_ranks_as_many_are_drawn_as_one_can_look_at() -> None:
    hosts = tuple(f"node{rank // 8}.site" for rank in range(512))
    whole = timing(hosts, 4, 2)
    whole["ranks"][77]["compute_s"] = 1.0
    text = page(whole, "run", times(512))
    shown, said = drawings.rows(whole["ranks"])
    assert len(shown) == drawings.MOST_ROWS
    assert shown[0].label == "node0 · 8 ranks"
    assert "77 · node9" in [row.label for row in shown]
    assert said in text
    assert "56 more replicas are not drawn" in text
    assert "<summary>512 ranks</summary>" in text
    assert len(text) < 10**6
    assert drawings.rows(whole["ranks"][:64])[1] == ""


def test_a_run_in_which_nothing_happened_has_a_page() -> None:
    """Resumed when all was done."""
    empty = timing(("a",), 1)
    for rank in empty["ranks"]:
        rank.update({f"{phase}_s": 0.0 for phase in PHASES}, bytes_sent=0)
    empty |= {"wall_s": 1e-5, "records": 0, "latency_s": None, "lost_ranks": [3]}
    empty["plan"]["layouts"][0]["ranks"] = [3]
    none = {"bin_s": 2.0**-10, "phases": list(PHASES), "records": []}
    nothing = {**none, "ranks": [{"rank": 0, "start_s": 0.0, "microseconds": [[] for _ in PHASES]}]}
    assert "left no account" in page(empty, "run", nothing)


def test_speed_ups_of_a_laboratory() -> None:
    points = [(1, pytest.approx(0.9)), (2, pytest.approx(1.8)), (4, pytest.approx(3.6))]
    assert speed_ups(bench()) == {"data": points, "<i>": points}
    assert speed_ups({}) == {}


def test_the_ideal_is_what_the_laboratory_says_it_is() -> None:
    """Its reference may have had two ranks, or as many cores as others."""
    rows: list[Any] = [{"ranks": ranks, "ideal": ranks / 2} for ranks in (8, 2, 4)]
    assert ideals({"rows": [*rows, {"ranks": 16, "problem": "no"}, "?"]}) == [(2, 1), (4, 2), (8, 4)]
    assert ideals({"rows": rows[:1]}) == [(0, 0), (8, 4)]
    assert ideals(bench()) == [(0, 0), (4, 4)]
    drawn = drawings.scaling({"data": [(2, 1.0), (8, 3.0)]}, ideals({"rows": rows}))
    (line,) = re.findall(r'class="ideal" d="M([^"]+)"', drawn)
    assert line.split("L")[0] == re.findall(r'class="line" [^>]*d="M([^"L]+)', drawn)[0]  # both are 1 at two ranks


def test_report_writes_the_page_beside_the_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "timing.json").write_text(json.dumps(timing()))
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text(encoding="utf-8") == page(timing(), str(run))
    (run / "timeline.json").write_text(json.dumps(times()))
    (tmp_path / "bench.json").write_text(json.dumps(bench()))
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text(encoding="utf-8") == page(timing(), str(run), times(), bench())


def test_plots_are_files_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name, tree in (("timing", timing()), ("timeline", times()), ("bench", bench())):
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    assert main(["report", str(tmp_path), "--plots"]) == 0
    for name in ("gantt", "ranks", "scaling"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_plots_name_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "timing.json").write_text(json.dumps(timing()))
    assert main(["report", str(tmp_path), "--plots"]) == 2
    assert "pip install 'mpinfer[plots]'" in capsys.readouterr().err


@pytest.mark.parametrize("held", [None, "{", "[]", '{"ranks": []}'])
def test_report_refuses_what_is_no_run(held: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if held is not None:
        (tmp_path / "timing.json").write_text(held)
    assert main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "timing.json" in line


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    if BROWSER is None:
        pytest.skip("no chromium: install it to look at the page in a browser")

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
        flags += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0"]
        command = [BROWSER, *flags, *options, f"file://{tmp_path / 'report.html'}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    (tmp_path / "report.html").write_text(page(timing(), "run", times(), bench()), encoding="utf-8")
    return run


def test_a_browser_finds_every_part(browse: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    shown = browse("--dump-dom")
    assert re.findall("<h2>(.*?)</h2>", shown.stdout) == [
        name + {"Load balance": ": seconds of computing"}.get(name, "") for name in SECTIONS
    ]
    for kind in ("plan", "gantt", "bars", "columns compute", "columns bytes", "progress", "scaling"):
        assert f'<svg class="{kind}"' in shown.stdout
    assert "CONSOLE" not in shown.stderr


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 500)])
def test_a_browser_draws_it(
    browse: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, scheme: str, width: int
) -> None:
    """The colours of the ground and of every phase are there, in as much room as they should take."""
    image = pytest.importorskip("PIL.Image")
    blink = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    browse(blink, f"--window-size={width},2600", f"--screenshot={tmp_path / 'shot.png'}")
    shot = image.open(tmp_path / "shot.png").convert("RGB")
    counts = {colour: count for count, colour in shot.getcolors(2**24)}
    light = {"ground": "f6f7f9", "compute": "2f7d5b", "receive_wait": "c44e52", "idle": "c3c9d3", "overhead": "7568b0"}
    dark = {"ground": "12161c", "compute": "4fb286", "receive_wait": "e07a7d", "idle": "4d5664", "overhead": "a398d8"}
    pixels = {name: counts.get(tuple(bytes.fromhex(code)), 0) for name, code in (light, dark)[scheme == "dark"].items()}
    assert shot.width == width
    assert pixels["ground"] > 20_000
    assert pixels["compute"] > pixels["overhead"] > pixels["receive_wait"] > width
    assert pixels["overhead"] == pytest.approx(2 * pixels["receive_wait"], rel=0.2)
