"""What encoders.py measures: two models as chains of pieces, and the records for them. Random weights, always the same.

`encoder` and `efficientnet` are factories for `model.path`, `encoder_records` and `efficientnet_records` for
`input.path`. A model is an `nn.Sequential` whose slices compute what lies between two cuts.
"""

import os
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

BATCH = 8  # records of a micro-batch, and as many different ones there are
STEP = 8  # micro-batches of a step of torch's pipelining
RECORDS = "MPINFER_BENCHMARK_RECORDS"  # environment variable: how many records a dataset has
_LAYERS, _HIDDEN, _HEADS, _WIDE = 12, 512, 8, 2048
_TOKENS, _WORDS = 64, 8192
_IMAGE = 224  # pixels of a side
_SEED = 5


def encoder() -> nn.Sequential:
    """A transformer encoder: token ids [batch, 64] to vectors [batch, 512], the mean over the tokens."""
    torch.manual_seed(_SEED)
    layers = [(f"layer{number}", _Layer()) for number in range(_LAYERS)]
    return nn.Sequential(OrderedDict([("embed", _Embed()), *layers, ("mean", _Mean())])).eval()


def efficientnet() -> nn.Sequential:
    """EfficientNet-Lite0 of jobs/: images [batch, 3, 224, 224] to logits [batch, 1000]."""
    from jobs.efficientnet import EfficientNetLite0  # not to be found by encoders.py, nor needed

    torch.manual_seed(_SEED)
    model = EfficientNetLite0()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # torch's own choice makes signals vanish over so many layers
    stem = nn.Sequential(model._conv_stem, model._bn0, nn.ReLU6())
    blocks = [(f"block{number}", block) for number, block in enumerate(model._blocks)]
    head = nn.Sequential(model._conv_head, model._bn1, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model._fc)
    return nn.Sequential(OrderedDict([("stem", stem), *blocks, ("head", head)])).eval()


def encoder_batch() -> torch.Tensor:
    """Token ids [8, 64]."""
    return torch.randint(0, _WORDS, (BATCH, _TOKENS), generator=torch.Generator().manual_seed(_SEED))


def efficientnet_batch() -> torch.Tensor:
    """Images [8, 3, 224, 224]."""
    return torch.randn(BATCH, 3, _IMAGE, _IMAGE, generator=torch.Generator().manual_seed(_SEED))


MODELS: dict[str, tuple[Callable[[], nn.Sequential], Callable[[], torch.Tensor]]] = {
    "encoder": (encoder, encoder_batch),
    "efficientnet": (efficientnet, efficientnet_batch),
}


class Repeated(torch.utils.data.Dataset):
    """A batch again and again, record by record: nothing is read, nothing is computed."""

    def __init__(self, batch: torch.Tensor) -> None:
        self._batch, self._records = batch, int(os.environ[RECORDS])

    def __len__(self) -> int:
        return self._records

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._batch[index % BATCH]


def encoder_records() -> Repeated:
    return Repeated(encoder_batch())


def efficientnet_records() -> Repeated:
    return Repeated(efficientnet_batch())


class _Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(_WORDS, _HIDDEN), nn.Embedding(_TOKENS, _HIDDEN)
        self.norm = nn.LayerNorm(_HIDDEN)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.words(ids) + self.places.weight)  # [batch, tokens, hidden]


class _Layer(nn.Module):
    """Attention and a feed-forward network, each added to its input and normed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(_HIDDEN, 3 * _HIDDEN), nn.Linear(_HIDDEN, _HIDDEN)
        self.up, self.down = nn.Linear(_HIDDEN, _WIDE), nn.Linear(_WIDE, _HIDDEN)
        self.norm1, self.norm2 = nn.LayerNorm(_HIDDEN), nn.LayerNorm(_HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)  # [batch, heads, tokens, head size]
        attended = functional.scaled_dot_product_attention(q, k, v)
        x = self.norm1(x + self.out(attended.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


class _Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)
