"""The page of a run: what it shows, and that it needs nothing else."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mpinfer.cli import main
from mpinfer.observe.account import PHASES
from mpinfer.observe.page import bars, page


def timing() -> dict[str, Any]:
    """Of 1x2, with a host whose name must be escaped."""
    phases = {"send_wait_s": 1.0, "receive_wait_s": 2.0, "idle_s": 3.0, "overhead_s": 4.0}
    sizes = {"bytes_sent": 10**6, "weight_bytes": 10**6, "peak_memory_bytes": 10**9}
    ranks = [
        {
            "rank": rank,
            "host": host,
            "cores": [rank],
            "threads": 1,
            "halved_batches": 0,
            "compute_s": 10.0,
            **phases,
            **sizes,
        }
        | {"coordinates": {"replica": 0, "stage": rank, "shard": 0}}
        for rank, host in enumerate(("node1", "<b>&"))
    ]
    layout = {"stages": 2, "shards": 1, "cuts": [0, 17, 33], "ranks": [0, 1], "share": 1.0}
    figures = {"wall_s": 20.0, "predicted_wall_s": 19.0, "start_s": 1.0, "load_s": 1.0, "bubble": 0.3, "overlap": None}
    rates = {"records": 40, "records_per_s": 2.0, "all_tokens_per_s": 100.0, "imbalance": 0.0, "lost_ranks": []}
    return {**figures, **rates, "plan": {"layouts": [layout]}, "ranks": ranks}


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
    text = page(timing(), "out/<run>")
    seen = Outside(text)
    assert (seen.links, seen.open) == ([], [])
    assert "url(" not in text
    assert "<script" not in text
    assert "&lt;b&gt;&amp;" in text
    assert "out/&lt;run&gt;" in text
    assert "<b>" not in text
    for words in ("blocks 17 to 32", "bubble of 30%", "none sent", "prefers-color-scheme: dark"):
        assert words in text


def test_bars_are_as_long_as_phases() -> None:
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', bars(timing()))]
    assert len(widths) == 2 * len(PHASES)
    assert [width / widths[1] for width in widths[:5]] == pytest.approx([10, 1, 2, 3, 4], rel=0.01)


def test_report_writes_the_page_beside_the_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "timing.json").write_text(json.dumps(timing()))
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(timing(), str(tmp_path))


@pytest.mark.parametrize("held", [None, "{", "[]"])
def test_report_refuses_what_is_no_run(held: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if held is not None:
        (tmp_path / "timing.json").write_text(held)
    assert main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "timing.json" in line
