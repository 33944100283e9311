"""mpinfer inside a Python program that `mpirun` starts: every rank calls `run`, and rank 0 has the results."""

import copy
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpinfer.errors import ExitCode, InputError, MpinferError, SpecError
from mpinfer.job import run_within
from mpinfer.records.files import RESULTS
from mpinfer.spec import JobSpec, read_mapping, spec_from_dict

Record = Mapping[str, Any]
Results = list[dict[str, Any]]


def run(
    spec: Mapping[str, Any] | str | Path, records: Iterable[Record] | None = None, *, resume: bool = False
) -> Results | None:
    """Run a job on all ranks of the world; every rank calls this at the same point of its program.

    `spec` is the content of a job file, or its path; `records` take the place of the job's input. Both count on rank 0
    alone. Without `output.path` the files of the run are gone afterwards, and arrays are in the results.

    Returns on rank 0 what `results.jsonl` has, a dict a record in their order: `index`, `id`, and `output` or
    `error`; on other ranks None. Raises `MpinferError`, the same one on every rank.
    """
    results: Results | None = None
    with tempfile.TemporaryDirectory(prefix="mpinfer-") as scratch:
        paths: list[Path] = []  # of the results, on rank 0

        def read_spec() -> JobSpec:
            job = _job(spec, records, Path(scratch))
            paths.append(Path(job.output.path, RESULTS))
            return job

        code = run_within(read_spec, resume)
        if code is ExitCode.INTERRUPTED:
            raise MpinferError("the run was told to stop: some records are not done; run it again with resume=True")
        for path in paths:
            with path.open(encoding="utf-8") as lines:
                results = [json.loads(line) for line in lines]
    return results


def _job(spec: Mapping[str, Any] | str | Path, records: Iterable[Record] | None, scratch: Path) -> JobSpec:
    tree = read_mapping(spec, "job file", "model") if isinstance(spec, str | Path) else copy.deepcopy(dict(spec))
    overrides = []
    if records is not None:
        path = _write(records, scratch / "records.jsonl")
        overrides += [f"input.path={json.dumps(str(path))}", "input.format=jsonl"]
    if "path" not in (tree.get("output") or {}):
        if (tree.get("output") or {}).get("arrays") == "npy":
            raise SpecError("output.arrays='npy': its files would go with the run's; give output.path, too")
        tree["output"] = {**(tree.get("output") or {}), "path": str(scratch / "out"), "arrays": "inline"}
    return spec_from_dict(tree, overrides)


def _write(records: Iterable[Record], path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number, record in enumerate(records):
            try:
                file.write(json.dumps(dict(record)) + "\n")
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"record {number}: is no dict that JSON can hold ({error}); give plain values"
                ) from None
    return path


@dataclass(frozen=True)
class Pipeline:
    """A model and how to run it, to be called with records. Each call is a run, which loads the model anew."""

    spec: Mapping[str, Any]

    @classmethod
    def from_pretrained(cls, path: str | Path, **sections: Mapping[str, Any]) -> "Pipeline":
        """Of a model's path, as `model.path` has it, and other sections of a job file:
        `from_pretrained("models/m", generate={"max_new_tokens": 8}, model={"dtype": "bfloat16"})`."""
        return cls({**sections, "model": {**sections.get("model", {}), "path": str(path)}})

    def __call__(self, records: Iterable[Record]) -> Results | None:
        """The outputs of `records`, on rank 0, in order, as `run` returns them."""
        return run(self.spec, records)
