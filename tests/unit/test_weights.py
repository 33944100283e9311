"""The checkpoint index and the reader of a partition: damage is found before a weight is used."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpinfer.errors import ModelError
from mpinfer.models.checkpoint import Checkpoint, check_model_directory
from mpinfer.models.decoder import DecoderSkeleton
from mpinfer.models.weights import read_into


@pytest.fixture
def model_copy(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama[0], tmp_path / "model")


def shards(directory):
    return sorted(directory.glob("*.safetensors"))


def test_headers_agree_with_the_safetensors_library(tiny_llama):
    checkpoint = Checkpoint(tiny_llama[0])
    assert len(shards(tiny_llama[0])) > 1
    for file in shards(tiny_llama[0]):
        for name, expected in load_file(file).items():
            target = torch.empty_like(expected)
            assert read_into(checkpoint, name, target) == expected.nbytes
            assert torch.equal(target, expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_converted_while_loading(tmp_path, stored):
    values = torch.arange(12, dtype=torch.float32).view(3, 4)
    save_file({"w": values.to(stored)}, tmp_path / "model.safetensors")
    target = torch.empty(3, 4)
    assert read_into(Checkpoint(tmp_path), "w", target) == 12 * stored.itemsize
    assert torch.equal(target, values)


def load_whole(directory):
    DecoderSkeleton(directory, "float32").load_part(0, 6, "cpu", 4, lambda: None, range(128))


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop_one(directory):
    rewrite(shards(directory)[1], lambda tensors: tensors.pop(next(iter(tensors))))


def add_one(directory):
    rewrite(shards(directory)[0], lambda tensors: tensors.update(stray=torch.zeros(2)))


def reshape_one(directory):
    def change(tensors):
        name = next(name for name in tensors if "down_proj" in name)
        tensors[name] = tensors[name].t().contiguous()

    for file in shards(directory):
        if any("down_proj" in name for name in load_file(file)):
            rewrite(file, change)


def truncate(directory):
    file = shards(directory)[-1]
    file.write_bytes(file.read_bytes()[:-1])


def garbage(directory):
    shards(directory)[0].write_bytes(b"\xff" * 100)


def bomb(directory):
    shards(directory)[0].write_bytes((5000).to_bytes(8, "little") + b"[" * 5000)


def escape(directory):
    index = directory / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"]["x"] = "../other.safetensors"
    index.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_one, ["is missing from the safetensors files"]),
        (add_one, ["'stray'", "belongs to no part"]),
        (reshape_one, ["has shape", "config.json asks for"]),
        (truncate, ["truncated or damaged"]),
        (garbage, ["not a safetensors file"]),
        (bomb, ["not a safetensors file"]),
        (escape, ["outside the model directory"]),
        (lambda d: shards(d)[1].unlink(), ["named in the index but missing"]),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), ["not a safetensors index"]),
        (lambda d: (d / "config.json").write_text('{"model_type": "bloom"}'), ["no pipeline plan", "bloom"]),
        (lambda d: (d / "config.json").write_text('{"model_type": "nonsense"}'), ["transformers refuses it"]),
        (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), ["cannot be cut safely"]),
    ],
)
def test_damage_is_named(model_copy, damage, words):
    damage(model_copy)
    with pytest.raises(ModelError) as error:
        load_whole(model_copy)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_batch_dependent_rope_is_refused(model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (model_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'dynamic' depends on the longest sequence"):
        DecoderSkeleton(model_copy, "float32")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "nowhere", "no such directory"),
        (lambda p: p, "has no config.json"),
        (lambda p: (p / "config.json").write_text("{") and p, "not valid JSON"),
    ],
)
def test_first_look_at_a_directory(tmp_path, make, words):
    with pytest.raises(ModelError, match=words):
        check_model_directory(str(make(tmp_path)))
