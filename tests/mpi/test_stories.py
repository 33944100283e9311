"""Models of every kind, cut and run: the same results as plain torch in one process, under every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness import REPO, Mpi, complete_run, read_jsonl
from tests.stories import STORIES, small_story

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]  # replicas x stages
RELATIVE = 1e-5  # of the largest number of a record's output


@pytest.fixture(scope="module", params=STORIES)
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_story(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}x{layout[1]}")
def test_every_layout_gives_what_plain_torch_gives(
    mpi: Mpi, story: Any, layout: tuple[int, int], tmp_path: Path
) -> None:
    job, reference = story
    replicas, stages = layout
    overrides = [f"parallel.replicas={replicas}", f"parallel.stages={stages}"]
    output = complete_run(mpi, replicas * stages, job, tmp_path / "out", *overrides, cwd=REPO)
    results = read_jsonl(output / "results.jsonl")
    assert [result["id"] for result in results] == list(reference)
    for result in results:
        assert_same(result["output"], reference[result["id"]], output)


def assert_same(found: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name == "label":
            assert found[name] == value
        elif name == "top":
            assert [label for label, _ in found[name]] == [label for label, _ in value]
            # A relative error of a logit is an absolute one of the score's logarithm; logits of this net reach 10.
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
