"""Weights that are made up: the same in every layout, of a model directory with nothing but `config.json`."""

import shutil
from pathlib import Path

import pytest
import torch

from mpinfer.errors import ModelError
from mpinfer.models.checkpoint import check_model
from mpinfer.models.decoder import DecoderSkeleton
from mpinfer.models.fake import fill
from mpinfer.models.sources import Slice
from mpinfer.spec import FAKE, ModelSpec, spec_from_dict


def made(name: str, shape: tuple[int, ...], part: Slice | None = None) -> torch.Tensor:
    target = torch.full(shape, torch.nan)
    fill(name, target, part)
    return target


@pytest.mark.parametrize(
    ("shape", "axis", "ranges"),
    [
        ((40, 24), 0, (range(3, 9), range(20, 22))),
        ((40, 24), 1, (range(5, 24),)),
        ((6, 8, 3, 3), 0, (range(2, 6),)),
        ((6, 8, 3, 3), 1, (range(1, 2), range(4, 8))),
        ((30,), 0, (range(7, 9),)),
    ],
)
def test_a_part_is_of_the_whole(shape: tuple[int, ...], axis: int, ranges: tuple[range, ...]) -> None:
    part = Slice(axis, ranges, shape)
    whole = made("layer.weight", shape)
    assert torch.equal(made("layer.weight", part.shape, part), part.of(whole))


def test_tensors_differ_and_are_of_full_rank() -> None:
    first, second = made("a.weight", (64, 64)), made("b.weight", (64, 64))
    assert not torch.equal(first, second)
    assert torch.linalg.matrix_rank(first) == 64
    assert float(first.std()) == pytest.approx(1 / 8, rel=0.2)


def test_what_normalizes_is_near_1_and_what_shifts_near_0() -> None:
    assert (made("norm.weight", (100,)) - 1).abs().max() < 0.1
    assert made("bn.running_var", (100,)).min() > 0
    assert made("norm.bias", (100,)).abs().max() < 0.1
    assert not made("position_ids", (3, 4)).isnan().any()
    count = torch.tensor(7)
    fill("bn.num_batches_tracked", count, None)
    assert count == 0


def only_config(directory: Path, to: Path) -> Path:
    to.mkdir()
    shutil.copy(directory / "config.json", to)
    return to


def test_a_decoder_needs_only_its_config(tiny_llama, tmp_path: Path) -> None:
    directory = only_config(tiny_llama[0], tmp_path / "model")
    assert check_model(ModelSpec(str(directory), weights=FAKE)) == "decoder"
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        check_model(ModelSpec(str(directory)))

    def part(start: int, stop: int, vocabulary: range):
        skeleton = DecoderSkeleton(directory, "float32", weights=FAKE)
        return skeleton.load_part(start, stop, "cpu", 4, lambda: None, vocabulary)

    real = DecoderSkeleton(tiny_llama[0], "float32")
    fake = DecoderSkeleton(directory, "float32", weights=FAKE)
    assert fake.summary(with_head=True) == real.summary(with_head=True)
    whole, half = part(0, 6, range(128)), part(0, 3, range(0))
    assert half.weight_bytes < whole.weight_bytes
    assert whole.read_bytes == 0
    weights = dict(whole.model.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in half.model.named_parameters() if name in weights)
    assert torch.equal(whole.model.get_input_embeddings().weight, half.model.get_input_embeddings().weight)


def test_a_program_has_its_own_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.weights=fake: is for a model directory or a factory, .* leave it out"):
        check_model(ModelSpec(str(tmp_path / "m.pt2"), weights=FAKE))


def test_fake_results_are_not_those_of_another_job() -> None:
    job = {"model": {"path": "m"}, "input": {"path": "i"}}
    assert spec_from_dict(job).fingerprint() != spec_from_dict(job, ["model.weights=fake"]).fingerprint()
