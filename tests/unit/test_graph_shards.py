"""Models of one pass divided over shards, which are threads here: together they compute what the whole model does."""

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_graph_families import FAMILIES, inputs_of
from torch import nn

from mpinfer.models.graph import GraphSkeleton
from mpinfer.models.graph_parallel import Division
from mpinfer.models.program import InputShape, trace
from mpinfer.models.tensor_parallel import Shard
from mpinfer.spec import JobSpec, spec_from_dict

DIVIDED = [
    "BertForSequenceClassification",
    "RobertaForSequenceClassification",
    "DistilBertForSequenceClassification",
    "ElectraForSequenceClassification",
    "EsmForSequenceClassification",
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "Wav2Vec2ForSequenceClassification",
    "HubertForSequenceClassification",
]


def saved(name: str, directory: Path, **more: Any) -> tuple[JobSpec, Any]:
    """A job for a random model of a family, and the model."""
    family, settings, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases are zeros otherwise, and those added twice would not show
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    job = {"model": {"path": str(directory), "task": "classify", **more}, "input": {"path": "x"}}
    return spec_from_dict(job), model


def together(count: int, work: Callable[[Shard], Any]) -> list[Any]:
    """What `count` shards make of their work."""
    barrier, summands, made = threading.Barrier(count, timeout=60), [torch.empty(0)] * count, [None] * count

    def run(index: int) -> None:
        def reduce(x: torch.Tensor) -> torch.Tensor:
            summands[index] = x.clone()
            barrier.wait()
            total = torch.stack(summands).sum(0)
            barrier.wait()
            return x.copy_(total)

        try:
            made[index] = work(Shard(index, count, reduce))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", DIVIDED)
def test_shards_of_a_family_give_what_it_gives_whole(name: str, tmp_path: Path) -> None:
    spec, model = saved(name, tmp_path)
    batch, shapes = inputs_of(FAMILIES[name][2], 4)
    with torch.no_grad():
        wanted = model(**batch).logits
    skeleton = GraphSkeleton(spec, shapes)
    summary = skeleton.summary()
    assert summary.most_shards == 4, "heads"
    values = skeleton.first_values(batch)
    whole_bytes = skeleton.load_part(0, len(summary.blocks), "cpu", 4, lambda: None).read_bytes
    for count, parts in ((2, 1), (3, 2)):  # three shards of four heads are uneven; parts are stages of a pipeline
        blocks = len(summary.divisible)
        cuts = [blocks * part // parts for part in range(parts + 1)]

        def work(shard: Shard, cuts: list[int] = cuts) -> tuple[Any, int]:
            passed, read_bytes = values, 0
            for start, stop in pairwise(cuts):
                part = skeleton.load_part(start, stop, "cpu", 4, lambda: None, shard)
                passed, read_bytes = part.forward(passed), read_bytes + part.read_bytes
            return passed[list(part.output_names).index("logits")], read_bytes

        made = together(count, work)
        for logits, _ in made:
            torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
        weights = {n: size for block in summary.divisible for n, size in block.divided(count).weights}
        assert sum(weights.values()) == sum(read for _, read in made), "as planned"
        divided_bytes = (count * whole_bytes - sum(read for _, read in made)) / (count - 1)
        assert divided_bytes > 0.5 * whole_bytes, "all but embeddings, norms and convolutions"


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("ModernBertForSequenceClassification", {}, "0% of its work"),  # three matrices in one
        ("ResNetForImageClassification", {}, "0% of its work"),
        ("BertForSequenceClassification", {"quantize": "int8"}, "model.quantize=int8"),
    ],
)
def test_what_is_not_divided_says_why(name: str, more: dict[str, Any], why: str, tmp_path: Path) -> None:
    spec, _ = saved(name, tmp_path, **more)
    summary = GraphSkeleton(spec, inputs_of(FAMILIES[name][2], 4)[1]).summary()
    assert summary.most_shards == 1
    assert why in summary.shards_problem


class Attention(nn.Module):
    """With sizes written out, as in code that was made for one configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], 5, 3, 4).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = nn.functional.scaled_dot_product_attention(
            self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        )
        return x + self.out(attended.transpose(1, 2).reshape(x.shape[0], 5, 12))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x) * 0.5)


class Escaping(Gated):
    """What lies between its matrices is wanted whole, too."""

    def forward(self, x: torch.Tensor) -> Any:
        between = nn.functional.silu(self.gate(x))
        return self.down(between), between.amax(-1)


class Twice(nn.Module):
    """One matrix by columns and by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.square(self.square(x).relu())


class Normed(Gated):
    """A norm sees all columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.layer_norm(self.gate(x), [20]))


@pytest.mark.parametrize(
    ("model", "most", "divided"),
    [
        (Attention(), 3, {"k.bias", "k.weight", "out.bias", "out.weight", "q.bias", "q.weight", "v.bias", "v.weight"}),
        (Gated(), 20, {"down.bias", "down.weight", "gate.bias", "gate.weight", "up.bias", "up.weight"}),
        (Escaping(), 1, set()),
        (Twice(), 1, set()),
        (Normed(), 1, set()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_divided(model: nn.Module, most: int, divided: set[str]) -> None:
    program = trace(model, {"x": InputShape((5, 12), "float32")}, lambda outputs, inputs: outputs)
    division = Division(program)
    assert division.most_shards == most
    assert {program.weights[node] for node in division.weights} == divided


def test_sizes_that_are_written_out() -> None:
    spec = spec_from_dict({"model": {"path": "test_graph_shards:Attention", "task": "forward"}, "input": {"path": "x"}})
    torch.manual_seed(0)
    skeleton = GraphSkeleton(spec, {"x": InputShape((5, 12), "float32")})
    x = torch.randn(4, 5, 12)
    summary = skeleton.summary()
    (wanted,) = skeleton.load_part(0, len(summary.blocks), "cpu", 4, lambda: None).forward([x])
    blocks = len(summary.divisible)
    made = together(2, lambda shard: skeleton.load_part(0, blocks, "cpu", 4, lambda: None, shard).forward([x]))
    for (found,) in made:
        torch.testing.assert_close(found, wanted)
