"""Encoders and classifiers of transformers, whole and in three parts: what transformers gives."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import logging

from mpinfer.forward.stage import ForwardStage
from mpinfer.models.graph import GraphPart, GraphSkeleton
from mpinfer.models.halving import Halving
from mpinfer.models.program import InputShape
from mpinfer.spec import spec_from_dict
from mpinfer.transport.message import Message

logging.disable_progress_bar()

TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
DISTIL = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99}
VISION = {**TEXT, "image_size": 32, "patch_size": 8, "num_labels": 5}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5}
CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 5}
SPEECH = {
    **TEXT,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}
FAMILIES = {
    "BertForSequenceClassification": ("Bert", TEXT, "text"),
    "RobertaForSequenceClassification": ("Roberta", {**TEXT, "max_position_embeddings": 70}, "text"),
    "DistilBertForSequenceClassification": ("DistilBert", DISTIL, "text"),
    "ElectraForSequenceClassification": ("Electra", {**TEXT, "embedding_size": 32}, "text"),
    "ModernBertForSequenceClassification": ("ModernBert", {**TEXT, "pad_token_id": 0}, "text"),
    "EsmForSequenceClassification": ("Esm", {**TEXT, "pad_token_id": 0, "position_embedding_type": "rotary"}, "text"),
    "ViTForImageClassification": ("ViT", VISION, "image"),
    "DeiTForImageClassification": ("DeiT", VISION, "image"),
    "ResNetForImageClassification": ("ResNet", RESNET, "image"),
    "ConvNextForImageClassification": ("ConvNext", CONVNEXT, "image"),
    "Wav2Vec2ForSequenceClassification": ("Wav2Vec2", SPEECH, "sound"),
    "HubertForSequenceClassification": ("Hubert", SPEECH, "sound"),
}


def inputs_of(kind: str, records: int) -> tuple[dict[str, torch.Tensor], dict[str, InputShape]]:
    """A batch, and the shapes of another one's records."""
    if kind == "text":
        ids, mask = torch.randint(3, 99, (records, 11)), torch.ones(records, 11, dtype=torch.int64)
        mask[0, 7:] = 0
        ids[0, 7:] = 0
        shape = InputShape((6,), "int64", longest=60)
        return {"input_ids": ids, "attention_mask": mask}, {"input_ids": shape, "attention_mask": shape}
    if kind == "image":
        return {"pixel_values": torch.randn(records, 3, 32, 32)}, {"pixel_values": InputShape((3, 32, 32), "float32")}
    return {"input_values": torch.randn(records, 900)}, {"input_values": InputShape((700,), "float32", longest=9000)}


def compute(make: Callable[[], GraphSkeleton], parts: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    skeleton = make()
    blocks = len(skeleton.summary().blocks)
    cuts = [round(blocks * part / parts) for part in range(parts + 1)]
    values: Any = skeleton.first_values(batch)
    for start, stop in pairwise(cuts):
        part = skeleton.load_part(start, stop, "cpu", 4, lambda: None)
        values = [v.contiguous() if isinstance(v, torch.Tensor) else v for v in part.forward(values)]
    return dict(zip(part.output_names, values, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_what_transformers_gives(name: str, tmp_path: Path) -> None:
    family, settings, kind = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, name)(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
    model.save_pretrained(tmp_path)
    batch, shapes = inputs_of(kind, 4)
    spec = spec_from_dict({"model": {"path": str(tmp_path), "task": "classify"}, "input": {"path": "x"}})
    with torch.no_grad():
        wanted = model(**batch).logits
    assert not GraphSkeleton(spec, shapes).problem
    for parts in (1, 3):
        found = compute(lambda: GraphSkeleton(spec, shapes), parts, batch)
        torch.testing.assert_close(found["logits"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_halves_of_a_batch_give_what_the_whole_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever crosses a cut: values of records, masks, numbers of records."""
    family, settings, kind = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**settings)).eval()
    model.save_pretrained(tmp_path)
    batch, shapes = inputs_of(kind, 7)
    spec = spec_from_dict({"model": {"path": str(tmp_path), "task": "classify"}, "input": {"path": "x"}})
    skeleton = GraphSkeleton(spec, shapes)
    whole = compute(lambda: skeleton, 3, batch)["logits"]
    blocks = len(skeleton.summary().blocks)
    forward = GraphPart.forward

    def limited(part: GraphPart, values: Any) -> Any:
        rows = [value.shape[0] for value in values if isinstance(value, torch.Tensor) and value.shape[0] > 1]
        if rows and rows[0] > 3:
            raise MemoryError
        return forward(part, values)

    monkeypatch.setattr(GraphPart, "forward", limited)
    message = Message(np.arange(7, dtype=np.int32), tuple(skeleton.first_values(batch)))
    for start, stop in pairwise(round(blocks * part / 3) for part in range(4)):
        part = skeleton.load_part(start, stop, "cpu", 4, lambda: None)
        assert part.can_halve
        halving = Halving()
        message = ForwardStage(part, halving).forward(message)
        assert halving.count > 0
    assert message.header.tolist() == list(range(7))
    torch.testing.assert_close(message.values[0], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_happens_in_the_model(pooling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**TEXT)).eval()
    model.save_pretrained(tmp_path)
    batch, shapes = inputs_of("text", 3)
    spec = spec_from_dict(
        {
            "model": {"path": str(tmp_path), "task": "embed"},
            "input": {"path": "x"},
            "embed": {"pooling": pooling, "normalize": False},
        }
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    lengths = batch["attention_mask"].sum(1).tolist()
    pick = {"mean": lambda h: h.mean(0), "first": lambda h: h[0], "last": lambda h: h[-1]}[pooling]
    wanted = torch.stack([pick(h[:length]) for h, length in zip(hidden, lengths, strict=True)])
    found = compute(lambda: GraphSkeleton(spec, shapes), 2, batch)
    torch.testing.assert_close(found["embedding"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_enough(dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)).eval()
    model.save_pretrained(tmp_path)
    batch, _ = inputs_of("image", 4)
    with torch.no_grad():
        wanted = model(**batch).logits
    shapes = {"pixel_values": InputShape((3, 32, 32), dtype)}
    spec = spec_from_dict(
        {"model": {"path": str(tmp_path), "task": "classify", "dtype": dtype}, "input": {"path": "x"}}
    )
    halved = {name: tensor.to(getattr(torch, dtype)) for name, tensor in batch.items()}
    found = compute(lambda: GraphSkeleton(spec, shapes), 2, halved)
    assert found["logits"].dtype == getattr(torch, dtype)
    torch.testing.assert_close(found["logits"].float(), wanted, rtol=0.05, atol=0.05)


def test_int8_layers_are_near_enough(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)).eval()
    model.save_pretrained(tmp_path)
    batch, shapes = inputs_of("text", 4)
    job = {"model": {"path": str(tmp_path), "task": "classify", "quantize": "int8"}, "input": {"path": "x"}}
    with torch.no_grad():
        wanted = model(**batch).logits
    found = compute(lambda: GraphSkeleton(spec_from_dict(job), shapes), 2, batch)
    assert 0 < (found["logits"] - wanted).abs().max() < 0.05
