"""What a user meets whose model, weights, records or limits are wrong: one line that names value, rule and fix."""

import io
import json
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mpinfer.errors import InputError, ModelError, MpinferError, PlanError, RecordError, SpecError
from mpinfer.forward.first import input_shapes
from mpinfer.forward.prepare import make_preparer
from mpinfer.forward.tasks import make_task
from mpinfer.models.graph import GraphSkeleton
from mpinfer.plan.layout import Plan
from mpinfer.plan.machine import Link, Machine, Seat
from mpinfer.plan.planner import Choice
from mpinfer.preview import FirstLook, plan_job, plan_on
from mpinfer.records.loader import make_loader
from mpinfer.spec import JobSpec, spec_from_dict

HERE = __name__


# The user's modules


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def wide() -> nn.Module:
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))


def narrow() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 5))


def raises() -> nn.Module:
    raise RuntimeError("no\ndisk")


def no_module() -> Any:
    return {"weight": torch.zeros(1)}


def with_argument(size: int) -> nn.Module:
    return nn.Linear(size, size)


class TwoInputs(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - b


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y * 2 if y.sum() > 1e9 else y


class NoTensor(nn.Module):
    def forward(self, x: torch.Tensor) -> str:
        return "text"


class Scaled(nn.Module):
    """A program of it has a formula of sizes and a constant that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x).reshape(x.shape[0] * 2, 2).relu()
        return y.reshape(x.shape[0], 4) + torch.tensor([1.0, 2.0, 3.0, 4.0])


class Broken(nn.Module):
    """Gives NaN for records that begin with a negative number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * x[:, :1].sqrt()


# What a job does before and after the message passing


def make_job(path: Path | str, records: Path | str, task: str = "forward", **sections: Any) -> JobSpec:
    model = {"path": str(path), "task": task, **sections.pop("model", {})}
    return spec_from_dict({"model": model, "input": {"path": str(records), **sections.pop("input", {})}, **sections})


def skeleton_of(spec: JobSpec) -> GraphSkeleton:
    """As a run comes to it: the cheap checks, the first record, the model without weights."""
    look = FirstLook.at(spec)
    assert look.kind == "graph"
    return GraphSkeleton(look.spec, input_shapes(look.spec, look.records))


def plan_for(spec: JobSpec, ranks: int, memory_bytes: int = 10**10) -> Choice:
    link = Link(1e-6, 1e10)
    return plan_on(FirstLook.at(spec), Machine((Seat(0, memory_bytes),) * ranks, link, link))[0]


def shape(plan: Plan) -> tuple[int, int]:
    """Stages and replicas."""
    return plan.replicas[0].stages, len(plan.replicas)


def run_whole(spec: JobSpec) -> list[dict[str, Any] | RecordError]:
    """The output of each record, all in one batch on one rank."""
    skeleton = skeleton_of(spec)
    records = FirstLook.at(spec).records
    load, preparer = make_loader(spec.input), make_preparer(spec)
    samples = [preparer.sample(load(json.loads(records.line(index)))) for index in range(len(records))]
    stop = len(skeleton.summary().blocks)
    part = skeleton.load_part(0, stop, "cpu", len(samples), lambda: None)
    values = part.forward(skeleton.first_values(preparer.collate(samples)))
    return list(make_task(spec).outputs(dict(zip(part.output_names, values, strict=True)), len(samples)))


def arrays(outputs: list[Any], name: str = "output") -> np.ndarray:
    return np.stack([output[name].numpy() for output in outputs])


def refused(error: type[MpinferError], act: Callable[[], object], *words: str) -> str:
    """The message, which is one line with all of these words."""
    with pytest.raises(error) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    return message


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((5, 8), dtype=np.float32))
    return tmp_path / "x.npy"


