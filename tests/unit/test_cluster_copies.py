import shutil
from pathlib import Path

import pytest

from mpinfer.cluster.copies import check_copies, digest, model_files
from mpinfer.errors import LaunchError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"x" * 2**21)
    return directory


def test_copies_are_alike_whatever_their_notes_and_times(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy, copy_function=shutil.copyfile)
    for name in ("README.md", ".cache"):
        (copy / name).write_text("of this node")
    (copy / "sub").mkdir()
    assert digest(model_files(str(copy))) == digest(model_files(str(model)))
    check_copies("model", {"n1": model_files(str(model)), "n2": model_files(str(copy))})


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", b"[]"), ("model.safetensors", b"x" * (2**21 - 1)), ("added_tokens.json", b"")]
)
def test_another_copy_is_refused(model: Path, name: str, content: bytes) -> None:
    files = model_files(str(model))
    (model / name).write_bytes(content)
    other = model_files(str(model))
    assert digest(other) != digest(files)
    with pytest.raises(LaunchError, match=f"^model.path=model: .* on n3 {name} differ, compared to n1; copy the model"):
        check_copies("model", {"n1": files, "n2": files, "n3": other})


def test_a_missing_copy_is_refused(model: Path) -> None:
    with pytest.raises(LaunchError, match="on n2 there is nothing, compared to n1; "):
        check_copies("model", {"n1": model_files(str(model)), "n2": model_files("not/there")})


def test_one_file_and_a_function_have_files_too(model: Path) -> None:
    assert model_files(str(model / "config.json")).keys() == {"config.json"}
    assert model_files("package.module:factory") == {}
