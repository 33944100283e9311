"""Models of every kind, cut and run: the same results as plain torch in one process, under every layout."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from harness import REPO, Mpi, complete_run, find_mpis, read_jsonl
from stories import STORIES, Reference, missing, reference, small_story

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 3, 1)]  # replicas x stages x shards
ENCODERS = ["embed_sentences"]  # those that shards divide
BY_DEFAULT = [("mpich", (2, 2, 1), "embed_sentences"), ("openmpi", (2, 2, 1), "classify_images")]
RELATIVE = 1e-5  # of the largest number of a record's output


@pytest.fixture(scope="module", params=STORIES)
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return request.param, *small_story(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_every_layout_gives_what_plain_torch_gives(
    mpi: Mpi, story: Any, layout: tuple[int, int, int], tmp_path: Path, sample: Callable[[bool], None]
) -> None:
    name, job, wanted = story
    sample((mpi.name, layout, name) in BY_DEFAULT)
    run_and_compare(mpi, job, wanted, layout, tmp_path / "out")


@pytest.mark.parametrize("layout", [(1, 1, 2), (1, 2, 2)], ids=lambda layout: "x".join(map(str, layout)))
@pytest.mark.parametrize("name", ENCODERS)
def test_shards_give_what_plain_torch_gives(
    mpi: Mpi, name: str, layout: tuple[int, int, int], tmp_path: Path, sample: Callable[[bool], None]
) -> None:
    sample((mpi.name, layout) == ("openmpi", (1, 2, 2)))
    run_and_compare(mpi, *small_story(name, tmp_path), layout, tmp_path / "out")


@pytest.mark.parametrize("story", STORIES)
def test_the_jobs_of_the_repository_run_as_they_are(one_mpi: Mpi, story: str, tmp_path: Path) -> None:
    make_what_is_missing(story)
    run_and_compare(one_mpi, REPO / "jobs" / f"{story}.yaml", reference(story), None, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
@pytest.mark.parametrize("story", STORIES)
def test_real_models_under_every_layout(mpi: Mpi, story: str, layout: tuple[int, int, int], tmp_path: Path) -> None:
    make_what_is_missing(story)
    run_and_compare(mpi, REPO / "jobs" / f"{story}.yaml", reference(story), layout, tmp_path / "out")


def test_chelsea_is_a_cat(one_mpi: Mpi, tmp_path: Path) -> None:
    make_what_is_missing("classify_images")
    overrides = ["parallel.replicas=1", "parallel.stages=1"]
    job = REPO / "jobs" / "classify_images.yaml"
    output = complete_run(one_mpi, None, job, tmp_path / "out", *overrides, cwd=REPO)
    labels = {result["id"]: result["output"]["label"] for result in read_jsonl(output / "results.jsonl")}
    assert "cat" in labels["chelsea.jpg"]


def make_what_is_missing(story: str) -> None:
    """By the commands that stand at the beginning of the job file; weights of the world are fetched before."""
    environment = {**os.environ, "PATH": f"{find_mpis()[0].bin_dir}:{os.environ['PATH']}"}
    for line in (REPO / "jobs" / f"{story}.yaml").read_text(encoding="utf-8").splitlines():
        if missing(story) and line.startswith("#   .venv/bin/python "):
            command = ["python", *line.split()[2:]]
            subprocess.run(command, cwd=REPO, env=environment, check=True, timeout=120)
    if missing(story):
        assert "MPINFER_STORIES" not in os.environ, f"{missing(story)} should have been fetched"
        pytest.skip(f"no {', '.join(missing(story))}: run the command at the beginning of jobs/{story}.yaml")


def run_and_compare(
    mpi: Mpi, job: Path, wanted: Reference, layout: tuple[int, int, int] | None, directory: Path
) -> None:
    """`layout`: replicas x stages x shards; None: the job's own."""
    given = yaml.safe_load(job.read_text(encoding="utf-8")).get("parallel", {})
    replicas, stages, shards = layout or (given["replicas"], given["stages"], 1)
    overrides = [f"parallel.replicas={replicas}", f"parallel.stages={stages}", f"parallel.shards={shards}"]
    output = complete_run(mpi, replicas * stages * shards, job, directory, *overrides, cwd=REPO)
    results = read_jsonl(output / "results.jsonl")
    assert [result["id"] for result in results] == list(wanted)
    for result in results:
        assert_same(result["output"], wanted[result["id"]], output)


def assert_same(found: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name == "label":
            assert found[name] == value
        elif name == "top":
            assert [label for label, _ in found[name]] == [label for label, _ in value]
            # A relative error of a logit is an absolute one of the score's logarithm; logits reach 10.
            scores = np.log([[score for _, score in scores] for scores in (found[name], value)])
            assert np.abs(scores[0] - scores[1]).max() <= 10 * RELATIVE
        elif name == "score":
            assert found[name] == found["top"][0][1]
        else:
            array = np.asarray(read_array(found[name], output))
            assert array.shape == np.shape(value)
            assert np.abs(array - value).max() <= RELATIVE * np.abs(value).max()


def read_array(place: Any, output: Path) -> Any:
    """An output that stands in the results, or in the file that they name."""
    return np.load(output / place["file"])[place["row"]] if isinstance(place, dict) else place