# Factories


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (f"{HERE}:raises", ["raised RuntimeError: no disk", "correct it"]),
        (f"{HERE}:no_module", ["gave dict, not a torch.nn.Module", "return one"]),
        (f"{HERE}:with_argument", ["raised TypeError", "missing 1 required positional argument: 'size'"]),
        (f"{HERE}:HERE", ["raised TypeError: 'str' object is not callable"]),
        (f"{HERE}:nothing_there", ["has no 'nothing_there'; it has"]),
        ("package_not_there.module:f", ["module 'package_not_there.module' cannot be imported", "install it"]),
    ],
)
def test_factories_that_give_no_module_are_refused(rows: Path, path: str, words: list[str]) -> None:
    refused(ModelError, lambda: skeleton_of(make_job(path, rows)), f"model.path={path}", *words)


def test_a_module_that_takes_other_arguments_names_both(tmp_path: Path) -> None:
    columns = {"y": np.full((2, 4), 3, np.float32), "x": np.ones((2, 4), np.float32)}
    np.savez(tmp_path / "x.npz", **columns)
    job = make_job(f"{HERE}:TwoInputs", tmp_path / "x.npz")
    assert arrays(run_whole(job)).tolist() == [[2] * 4] * 2  # as many: in their order
    np.savez(tmp_path / "x.npz", b=columns["y"], a=columns["x"])
    assert arrays(run_whole(job)).tolist() == [[-2] * 4] * 2  # by name
    np.savez(tmp_path / "x.npz", y=columns["y"])
    message = "TwoInputs: takes a, b, but a record gives y"
    refused(ModelError, lambda: skeleton_of(job), message, "input.columns, model.prepare")


def test_records_of_a_shape_that_the_module_does_not_take(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 7), np.float32))
    refused(ModelError, lambda: run_whole(make_job(f"{HERE}:mlp", tmp_path / "x.npy")), "[2, 7]")


def test_a_module_without_tensors_is_not_cut(rows: Path) -> None:
    job = make_job(f"{HERE}:NoTensor", rows, parallel={"stages": 2})
    refused(PlanError, lambda: plan_for(job, 2), "parallel.stages=2", "use 1 stage")


# Weights of a factory


def with_weights(rows: Path, file: Path, factory: str = "mlp", **model: Any) -> JobSpec:
    return make_job(f"{HERE}:{factory}", rows, model={"weights": str(file), **model})


def save(file: Path, state: Any) -> Path:
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    return file


SUFFIXES = pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])


