"""The documents keep up with the code: every key of the job file, every link."""

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from mpinfer.spec import JobSpec, load_spec

REPO = Path(__file__).parents[2]
OUTSIDE_SITE = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md")]
DOCUMENTS = [str(path.relative_to(REPO)) for path in [*OUTSIDE_SITE, *sorted((REPO / "docs").glob("**/*.md"))]]


def keys() -> Iterator[tuple[str, Any, Any]]:
    """Key, type and default of everything that a job file can hold."""
    for section, cls in typing.get_type_hints(JobSpec).items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            yield f"{section}.{field.name}", hints[field.name], field.default


def rows() -> dict[str, tuple[str, str, str]]:
    """Type, default and meaning of each key in docs/job-file.md."""
    text = (REPO / "docs" / "job-file.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.+) \|$", text, re.MULTILINE)
    assert len({key for key, *_ in found}) == len(found)
    return {key: (kind, default, meaning) for key, kind, default, meaning in found}


def choices(hint: Any) -> Iterator[Any]:
    """The values that a type lists."""
    for option in typing.get_args(hint):
        if typing.get_origin(hint) is Literal:
            yield option
        else:
            yield from choices(option)


def test_the_job_file_document_has_the_keys_of_the_spec() -> None:
    assert list(rows()) == [key for key, _, _ in keys()]


@pytest.mark.parametrize(("key", "hint", "default"), list(keys()), ids=[key for key, _, _ in keys()])
def test_the_job_file_document_has_defaults_and_choices(key: str, hint: Any, default: Any) -> None:
    kind, shown, _ = rows()[key]
    default = list(default) if isinstance(default, tuple) else default
    assert shown == "required" if default is dataclasses.MISSING else yaml.safe_load(shown.strip("`")) == default
    assert re.findall("`(.+?)`", kind) == [str(choice) for choice in choices(hint)]


def test_the_job_file_document_says_what_the_spec_says() -> None:
    sections = typing.get_type_hints(JobSpec)
    said = {
        f"{name}.{field.name}": field.metadata["about"]
        for name, cls in sections.items()
        for field in dataclasses.fields(cls)
    }
    assert {key: meaning for key, (_, _, meaning) in rows().items()} == said


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = REPO / document
    targets = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    broken = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert not broken


def test_readme_names_files_that_exist() -> None:
    """Its paths in code are of this repository, of the quickstart's outputs, or of its environment."""
    named = re.findall(
        r"(?:launch|jobs|docs|tests|mpinfer)/[\w./-]+\.(?:sh|yaml|jsonl|md|py|txt)",
        (REPO / "README.md").read_text(encoding="utf-8"),
    )
    assert named
    assert not [path for path in named if not (REPO / path).exists()]


@pytest.mark.parametrize("job", sorted((REPO / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_jobs_are_valid_and_their_input_is_there(job: Path) -> None:
    """In the repository, or made by a command that the job's first lines tell."""
    path = load_spec(job).input.path
    assert (REPO / path).exists() or f"{path}\n" in job.read_text(encoding="utf-8").split("\n\n")[0] + "\n"


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in (REPO / "docs").glob("*.md")} - {"index"}
    assert pages == {path.parent.name for path in tmp_path.glob("*/index.html")}
