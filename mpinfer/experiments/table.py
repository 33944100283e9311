"""The table of a laboratory: text for a terminal, Markdown for a document, both from `bench.json`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    head: str
    cell: Callable[[Row], str]
    is_text: bool = False  # else a number, which stands to the right


COLUMNS = (
    Column("strategy", lambda row: row["strategy"], is_text=True),
    Column("ranks", lambda row: str(row["ranks"])),
    Column("layout", lambda row: row["layout"], is_text=True),
    Column("wall (lowest..highest)", lambda row: _walls(row)),
    Column("records/s", lambda row: f"{row['records_per_s']:.3g}"),
    Column("tokens/s", lambda row: f"{row['tokens_per_s']:.1f}" if row["tokens_per_s"] else "-"),
    Column("speed-up", lambda row: f"{row['speed_up']:.2f}"),
    Column("ideal", lambda row: f"{row['ideal']:.3g}"),
    Column("efficiency", lambda row: f"{row['efficiency']:.0%}"),
    Column("bubble", lambda row: f"{row['bubble']:.0%}"),
    Column("overlap", lambda row: "-" if row["overlap"] is None else f"{row['overlap']:.0%}"),
    Column("imbalance", lambda row: f"{row['imbalance']:.0%}"),
    Column("peak a rank", lambda row: f"{row['peak_memory_bytes'] / 1e6:.0f} MB"),
    Column("load", lambda row: f"{row['load_s']:.2f} s"),
    Column("sent", lambda row: f"{row['bytes_sent'] / 1e6:.1f} MB"),
    Column("predicted", lambda row: f"{row['predicted_wall_s']:.2f} s ({row['prediction_error']:+.0%})"),
    Column("outputs", lambda row: outputs(row), is_text=True),
)


def as_text(report: dict[str, Any]) -> str:
    rows = _started(report)
    cells = [[column.head for column in COLUMNS], *(_cells(row) for row in rows if row["status"] == "complete")]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    complete = iter(cells[1:])
    for row in (None, *rows):
        if row is None or row["status"] == "complete":
            padded = zip(COLUMNS, cells[0] if row is None else next(complete), widths, strict=True)
            lines.append("  ".join(f"{cell:<{w}}" if c.is_text else f"{cell:>{w}}" for c, cell, w in padded).rstrip())
        else:
            lines.append(
                f"{row['strategy']:<{widths[0]}}  {row['ranks']:>{widths[1]}}  {row['status']}: {row['problem']}"
            )
    return "\n".join([*lines, *_notes(report)])


def as_markdown(report: dict[str, Any]) -> str:
    """The table with a title, the machine and the notes."""
    lines = [
        _line(column.head for column in COLUMNS),
        _line("---" if column.is_text else "---:" for column in COLUMNS),
    ]
    for row in _started(report):
        if row["status"] == "complete":
            lines.append(_line(_cells(row)))
        else:
            empty = [""] * (len(COLUMNS) - 3)
            lines.append(_line([row["strategy"], str(row["ranks"]), *empty, f"{row['status']}: {row['problem']}"]))
    notes = "\n".join(f"- {note}" for note in _notes(report))
    return f"`{report['command']}`, {report['date']}, {machine(report)}.\n\n" + "\n".join(lines) + f"\n\n{notes}\n"


def machine(report: dict[str, Any]) -> str:
    """In words."""
    facts = report["machine"]
    hosts = "" if facts["hosts"] == 1 else f"{facts['hosts']} nodes, the driver's: "
    software = [f"{name} {facts[key]}" for name, key in (("torch", "torch"), ("mpinfer", "mpinfer")) if key in facts]
    memory = f"{facts['memory_bytes'] / 1e9:.0f} GB"
    return ", ".join([f"{hosts}{facts['cpu']}", f"{facts['cores']} cores", memory, *_mpi(facts), *software])


def outputs(row: Row) -> str:
    """How results compare with the reference's."""
    match row.get("verdict"):
        case None:
            return "not compared"
        case "reference" | "identical" as verdict:
            return str(verdict)
        case "within":
            return f"within the bound ({_difference(row)})"
        case "differs":
            return f"DIFFERS ({_difference(row)})"
    return f"lossy: {_difference(row)}"


