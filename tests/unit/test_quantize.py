"""Int8 layers: close to float32, independent of the batch, and small."""

import gc

import pytest
import torch
from torch import nn

from mpinfer.errors import ModelError, SpecError
from mpinfer.models.decoder import DecoderSkeleton
from mpinfer.models.quantize import Int8Embedding, Int8Linear, quantize_rows
from mpinfer.spec import spec_from_dict


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(1024, 160).requires_grad_(False)


def inputs():
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    x[::2, 5] = 60.0  # rows with an outlier
    return x


def error(y, reference):
    """Of each row, against its length."""
    return (y - reference).norm(dim=1) / reference.norm(dim=1)


@pytest.mark.parametrize("vnni", [True, False])
def test_linear_is_close_to_float(layer, vnni, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: vnni)
    layer.bias[:] = 1.0
    x = torch.randn(64, 1024)
    assert error(Int8Linear(layer)(x), layer(x)).max() < (0.013 if vnni else 0.02)


def test_outliers_cost_little(layer):
    """Against the same weights and rows with one scale each, without rotation."""
    x = inputs()[::2]
    codes, scales = quantize_rows(layer.weight)
    steps = x.abs().amax(1, keepdim=True) / 127
    naive = ((x / steps).round() @ codes.float().T) * steps * scales + layer.bias
    assert (error(Int8Linear(layer)(x), layer(x)) < 0.5 * error(naive, layer(x))).all()


@pytest.mark.parametrize("features", [24, 7])
def test_any_width_can_be_rotated(features):
    layer = nn.Linear(features, 5).requires_grad_(False)
    x = torch.randn(3, features)
    assert error(Int8Linear(layer)(x), layer(x)).max() < 0.05


def test_a_row_does_not_depend_on_its_batch(layer):
    int8, x = Int8Linear(layer), inputs()
    together = int8(x)
    for row in range(len(x)):
        assert torch.equal(int8(x[row : row + 1])[0], together[row])


def test_embedding_is_within_half_a_step():
    table = nn.Embedding(50, 24).requires_grad_(False)
    ids = torch.tensor([[3, 0, 49]])
    step = table.weight.abs().amax(1)[ids][..., None] / 127
    assert ((Int8Embedding(table)(ids) - table(ids)).abs() <= step * 0.501).all()


def test_a_loaded_model_holds_a_third_and_no_float_matrix(tiny_llama):
    def matrices():
        gc.collect()
        found = (o for o in gc.get_objects() if isinstance(o, torch.Tensor))
        return sum(1 for t in found if t.device.type == "cpu" and t.dtype == torch.float32 and t.dim() > 1)

    before = matrices()
    part = DecoderSkeleton(tiny_llama[0], "float32", "int8").load_part(0, 6, "cpu", 4, lambda: None, range(128))
    assert sum(count for kernel, count in part.used.items() if "int8" in kernel) == 18
    assert not {"onednn", "torch"} & set(part.used)
    columns = sum(1 for m in part.model.modules() if isinstance(m, Int8Embedding))  # scales [entries, 1]
    rotations = len({m.in_features & -m.in_features for m in tiny_llama[1].modules() if isinstance(m, nn.Linear)})
    assert matrices() - before <= columns + rotations
    held = sum(p.nbytes for m in tiny_llama[1].modules() for p in m.parameters(recurse=False))  # tied ones twice
    assert part.weight_bytes < 0.35 * held  # scales weigh more in a tiny model


def test_refusals(layer):
    with pytest.raises(SpecError, match=r"model.dtype='bfloat16'.*use float32"):
        spec_from_dict({"model": {"path": "m", "dtype": "bfloat16", "quantize": "int8"}, "input": {"path": "i"}})
    with pytest.raises(ModelError, match="'int8' on meta: needs a CPU"):
        Int8Linear(layer.to("meta"))