@SUFFIXES
def test_weights_are_the_files_and_not_the_factorys(tmp_path: Path, rows: Path, suffix: str) -> None:
    torch.manual_seed(5)
    model = mlp()
    file = save(tmp_path / f"w{suffix}", model.state_dict())
    with torch.no_grad():
        wanted = model(torch.from_numpy(np.load(rows))).numpy()
    np.testing.assert_allclose(arrays(run_whole(with_weights(rows, file))), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.pt", ["no such file", "give a .safetensors, .pt or .pth file"]),
        ("none.safetensors", ["no such file"]),
        ("x.npy", ["not a .safetensors, .pt or .pth file", "give one of these"]),
    ],
)
def test_weights_that_are_no_such_file(tmp_path: Path, rows: Path, name: str, words: list[str]) -> None:
    job = with_weights(rows, tmp_path / name)
    refused(ModelError, lambda: FirstLook.at(job), f"model.weights={tmp_path / name}", *words)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"\xff" * 200, lambda data: data[: len(data) // 2]])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_weights(tmp_path: Path, rows: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    file = save(tmp_path / f"w{suffix}", mlp().state_dict())
    file.write_bytes(damage(file.read_bytes()))
    refused(ModelError, lambda: skeleton_of(with_weights(rows, file)), str(file))


@SUFFIXES
def test_weights_of_another_model(tmp_path: Path, rows: Path, suffix: str) -> None:
    file, state = tmp_path / f"w{suffix}", mlp().state_dict()
    missing = {name: tensor for name, tensor in state.items() if name != "2.bias"}
    job = with_weights(rows, save(file, missing))
    refused(ModelError, lambda: skeleton_of(job), str(file), "tensor '2.bias' of the model is missing", "check")
    save(file, {**state, "stray": torch.zeros(1)})
    refused(ModelError, lambda: skeleton_of(job), str(file), "tensor 'stray' belongs to no part", "check")
    save(file, narrow().state_dict())
    refused(ModelError, lambda: run_whole(job), str(file), "tensor '2.weight' has shape [3, 16]", "[4, 16]")


@pytest.mark.parametrize("wrapped", [lambda model: model, lambda model: {"model": model}, lambda model: [1, 2]])
def test_what_is_no_state_dict(tmp_path: Path, rows: Path, wrapped: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(1)
    model = mlp()
    file = save(tmp_path / "w.pt", wrapped(model))
    job = with_weights(rows, file)
    message = refused(ModelError, lambda: skeleton_of(job), f"model.weights={file}", "save model.state_dict()")
    trusting = with_weights(rows, file, trust=True)
    if wrapped(model) is model:
        assert "set model.trust: true if you trust the file" in message
        with torch.no_grad():
            wanted = model(torch.from_numpy(np.load(rows))).numpy()
        np.testing.assert_allclose(arrays(run_whole(trusting)), wanted, rtol=1e-5, atol=1e-6)
    else:
        refused(ModelError, lambda: skeleton_of(trusting), f"model.weights={file}", "holds no state dict")


def test_weights_beside_a_model_that_has_its_own(tmp_path: Path, rows: Path, encoder: Path) -> None:
    job = make_job(encoder, rows, model={"weights": str(save(tmp_path / "w.pt", {}))})
    refused(ModelError, lambda: FirstLook.at(job), "model.weights=", "is for a model made by package.module:factory")


# Programs


@cache
def program_bytes(fixed: bool) -> bytes:
    torch.manual_seed(2)
    batch = None if fixed else ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(Scaled().eval(), (torch.zeros(3, 8),), dynamic_shapes=batch)
    file = io.BytesIO()
    torch.export.save(exported, file)
    return file.getvalue()


def save_program(tmp_path: Path, edit: Callable[[str, bytes], bytes | None] = lambda name, data: data) -> Path:
    """The program of `Scaled`, with members changed, or left out where `edit` gives None."""
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(io.BytesIO(program_bytes(False))) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = edit(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return path


def edit_json(member: str, change: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    """Change the JSON of the member of that name."""

    def edit(name: str, data: bytes) -> bytes:
        if not name.endswith(member):
            return data
        tree = json.loads(data)
        change(tree)
        return json.dumps(tree).encode()

    return edit


def mappings(tree: Any) -> list[dict[str, Any]]:
    children = list(tree.values()) if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return ([tree] if isinstance(tree, dict) else []) + [found for child in children for found in mappings(child)]


def test_a_program_runs_as_it_was_saved(tmp_path: Path, rows: Path) -> None:
    torch.manual_seed(2)
    model = Scaled()
    with torch.no_grad():
        wanted = model(torch.from_numpy(np.load(rows))).numpy()
    found = run_whole(make_job(save_program(tmp_path), rows))
    np.testing.assert_allclose(arrays(found), wanted, rtol=1e-5, atol=1e-6)


def test_a_program_that_is_not_there(tmp_path: Path, rows: Path) -> None:
    job = make_job(tmp_path / "none.pt2", rows)
    refused(ModelError, lambda: FirstLook.at(job), f"model.path={tmp_path / 'none.pt2'}: no such file", "torch.export")


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_program_that_is_cut_off(tmp_path: Path, rows: Path, keep: float) -> None:
    path = save_program(tmp_path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused(ModelError, lambda: skeleton_of(make_job(path, rows)), f"model.path={path}", "export it again")


def test_a_program_of_another_version(tmp_path: Path, rows: Path) -> None:
    path = save_program(tmp_path, lambda name, data: None if name.endswith("models/model.json") else data)
    job = make_job(path, rows)
    refused(ModelError, lambda: skeleton_of(job), "is of another version than torch", torch.__version__, "export it")
    newer = edit_json("models/model.json", lambda tree: tree["schema_version"].update(major=99))
    refused(ModelError, lambda: skeleton_of(make_job(save_program(tmp_path, newer), rows)), "cannot load it", "export")


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"{}",
        b"\xff",
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)
@pytest.mark.parametrize("member", ["models/model.json", "model_weights_config.json", "model_constants_config.json"])
def test_a_program_whose_json_is_none(tmp_path: Path, rows: Path, member: str, text: bytes) -> None:
    path = save_program(tmp_path, lambda name, data: text if name.endswith(member) else data)
    refused(ModelError, lambda: skeleton_of(make_job(path, rows)), f"model.path={path}", "export it again")


@pytest.mark.parametrize("config", ["model_weights_config.json", "model_constants_config.json"])
@pytest.mark.parametrize("sign", [{"use_pickle": True}, {"path_name": "custom_obj_0"}, {"path_name": "opaque_obj_0"}])
def test_a_pickle_in_a_program_is_refused(tmp_path: Path, rows: Path, config: str, sign: dict[str, Any]) -> None:
    def change(tree: dict[str, Any]) -> None:
        assert tree["config"]
        next(iter(tree["config"].values())).update(sign)

    job = make_job(save_program(tmp_path, edit_json(config, change)), rows)
    refused(ModelError, lambda: skeleton_of(job), "is a pickle, which could run code", "model.trust")


TARGETS = [
    "torch.os.system",
    "os.system",
    "builtins.eval",
    "torch.sym_os.system",
    "math.os.system",
    "_operator.attrgetter",
    "torch.ops.aten.relu.default\nos.system",
    " torch.ops.aten.relu.default",
]
WIDE_TARGETS = [
    "torch.ops.aten.from_file.default",  # creates and maps any file
    "torch.ops.image.write_file.default",  # of torchvision, if something imported it
    "torch.ops.load_library",
    "torch.ops.torch.os.system",
    "torch.ops.aten.relu.default.__class__.__base__",
]
TARGETS += WIDE_TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_an_operation_that_is_none_of_torch_is_refused(tmp_path: Path, rows: Path, target: str) -> None:
    def change(tree: Any) -> None:
        nodes = [node for node in mappings(tree) if "relu" in str(node.get("target", ""))]
        assert nodes
        nodes[0]["target"] = target

    job = make_job(save_program(tmp_path, edit_json("models/model.json", change)), rows)
    refused(ModelError, lambda: skeleton_of(job), "is no operation of torch", "model.trust")


FORMULAS = [
    "__import__('os').system('touch OWNED')",
    "Symbol('s0').__class__",
    "eval('1')",
    "exec('1')",
    "open('OWNED', 'w')",
    "s0 if print() else s0",
    "(lambda: 1)()",
    "[1 for x in (1,)]",
    "Symbol('s0', __class__=1)",
    "2*s0; 1",
]


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_formula_that_could_run_code_is_refused(
    tmp_path: Path, rows: Path, formula: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(tree: Any) -> None:
        formulas = [node for node in mappings(tree) if "expr_str" in node]
        assert formulas
        for node in formulas:
            node["expr_str"] = formula

    job = make_job(save_program(tmp_path, edit_json("models/model.json", change)), rows)
    refused(ModelError, lambda: skeleton_of(job), "is no formula of sizes", "model.trust")
    assert not (tmp_path / "OWNED").exists()


def test_code_of_guards_in_a_program_is_never_run(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def change(tree: Any) -> None:
        tree["guards_code"] = ["__import__('os').system('touch OWNED') or True"]

    run_whole(make_job(save_program(tmp_path, edit_json("models/model.json", change)), rows))
    assert not (tmp_path / "OWNED").exists()


def test_a_program_takes_other_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((2, 8), np.float32), y=np.ones((2, 8), np.float32))
    job = make_job(save_program(tmp_path), tmp_path / "x.npz")
    refused(ModelError, lambda: skeleton_of(job), "takes x, but a record gives x, y", "input.columns")


def test_a_batch_above_that_of_a_fixed_program(tmp_path: Path, rows: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(program_bytes(True))
    assert plan_for(make_job(path, rows, parallel={"micro_batch": 3}), 1).plan.replicas[0].micro_batch == 3
    job = make_job(path, rows, parallel={"micro_batch": 4})
    words = ["parallel.micro_batch=4", "exported for batches of 3", "use at most that"]
    refused(PlanError, lambda: plan_for(job, 1), *words)


# Model directories


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without a head and without a tokenizer."""
    from transformers import BertConfig, BertModel

    directory = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(3)
    BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    np.savez(tmp_path / "ids.npz", input_ids=np.ones((3, 6), np.int64))
    return tmp_path / "ids.npz"


def copy_of(directory: Path, target: Path, **changes: Any) -> Path:
    """A model directory with other entries in its config.json."""
    target.mkdir()
    config = json.loads((directory / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    (target / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    return target


def test_code_of_a_directory_needs_trust(tmp_path: Path, encoder: Path, tokens: Path) -> None:
    directory = copy_of(encoder, tmp_path / "m", auto_map={"AutoModel": "own.Model"})
    (directory / "own.py").write_text("raise SystemExit('ran')")
    words = [f"model.path={directory}", "comes with code of its own (own.Model)", "set model.trust: true"]
    refused(ModelError, lambda: skeleton_of(make_job(directory, tokens)), *words)


def test_a_model_without_a_classifier(encoder: Path, tokens: Path) -> None:
    words = ["is a BertModel", "model.task=classify needs a classifier", "use embed or forward"]
    refused(ModelError, lambda: skeleton_of(make_job(encoder, tokens, "classify")), f"model.path={encoder}", *words)


@pytest.mark.parametrize("task", ["generate", "score"])
def test_an_encoder_generates_nothing(encoder: Path, tokens: Path, rows: Path, task: str) -> None:
    words = [f"model.task={task} needs a decoder language model", "use classify, embed or forward"]
    refused(ModelError, lambda: FirstLook.at(make_job(encoder, tokens, task)), f"model.path={encoder}", *words)
    refused(ModelError, lambda: FirstLook.at(make_job(f"{HERE}:mlp", rows, task)), f"model.path={HERE}:mlp", *words)


def test_a_directory_whose_weights_are_of_another_config(tmp_path: Path, encoder: Path, tokens: Path) -> None:
    deeper = copy_of(encoder, tmp_path / "deeper", num_hidden_layers=3)
    refused(ModelError, lambda: skeleton_of(make_job(deeper, tokens)), str(deeper), "layer.2", "is missing")
    flatter = copy_of(encoder, tmp_path / "flatter", num_hidden_layers=1)
    refused(ModelError, lambda: skeleton_of(make_job(flatter, tokens)), str(flatter), "layer.1", "belongs to no part")
    thicker = copy_of(encoder, tmp_path / "thicker", intermediate_size=48)
    refused(ModelError, lambda: run_whole(make_job(thicker, tokens)), str(thicker), "[32, 16]", "[48, 16]")


def test_a_directory_of_an_unknown_kind(tmp_path: Path, encoder: Path, tokens: Path) -> None:
    unknown = copy_of(encoder, tmp_path / "m", model_type="no-such-type", architectures=["NoSuchModel"])
    refused(ModelError, lambda: skeleton_of(make_job(unknown, tokens)), str(unknown), "transformers refuses it")


def test_a_field_that_an_encoder_does_not_take(tmp_path: Path, encoder: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"words": [1, 2]}\n')
    job = make_job(encoder, tmp_path / "r.jsonl")
    refused(ModelError, lambda: run_whole(job), "BertModel", "words", "input_ids")


def test_text_for_a_directory_without_a_tokenizer(tmp_path: Path, encoder: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n')
    job = make_job(encoder, tmp_path / "r.jsonl", "embed")
    refused(InputError, lambda: skeleton_of(job), "text: is str", "no tokenizer", "model.prepare")


# Layouts


def test_a_model_that_cannot_be_traced_runs_whole(rows: Path) -> None:
    job = make_job(f"{HERE}:Looks", rows)
    plan = plan_for(job, 2).plan
    assert shape(plan) == (1, 2)
    assert any(reason.startswith("the model runs whole, in replicas only") for reason in plan.reasons)
    torch.manual_seed(0)  # as factories are called
    with torch.no_grad():
        wanted = Looks()(torch.from_numpy(np.load(rows))).numpy()
    assert np.array_equal(arrays(run_whole(job)), wanted)
    cut = make_job(f"{HERE}:Looks", rows, parallel={"stages": 2})
    refused(PlanError, lambda: plan_for(cut, 2), "parallel.stages=2: the model cannot be cut", "use 1 stage")


def test_a_limit_that_the_whole_model_is_above(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((4, 256), np.float32))
    limit = {"memory_limit_gb": 0.0008}
    job = make_job(f"{HERE}:wide", tmp_path / "x.npy", parallel=limit)  # 4 layers of 0.26 MB
    words = ["model of 1 MB", "does not fit 1 ranks of 1 MB", "70% may be weights", "start at least 2 ranks"]
    refused(PlanError, lambda: plan_for(job, 1), *words)
    choice = plan_for(make_job(f"{HERE}:wide", tmp_path / "x.npy", parallel={**limit, "shards": 1}), 2)
    assert shape(choice.plan) == (2, 1)
    verdicts = {candidate.name: candidate.verdict for candidate in choice.candidates}
    assert verdicts["2 replicas x 1 stages x 1 shards"].startswith("refused: largest stage has 1.1 MB")
    assert verdicts["1 replicas x 2 stages x 1 shards"] == "chosen"
    assert choice.candidates[0].memory_bytes < 0.6e6


def test_more_stages_than_operations_with_weights(rows: Path) -> None:
    job = make_job(f"{HERE}:mlp", rows, parallel={"stages": 8})
    refused(PlanError, lambda: plan_for(job, 8), "parallel.stages=8: more stages than the model's", "use at most")


def test_a_plan_is_told_without_a_run(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({"model": {"path": f"{HERE}:mlp", "task": "forward"}, "input": {"path": str(rows)}}))
    assert plan_job(str(job), [], 2, None, None, as_json=True) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["replicas"] == 2
    assert said.err == "mpinfer: timing parts of the model on this machine\n"  # which takes a while for a large one
    refused(ModelError, lambda: plan_job(str(job), [f"model.path={HERE}:no_module"], 1, 1, None, False), "gave dict")
    assert capsys.readouterr().out == ""


# Records


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 16), (80 * number, 10, 200)).save(folder / f"{number}.png")
    return folder


def test_an_unreadable_first_image_is_skipped_for_the_second(images: Path) -> None:
    (images / "0.png").write_bytes(b"no image")
    job = make_job(f"{HERE}:convolution", images, "classify", images={"resize": 16, "crop": 16})
    assert skeleton_of(job).problem == ""
    load, preparer, records = make_loader(job.input), make_preparer(job), FirstLook.at(job).records
    words = [str(images / "0.png")]
    refused(RecordError, lambda: preparer.sample(load(json.loads(records.line(0)))), *words)
    assert preparer.sample(load(json.loads(records.line(1))))["input"].shape == (3, 16, 16)


def test_records_that_are_all_broken(images: Path) -> None:
    for path in images.iterdir():
        path.write_bytes(b"no image")
    job = make_job(f"{HERE}:convolution", images, "classify")
    words = [f"input.path={images}", "none of the first 3 records can be prepared", str(images / "0.png"), "correct"]
    refused(InputError, lambda: skeleton_of(job), *words)


def test_a_later_record_unlike_the_first_is_an_error_of_its_own(tmp_path: Path) -> None:
    records = [{"x": [0.5] * 8}, {"x": [0.5] * 7}, {"x": [1] * 8}, {"y": [0.5] * 8}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    job = make_job(f"{HERE}:mlp", tmp_path / "r.jsonl")
    program, load, preparer = skeleton_of(job).program, make_loader(job.input), make_preparer(job)
    assert program is not None
    program.check(preparer.sample(load(records[0])))
    for record, words in [
        (records[1], ["x: has shape [7]", "[8]", "give every record such a shape"]),
        (records[2], ["x: is int64, the first record has float32", "give every record the same type"]),
        (records[3], ["the record gives y", "planned for x", "give every record the same fields"]),
    ]:
        refused(RecordError, lambda record=record: program.check(preparer.sample(load(record))), *words)


def test_inputs_that_a_model_of_this_kind_does_not_take(tmp_path: Path, rows: Path, tiny_llama: Any) -> None:
    decoder, _ = tiny_llama
    job = make_job(decoder, rows, "generate")
    refused(SpecError, lambda: FirstLook.at(job), "input.format=npy", "a decoder takes text")
    (tmp_path / "r.jsonl").write_text("{}\n")
    job = make_job(f"{HERE}:mlp", tmp_path / "r.jsonl", input={"format": "openai-batch"})
    refused(SpecError, lambda: FirstLook.at(job), "input.format=openai-batch", "use jsonl")
    (tmp_path / "r.jsonl").write_text('{"id": 1}\n')
    job = make_job(f"{HERE}:mlp", tmp_path / "r.jsonl")
    refused(InputError, lambda: FirstLook.at(job), "has no field but its id; give what the model takes")


# Numbers


@pytest.mark.parametrize("task", ["embed", "classify"])
def test_nan_is_the_error_of_its_records_alone(tmp_path: Path, task: str) -> None:
    values = np.ones((4, 8), np.float32)
    values[[1, 3], 0] = -1
    np.save(tmp_path / "x.npy", values)
    outputs = run_whole(make_job(f"{HERE}:Broken", tmp_path / "x.npy", task))
    assert [isinstance(output, RecordError) for output in outputs] == [False, True, False, True]
    assert "the model gives NaN for this record; correct the record" in str(outputs[1])


@pytest.mark.parametrize("task", ["embed", "classify"])
def test_nan_in_the_weights_is_the_error_of_every_record(tmp_path: Path, rows: Path, task: str) -> None:
    state = mlp().state_dict()
    state["2.bias"][1] = torch.nan
    job = make_job(f"{HERE}:mlp", rows, task, model={"weights": str(save(tmp_path / "w.safetensors", state))})
    outputs = run_whole(job)
    assert len(outputs) == 5
    assert all("gives NaN" in str(output) for output in outputs if isinstance(output, RecordError))
    assert all(isinstance(output, RecordError) for output in outputs)


def test_nan_is_what_forward_is_asked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((2, 8), -1, np.float32))
    assert np.isnan(arrays(run_whole(make_job(f"{HERE}:Broken", tmp_path / "x.npy")))).all()


def test_an_output_that_the_task_cannot_use(images: Path, rows: Path) -> None:
    job = make_job(f"{HERE}:Flat", rows, "classify")
    refused(ModelError, lambda: run_whole(job), "classify needs [records, 2 or more classes]", "use model.task=forward")


class Flat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(1)


def test_int8_stays_close_to_float32(rows: Path) -> None:
    exact = arrays(run_whole(make_job(f"{HERE}:mlp", rows)))
    coarse = arrays(run_whole(make_job(f"{HERE}:mlp", rows, model={"quantize": "int8"})))
    error = np.linalg.norm(coarse - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.03
    refused(SpecError, lambda: make_job("m", rows, model={"quantize": "int8", "dtype": "bfloat16"}), "model.dtype")
