"""The jobs that layouts.py, uneven.py and shard_latency.py run: SmolLM2, and EfficientNet on images in memory."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models import RECORDS

Shape = tuple[int, int, int]  # replicas, stages, shards

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600

SECTIONS: dict[str, dict[str, Any]] = {
    "smollm2": {"model": {"path": "models/smollm2-135m"}, "generate": {"max_new_tokens": 64}},
    "efficientnet": {
        "model": {"path": "benchmarks.models:efficientnet", "task": "forward"},
        "input": {"path": "benchmarks.models:efficientnet_records"},
        "output": {"arrays": "npy"},
    },
}


def write_job(name: str, records: int, directory: Path) -> Path:
    """The job file of `name`; SmolLM2's prompts are those of jobs/, as often as they are needed."""
    sections = dict(SECTIONS[name])
    if name == "smollm2":
        prompts = [json.loads(line) for line in (ROOT / "jobs/data/prompts.jsonl").read_text().splitlines()]
        lines = [{**prompts[number % len(prompts)], "id": number} for number in range(records)]
        path = directory / "prompts.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sections["input"] = {"path": str(path)}
    job = directory / f"{name}.yaml"
    job.write_text(json.dumps(sections))  # JSON is YAML
    return job


def run(
    job: Path,
    shape: Shape,
    records: int,
    output: Path,
    given: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The timing.json of a job run in a layout, with more settings and environment if need be."""
    keys = ("parallel.replicas", "parallel.stages", "parallel.shards")
    values = settings({**dict(zip(keys, shape, strict=True)), **(given or {})})
    ranks = shape[0] * shape[1] * shape[2]
    mpinfer(["launch", "-n", str(ranks), str(job), "--output", str(output), *values], records, environ)
    return json.loads((output / "timing.json").read_text())


def mpinfer(arguments: Sequence[str], records: int, environ: Mapping[str, str] | None = None) -> str:
    """What `mpinfer` prints, on both streams; ends the benchmark when it fails."""
    return call([sys.executable, "-m", "mpinfer", *arguments], records, environ)


def call(command: Sequence[str], records: int, environ: Mapping[str, str] | None = None) -> str:
    environment = {**os.environ, **(environ or {}), RECORDS: str(records)}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def settings(values: Mapping[str, Any]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
