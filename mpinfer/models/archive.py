"""A `.pt2` file: a program that `torch.export.save` wrote, read without its weights and without pickles.

The file is a zip archive whose members are stored as they are, so each weight can be read from its own place.
"""

import io
import json
import re
import struct
import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from mpinfer.errors import ModelError
from mpinfer.models.checkpoint import ITEM_BYTES, StoredTensor

_WEIGHTS, _SAMPLES, _MODEL = "data/weights/", "data/sample_inputs/model.pt", "models/model.json"
_WEIGHTS_CONFIG, _CONSTANTS_CONFIG = (
    f"{_WEIGHTS}model_weights_config.json",
    "data/constants/model_constants_config.json",
)
_ARITHMETIC = "getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_"
_OPERATIONS = r"torch\.ops\.(aten|prim|prims|higher_order|quantized_decomposed|mpinfer)\.(?!from_file)\w+(\.\w+)?"
_TARGET = re.compile(rf"{_OPERATIONS}|torch\._?sym_\w+|math\.\w+|_operator\.({_ARITHMETIC})")
# Torch hands formulas of sizes to an evaluator: only symbols, numbers, and functions of sympy's kind may stand there.
_FORMULA = re.compile(r"([A-Z]\w*|'\w+'|[a-z]+=|[suz]\w*\d|[\d.]+|[ (),+*/<>=-])*")
_DTYPES = dict(enumerate(["U8", "I8", "I16", "I32", "I64", "F16", "F32", "F64"], start=1)) | {12: "BOOL", 13: "BF16"}


def read_archive(file: Path, trust: bool) -> tuple[Any, dict[str, StoredTensor] | None]:
    """The exported program with zeros for weights, and by name where the weights are in the file; None when they are
    pickled, and in the program.

    Raises `ModelError` when the file is damaged, of another version, or holds pickles or names that could run code,
    unless `trust`.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            root = archive.namelist()[0].split("/")[0]
            if f"{root}/{_MODEL}" not in archive.namelist():
                raise ModelError(
                    f"model.path={file}: is of another version than torch {torch.__version__} reads (no {_MODEL} in "
                    f"it); export it again with this torch"
                )
            if not trust:
                _refuse_code(file, archive, root)
            weights = json.loads(archive.read(f"{root}/{_WEIGHTS_CONFIG}"))["config"]
            if any(entry["use_pickle"] for entry in weights.values()):
                return torch.export.load(file), None
            tensors = _stored_tensors(file, archive, root, weights)
            slim = _without_weights(archive, root)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, IndexError, TypeError, RecursionError) as error:
        raise ModelError(f"model.path={file}: not a readable .pt2 program ({error!r}); export it again") from None
    try:
        exported = torch.export.load(slim)
    except Exception as error:
        first = str(error).split("\n")[0][:200]
        raise ModelError(
            f"model.path={file}: torch {torch.__version__} cannot load it ({type(error).__name__}: {first}); export it "
            f"again with this torch"
        ) from None
    return exported, tensors


def _refuse_code(file: Path, archive: zipfile.ZipFile, root: str) -> None:
    """Raises `ModelError` for whatever torch would unpickle, resolve to any function, or evaluate."""
    fix = "export it without that, or set model.trust: true if you trust the file"
    for config in (_WEIGHTS_CONFIG, _CONSTANTS_CONFIG):
        for name, entry in json.loads(archive.read(f"{root}/{config}"))["config"].items():
            if entry["use_pickle"] or entry["path_name"].startswith(("custom_obj", "opaque_obj")):
                raise ModelError(f"model.path={file}: {name!r} is a pickle, which could run code; {fix}")
    for tree in _mappings(json.loads(archive.read(f"{root}/{_MODEL}"))):
        formula, target = tree.get("expr_str", ""), tree.get("target") if "inputs" in tree else None
        if not _FORMULA.fullmatch(formula):
            raise ModelError(f"model.path={file}: {formula[:80]!r} is no formula of sizes; {fix}")
        if target is not None and not _TARGET.fullmatch(target):
            raise ModelError(f"model.path={file}: {target[:80]!r} is no operation of torch; {fix}")


def _mappings(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _mappings(value)


def _stored_tensors(
    file: Path, archive: zipfile.ZipFile, root: str, weights: dict[str, Any]
) -> dict[str, StoredTensor]:
    """Where each weight lies in the file, by name."""
    found = {}
    for name, entry in weights.items():
        member = archive.getinfo(f"{root}/{_WEIGHTS}{entry['path_name']}")
        meta = entry["tensor_meta"]
        shape, strides = ([size["as_int"] for size in meta[key]] for key in ("sizes", "strides"))
        dtype = _DTYPES.get(meta["dtype"])
        contiguous = all(
            n == 1 or stride == prod(shape[i + 1 :]) for i, (n, stride) in enumerate(zip(shape, strides, strict=True))
        )
        if member.compress_type != zipfile.ZIP_STORED or dtype is None or not contiguous:
            raise ValueError(f"weight {name!r} is not stored as plain numbers")
        width = ITEM_BYTES[dtype]
        offset = _data_offset(file, member) + meta["storage_offset"]["as_int"] * width
        found[name] = StoredTensor(file, tuple(shape), dtype, offset, prod(shape) * width)
    return found


def _data_offset(file: Path, member: zipfile.ZipInfo) -> int:
    """Of the first byte of a member, which comes after a header of its own and two texts."""
    with open(file, "rb") as stream:
        stream.seek(member.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", stream.read(4))
    return member.header_offset + 30 + name_bytes + extra_bytes


def _without_weights(archive: zipfile.ZipFile, root: str) -> io.BytesIO:
    """The same archive with empty weights, which torch takes as zeros that nobody has touched, no samples and no
    code of guards."""
    slim = io.BytesIO()
    with zipfile.ZipFile(slim, "w") as copy:
        for member in archive.namelist():
            data = b""
            if member == f"{root}/{_SAMPLES}":
                samples = io.BytesIO()
                torch.save(((), {}), samples)
                data = samples.getvalue()
            elif member == f"{root}/{_MODEL}":
                data = json.dumps({**json.loads(archive.read(member)), "guards_code": []}).encode()
            elif not member.startswith(f"{root}/{_WEIGHTS}weight_"):
                data = archive.read(member)
            copy.writestr(member, data)
    slim.seek(0)
    return slim
