"""`mpinfer schema` and what it lets pass; completion, by bash itself."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mpinfer.cli import main
from mpinfer.errors import SpecError
from mpinfer.spec import spec_from_dict, valid_keys

REPO = Path(__file__).parents[2]
JOBS = sorted((REPO / "jobs").glob("*.yaml"))
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(tree, id=f"{page.name}-{n}")
    for page in PAGES
    for n, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
    if "model" in (tree := yaml.safe_load(block))  # others are cluster files
]
GOOD = {"model": {"path": "m"}, "input": {"path": "i"}}


@pytest.fixture
def schema(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["schema"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(shown)
    return shown


def accepts(schema: dict[str, Any], tree: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(tree)


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_jobs_validate(schema: dict[str, Any], job: Path) -> None:
    jsonschema.validate(yaml.safe_load(job.read_text(encoding="utf-8")), schema)


@pytest.mark.parametrize("tree", BLOCKS)
def test_job_files_in_documents_validate(schema: dict[str, Any], tree: dict[str, Any]) -> None:
    jsonschema.validate(tree, schema)
    spec_from_dict(tree)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"generate": {"stop": "one"}},
        {"generate": {"stop": ["one", "two"]}},
        {"generate": {"logprobs": 3}},
        {"generate": None},
        {"parallel": {"stages": 2, "replicas": "auto"}},
        {"parallel": {"stages": 0}},
        {"parallel": {"stages": "many"}},
        {"parallel": {"stage": 2}},
        {"model": {"task": "generate"}},
        {"model": {"path": ""}},
        {"model": {"path": "m", "dtype": "float33"}},
        {"model": {"path": "m", "trust": "yes"}},
        {"model": None},
        {"generate": {"top_p": 2}},
        {"generate": {"stop_token_ids": ["a"]}},
        {"generation": {}},
    ],
    ids=repr,
)
def test_the_schema_and_the_spec_agree(schema: dict[str, Any], change: dict[str, Any]) -> None:
    tree = {**GOOD, **change}
    try:
        spec_from_dict(tree)
        valid = True
    except SpecError:
        valid = False
    assert accepts(schema, tree) is valid


def test_every_key_has_a_description_and_those_with_defaults_show_them(schema: dict[str, Any]) -> None:
    keys = {
        f"{name}.{key}": value
        for name, section in schema["properties"].items()
        for key, value in section["properties"].items()
    }
    assert list(keys) == valid_keys()
    assert all(key["description"] for key in keys.values())
    assert {name for name, key in keys.items() if "default" not in key} == {"model.path", "input.path"}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["mpinfer", "ver"], {"verify"}),
        (["mpinfer", "run", "--res"], {"--resume"}),
        (["mpinfer", "run", "--set", "parallel.st"], {"parallel.stages="}),
        (["mpinfer", "completion", "z"], {"zsh"}),
        (["mpinfer", "be"], {"bench"}),
        (["mpinfer", "bench", "tr"], {"transport"}),
        (["mpinfer", "bench", "--str"], {"--strategies"}),
        (["mpinfer", "bench", "transport", "--la"], {"--largest"}),
        (["mpinfer", "bench", "transport", "--str"], set()),
        (["mpinfer", "verify", "--set-nothing"], set()),
    ],
    ids=lambda value: " ".join(value),
)
def test_bash_completes(typed: list[str], offered: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    ask = f'COMP_WORDS=({" ".join(typed)}); COMP_CWORD={len(typed) - 1}; _mpinfer; printf "%s\\n" "${{COMPREPLY[@]}}"'
    shell = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True, check=True)
    assert set(shell.stdout.split()) == offered


def test_zsh_gets_the_same_through_its_own_bridge(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    bash = capsys.readouterr().out
    assert main(["completion", "zsh"]) == 0
    first, _, rest = capsys.readouterr().out.partition("\n")
    assert "bashcompinit" in first
    assert rest == bash
