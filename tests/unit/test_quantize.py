"""Int8 layers: close to float32, independent of the batch, and small."""

import gc

import pytest
import torch
from torch import nn

from mpinfer.errors import ModelError, SpecError
from mpinfer.models import quantize
from mpinfer.models.decoder import DecoderSkeleton
from mpinfer.models.quantize import Int8Embedding, Int8Linear
from mpinfer.spec import spec_from_dict


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(1024, 160).requires_grad_(False)


def inputs():
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    x[::2, 5] = 300.0  # rows with an outlier
    return x


def test_linear_is_close_to_float_with_and_without_outliers(layer):
    x = inputs()
    x[:, 5] = 0.0
    ordinary = layer(x)
    with_outliers = Int8Linear(layer)(inputs()) - (layer(inputs()) - ordinary)
    limit = 0.02 * ordinary.norm(dim=1)
    assert ((Int8Linear(layer)(x) - ordinary).norm(dim=1) < limit).all()
    # The outlier's own weight is rounded, too: that error grows with the outlier and is taken off here.
    rounded = Int8Embedding(nn.Embedding.from_pretrained(layer.weight))(torch.arange(160))[:, 5] - layer.weight[:, 5]
    assert ((with_outliers - inputs()[:, 5:6] * rounded - ordinary).norm(dim=1) < limit).all()


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
    part = DecoderSkeleton(tiny_llama[0], "float32", "int8").load_part(0, 6, "cpu", 4, lambda: None)
    assert set(part.kernels) == {"int8"}
    columns = sum(1 for m in part.model.modules() if isinstance(m, Int8Embedding))  # scales [entries, 1]
    assert matrices() - before <= columns
    held = sum(p.nbytes for m in tiny_llama[1].modules() for p in m.parameters(recurse=False))  # tied ones twice
    assert part.weight_bytes < 0.35 * held  # scales weigh more in a tiny model


def test_refusals(layer, monkeypatch):
    with pytest.raises(SpecError, match=r"model.dtype='bfloat16'.*use float32"):
        spec_from_dict({"model": {"path": "m", "dtype": "bfloat16", "quantize": "int8"}, "input": {"path": "i"}})
    monkeypatch.setattr(quantize.torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ModelError, match="needs a CPU with AVX-512 VNNI"):
        Int8Linear(layer)
