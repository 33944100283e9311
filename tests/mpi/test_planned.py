"""Layouts that the planner makes of ranks that differ, and of many ranks: results are those of any other layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Mpi, Tiny, assert_token_rule, complete_run, read_jsonl, write_jsonl

LINKS = {"inside": {"latency_us": 1, "gb_per_s": 10}, "between": {"latency_us": 5, "gb_per_s": 1}}


def described(path: Path, nodes: list[dict[str, Any]]) -> str:
    path.write_text(yaml.safe_dump({"nodes": nodes, "links": LINKS}))
    return f"parallel.cluster={path}"


def plan_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "timing.json").read_text())["plan"]


def test_a_large_node_alone_beside_two_small_ones_that_share_a_replica(mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    """The model fits the first rank's memory, and only the other two's together."""
    weights = sum(file.stat().st_size for file in tiny.model.glob("*.safetensors")) / 1e9
    nodes = [{"cores": 1, "memory_gb": 4 * weights, "speed": 2.0}]
    nodes += [{"cores": 1, "memory_gb": 1.2 * weights, "count": 2}]
    output = complete_run(mpi, 3, tiny.job, tmp_path / "out", described(tmp_path / "cluster.yaml", nodes))
    assert_token_rule(read_jsonl(output / "results.jsonl"), tiny.references)
    layouts = plan_of(output)["layouts"]
    assert [(layout["ranks"], layout["stages"]) for layout in layouts] == [([0], 1), ([1, 2], 2)]


def test_a_slow_rank_gets_a_small_stage(one_mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    nodes = [{"cores": 1, "memory_gb": 8, "speed": 4.0}, {"cores": 1, "memory_gb": 8, "speed": 1.0}]
    options = (described(tmp_path / "cluster.yaml", nodes), "parallel.stages=2")
    output = complete_run(one_mpi, 2, tiny.job, tmp_path / "out", *options)
    assert_token_rule(read_jsonl(output / "results.jsonl"), tiny.references)
    (start, cut, stop) = plan_of(output)["cuts"]
    assert cut - start > stop - cut


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [12, 64])
def test_many_ranks_on_a_few_cores(one_mpi: Mpi, tiny: Tiny, tmp_path: Path, ranks: int) -> None:
    records = [{**record, "id": number} for number, record in enumerate(read_jsonl(tiny.records) * 6)]
    path = write_jsonl(tmp_path / "records.jsonl", records)
    options = (f"input.path={path}", "parallel.stages=2")
    output = complete_run(one_mpi, ranks, tiny.job, tmp_path / "out", *options, timeout_s=600)
    assert_token_rule(read_jsonl(output / "results.jsonl"), tiny.references * 6)
    assert plan_of(output)["replicas"] == ranks // 2