def _difference(row: Row) -> str:
    parts = []
    if row["same_tokens"] is not None:
        parts.append(f"{row['same_records']:.0%} of records and {row['same_tokens']:.1%} of tokens the same")
    if row["same_labels"] is not None:
        parts.append(f"{row['same_labels']:.1%} of labels the same")
    if row["largest_error"] is not None:
        parts.append(f"largest error {row['largest_error']:.1e}")
    if row["perplexity"] is not None:
        parts.append(f"perplexity {row['perplexity']:.3f} for {row['reference_perplexity']:.3f}")
    return ", ".join(parts) or "results of other shapes"


def _started(report: dict[str, Any]) -> list[Row]:
    """Rows of the table; of what was skipped a note will do."""
    return [row for row in report["rows"] if row["status"] != "skipped"]


def _notes(report: dict[str, Any]) -> list[str]:
    rows = [row for row in report["rows"] if row["status"] == "complete"]
    bounds = report["bounds"]
    base = next((row for row in rows if row["strategy"] == report["reference"]), None)
    notes = []
    if base is not None:
        records = f"{base['records']} records" if report["scaling"] == "strong" else "as many records for each rank"
        rounds = "one round" if report["repeats"] == 1 else f"medians of {report['repeats']} interleaved rounds"
        notes.append(
            f"{report['scaling']} scaling, {records}, {rounds}; speed-up in "
            f"records/s over {base['strategy']} on {_count(base['ranks'], 'rank')} ({_count(base['cores'], 'core')})"
        )
        notes.append(f"no figure but load has in it: {report['excluded']}")
        crowded = sorted({row["ranks"] for row in rows if row["ranks"] > row["cores"]})
        if crowded:
            numbers = ", ".join(map(str, crowded))
            cores = max(row["cores"] for row in rows if row["ranks"] in crowded)
            notes.append(f"{numbers} ranks share {_count(cores, 'core')}: the ideal is what the cores can do")
        notes.append(
            f"outputs beside {base['strategy']}: the bound for another order of sums is an error of "
            f"{bounds['error']:g} of the largest number, and for tokens a tie within {bounds['tie']:g} of "
            "log-probability"
        )
    for row in rows:
        if row["same_runs_as"]:
            notes.append(
                f"{row['strategy']} on {row['ranks']}: the same settings as {row['same_runs_as']}, one set of runs"
            )
        if row["problem"]:
            notes.append(
                f"{row['strategy']} on {row['ranks']}: {row['runs']} of {report['repeats']} runs: {row['problem']}"
            )
        if row["failed_records"]:
            notes.append(f"{row['strategy']} on {row['ranks']}: {row['failed_records']} records failed")
    skipped: dict[tuple[int, str], list[str]] = {}
    for row in report["rows"]:
        if row["status"] == "skipped":
            skipped.setdefault((row["ranks"], row["problem"]), []).append(row["strategy"])
    notes += [f"{', '.join(names)} on {ranks}: skipped: {why}" for (ranks, why), names in skipped.items()]
    if report["fake_weights"]:
        notes.append("weights are fake: speed and memory are those of a real model, results mean nothing")
    return notes


def _walls(row: Row) -> str:
    spread = f" ({row['wall_lowest_s']:.2f}..{row['wall_highest_s']:.2f})" if row["runs"] > 1 else ""
    return f"{row['wall_s']:.2f} s{spread}"


def _cells(row: Row) -> list[str]:
    return [column.cell(row) for column in COLUMNS]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _mpi(facts: dict[str, Any]) -> list[str]:
    """The library's first words: some give a paragraph."""
    return [facts["mpi"].split(",")[0].strip()] if "mpi" in facts else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
