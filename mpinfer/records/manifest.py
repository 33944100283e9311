"""The end of a run: the ordered results, the manifest that says they are complete, and the check of both."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mpinfer.errors import OutputError
from mpinfer.records.files import JOURNAL, MANIFEST, RESULTS, output_errors, read_manifest, write_atomically
from mpinfer.records.journal import Journal, read_progress
from mpinfer.records.shards import named_files, remove_others
from mpinfer.records.unique import Names

_MOST_PROBLEMS = 20  # that are told one by one


@dataclass
class Verdict:
    """What the files of an output directory prove."""

    complete: bool = False
    records: int = 0  # results in results.jsonl, or in the journal as long as there is no manifest
    failed: int = 0  # how many of them are errors
    problems: list[str] = field(default_factory=list)  # a sentence each


def merge(directory: Path, journal: Journal, total: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Write results.jsonl in input order, then manifest.json; returns the manifest.

    `facts` are the caller's own entries of the manifest, `spec_fingerprint` and `versions` among them. They
    cannot replace an entry that is computed here. The journal must still be open. Raises `OutputError` when
    a record from 0 to `total` - 1 has no result or a file cannot be written.
    """
    directory = Path(directory)
    missing = total - len(journal.done)
    if missing:
        first = next(index for index in range(total) if index not in journal.done)
        raise OutputError(
            f"{directory}: {missing} of {total} records have no result, record {first} is the first; "
            "run again with --resume"
        )
    digest = hashlib.sha256()
    results_bytes = 0
    arrays: set[str] = set()

    def lines() -> Iterator[bytes]:
        nonlocal results_bytes
        for result in journal.results_in_order():
            line = result + b"\n"
            digest.update(line)
            results_bytes += len(line)
            arrays.update(named_files(result))
            yield line

    write_atomically(directory / RESULTS, lines())
    remove_others(directory, arrays)
    arrays_bytes = {name: _size_bytes(directory / name) for name in sorted(arrays)}
    manifest = {
        **facts,
        "complete": True,
        "records": total,
        "succeeded": total - journal.errors,
        "failed": journal.errors,
        "results_sha256": digest.hexdigest(),
        "results_bytes": results_bytes,
        "arrays_bytes": arrays_bytes,
        "input_sha256": journal.input_sha256,
        "identity": journal.identity,
    }
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
    return manifest


def _size_bytes(path: Path) -> int:
    with output_errors(path):
        return path.stat().st_size


def verify(directory: Path) -> Verdict:
    """Judge a run by its files alone: whether every record has its result, and the results are unchanged.

    Never writes, never locks, never raises for what it finds: that goes to `problems`.
    """
    directory = Path(directory)
    verdict = Verdict()
    try:
        if not directory.is_dir():
            verdict.problems.append(f"{directory} is not a directory; give the output.path of a run.")
        elif not (directory / MANIFEST).exists():
            _judge_journal(directory, verdict)
        else:
            _judge_results(directory, verdict)
    except OSError as error:
        verdict.problems.append(f"{directory} cannot be read ({error.strerror or error}).")
    verdict.complete = not verdict.problems
    excess = len(verdict.problems) - _MOST_PROBLEMS
    if excess > 0:
        verdict.problems[_MOST_PROBLEMS:] = [f"There are {excess} more problems."]
    return verdict


def _judge_journal(directory: Path, verdict: Verdict) -> None:
    progress = read_progress(directory)
    if progress is None:
        verdict.problems.append(f"{directory} holds neither a {MANIFEST} nor a {JOURNAL}; no run began here.")
        return
    verdict.records, verdict.failed = progress.results, progress.failed
    verdict.problems.append(
        f"The run is not complete: there is no {MANIFEST}, and the journal holds {progress.results} of "
        f"{progress.total} results; continue it with --resume."
    )


def _judge_results(directory: Path, verdict: Verdict) -> None:
    manifest = read_manifest(directory)
    if manifest is None:
        verdict.problems.append(f"{MANIFEST} is damaged: it is not a readable JSON object.")
        return
    if manifest.get("complete") is not True:
        verdict.problems.append(f"{MANIFEST} does not say that the run is complete; continue it with --resume.")
    if not (directory / RESULTS).is_file():
        verdict.problems.append(f"{RESULTS} is missing.")
        return

    _judge_arrays(directory, manifest, verdict)
    digest = hashlib.sha256()
    results_bytes = 0
    names = Names()
    with (directory / RESULTS).open("rb") as file:
        for index, line in enumerate(file):
            digest.update(line)
            results_bytes += len(line)
            verdict.records += 1
            name = _judge_line(index, line, verdict)
            names.add((index,) if name is None else name)  # which is nobody's id
        _judge_suspects(file, set(names.suspects()), verdict)
    for key, found in {
        "results_bytes": results_bytes,
        "results_sha256": digest.hexdigest(),
        "records": verdict.records,
        "failed": verdict.failed,
        "succeeded": verdict.records - verdict.failed,
    }.items():
        if manifest.get(key) != found:
            verdict.problems.append(
                f"{RESULTS} does not agree with {MANIFEST}: {key} is {found}, not {manifest.get(key)}."
            )


def _judge_arrays(directory: Path, manifest: dict[str, Any], verdict: Verdict) -> None:
    """Judge the files of arrays that the results name, by their sizes."""
    sizes = manifest.get("arrays_bytes", {})
    if not isinstance(sizes, dict):
        verdict.problems.append(f"{MANIFEST} is damaged: its arrays_bytes is not an object.")
        return
    for name, size_bytes in sizes.items():
        try:
            found = (directory / name).stat().st_size
        except (OSError, ValueError):
            verdict.problems.append(f"{name} is missing, and results name it.")
            continue
        if found != size_bytes:
            verdict.problems.append(f"{name} has {found} bytes, not {size_bytes}.")


def _judge_line(index: int, line: bytes, verdict: Verdict) -> str | int | None:
    """Judge line `index` (from 0) of the results; its id, if it has one."""
    where = f"Line {index + 1} of {RESULTS}"
    try:
        result = json.loads(line.decode())
    except (ValueError, RecursionError):
        verdict.problems.append(f"{where} is not JSON.")
        return None
    if not isinstance(result, dict):
        verdict.problems.append(f"{where} is not a JSON object.")
        return None
    if result.get("index") != index:
        verdict.problems.append(f"{where} has index {result.get('index')}, not {index}.")
    if ("output" in result) == ("error" in result):
        verdict.problems.append(f"{where} has not exactly one of output and error.")
    verdict.failed += "error" in result
    name = result.get("id")
    if not isinstance(name, str | int):
        verdict.problems.append(f"{where} has no id.")
        return None
    return name


def _judge_suspects(file: BinaryIO, suspects: set[int], verdict: Verdict) -> None:
    """Judge those lines whose id another may have."""
    file.seek(0)
    seen: set[str | int] = set()
    for index, line in enumerate(file if suspects else ()):
        if index in suspects:
            name = json.loads(line)["id"]
            if name in seen:
                verdict.problems.append(f"Line {index + 1} of {RESULTS} repeats the id {name!r} of an earlier line.")
            seen.add(name)
