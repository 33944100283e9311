"""Models that are not decoders: built without weights, from whatever `model.path` names, and made a program."""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpinfer.errors import ModelError
from mpinfer.models.archive import read_archive
from mpinfer.models.checkpoint import Checkpoint
from mpinfer.models.fake import FakeStore
from mpinfer.models.meta import parameters_on_meta
from mpinfer.models.pooling import pool, pooling_of
from mpinfer.models.program import InputShape, Program, Untraceable, program_of, trace
from mpinfer.models.recurrent import unstack_recurrent
from mpinfer.models.sources import find_sources
from mpinfer.models.store import ConvertedFiles, HeldTensors, PickledStateDict, Renamed, Store, StoredFiles, check_names
from mpinfer.plugins import load_object, one_line
from mpinfer.spec import AUTO, FAKE, JobSpec, ModelSpec

Finish = Callable[[Any, dict[str, torch.Tensor]], Any]
"""What a task makes of a model's outputs and inputs, inside the model."""

_AUTO_CLASSES = {  # of transformers, by what an architecture's name ends with
    "classify": (
        "AutoModelForSequenceClassification",
        "AutoModelForImageClassification",
        "AutoModelForAudioClassification",
    ),
    "embed": ("AutoModel",),
    "forward": ("AutoModel",),
}


@dataclass
class Built:
    """A model without weights: as a program, or else whole."""

    program: Program | None
    store: Store
    model: nn.Module | None  # None: of a .pt2 there is only the program
    finish: Finish
    problem: str = ""  # why it is not a program


def build(spec: JobSpec, shapes: Mapping[str, InputShape]) -> Built:
    """The job's model, for records of these shapes. Raises `ModelError`."""
    path = Path(spec.model.path)
    store: Store
    if path.suffix == ".pt2":
        exported, tensors = read_archive(path, spec.model.trust)
        names = _input_names(path, exported, list(shapes))
        store = HeldTensors(exported.state_dict) if tensors is None else StoredFiles(Checkpoint.of(path, tensors))
        return Built(program_of(exported, names), store, None, _as_it_is)
    finish: Finish = _as_it_is
    if path.is_dir():
        model, store = _from_directory(path, spec)
        if spec.model.task == "embed":
            pooling = pooling_of(path, spec.embed.pooling)

            def finish(outputs: Any, inputs: dict[str, torch.Tensor]) -> Any:
                return {"embedding": pool(outputs, inputs, pooling)}
    else:
        model, store = _from_factory(spec.model)
    model = unstack_recurrent(model.eval().requires_grad_(False))
    try:
        return Built(trace(model, shapes, finish), store, model, finish)
    except Untraceable as problem:
        return Built(None, store, model, finish, str(problem))


def _as_it_is(outputs: Any, inputs: dict[str, torch.Tensor]) -> Any:
    return outputs


def _from_factory(spec: ModelSpec) -> tuple[nn.Module, Store]:
    """A user's module: without weights if a file has them, else as the factory makes it, the same on every rank."""
    factory = load_object(spec.path, "model.path", ModelError)
    torch.manual_seed(0)
    try:
        with contextlib.nullcontext() if spec.weights == AUTO else parameters_on_meta():
            model = factory()
    except Exception as error:
        raise ModelError(f"model.path={spec.path}: raised {one_line(error)}; correct it") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.path={spec.path}: gave {type(model).__name__}, not a torch.nn.Module; return one")
    model = model.to(getattr(torch, spec.dtype))
    if spec.weights == AUTO:
        return model, HeldTensors(model.state_dict(keep_vars=True))
    if spec.weights == FAKE:
        return model, FakeStore()
    file = Path(spec.weights)
    if not file.is_file():
        raise ModelError(f"model.weights={file}: no such file; give a .safetensors, .pt or .pth file")
    stored = StoredFiles(Checkpoint(file)) if file.suffix == ".safetensors" else PickledStateDict(file, spec.trust)
    return model, Renamed(stored, check_names(file, stored.names(), model))


def _from_directory(directory: Path, spec: JobSpec) -> tuple[nn.Module, Store]:
    """A model of transformers, of the architecture that config.json names."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError:
        raise ModelError(
            f"model.path={directory}: needs transformers, which is not installed; pip install 'mpinfer[hf]'"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    own_code = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    if own_code and not spec.model.trust:
        raise ModelError(
            f"model.path={directory}: comes with code of its own ({next(iter(own_code.values()))}); set model.trust: "
            f"true if you have read it and trust it"
        )
    trusted = {"trust_remote_code": spec.model.trust}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, **trusted)
        architecture = (config.architectures or [""])[0]
        dtype = getattr(torch, spec.model.dtype)
        with parameters_on_meta():
            if own_code:
                name = next((n for n in _AUTO_CLASSES[spec.model.task] if n in own_code), "AutoModel")
                model = getattr(transformers, name).from_config(config, dtype=dtype, **trusted)
            elif hasattr(transformers, architecture):
                model = getattr(transformers, architecture)._from_config(config, dtype=dtype)
            else:
                model = transformers.AutoModel.from_config(config, dtype=dtype)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{directory / 'config.json'}: transformers refuses it ({first or repr(error)}); install a newer "
            f"transformers or fetch the model again"
        ) from None
    if spec.model.task == "classify" and "Classification" not in type(model).__name__:
        raise ModelError(
            f"model.path={directory}: is a {type(model).__name__}, and model.task=classify needs a classifier; use "
            f"embed or forward, or a model with a classification head"
        )
    if spec.model.weights == FAKE:
        return (model.base_model if spec.model.task == "embed" else model), FakeStore()
    checkpoint = Checkpoint(directory)
    names = list(model.state_dict())
    store = ConvertedFiles(checkpoint, find_sources(model, names, checkpoint))
    if spec.model.task != "embed":
        return model, store
    base = model.base_model
    prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
    return base, Renamed(store, {name: prefix + name for name in base.state_dict()})


def _input_names(path: Path, exported: Any, names: list[str]) -> list[str]:
    """The records' fields in the order in which the program takes them."""
    taken = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    if set(names) == set(taken):
        return taken
    if len(names) == len(taken):
        return names
    raise ModelError(
        f"model.path={path}: takes {', '.join(taken)}, but a record gives {', '.join(names)}; name the fields as the "
        f"program does (input.columns, model.prepare)"
    )
