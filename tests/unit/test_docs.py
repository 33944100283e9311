"""The documents keep up with the code: every key of the job file, every link."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mpinfer.spec import load_spec, valid_keys

REPO = Path(__file__).parents[2]
OUTSIDE_SITE = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md")]
DOCUMENTS = [str(path.relative_to(REPO)) for path in [*OUTSIDE_SITE, *sorted((REPO / "docs").glob("**/*.md"))]]


def test_the_tables_of_the_job_file_document_are_made_of_the_spec() -> None:
    tables = runpy.run_path(str(REPO / "docs" / "tables.py"))
    page = tables["PAGE"].read_text(encoding="utf-8")
    assert page == tables["with_tables"](page), "python docs/tables.py writes them anew"
    keys = re.findall(r"^\| `([a-z]+\.\w+)` \|", page, re.MULTILINE)
    assert keys == valid_keys()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = REPO / document
    targets = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    broken = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert not broken


@pytest.mark.parametrize("document", sorted({*DOCUMENTS} - {"CHANGELOG.md"}))
def test_files_of_the_repository_that_are_named_exist(document: str) -> None:
    named = re.findall(
        r"(?<![\w/.])(?:benchmarks|launch|jobs|docs|slurm|tests|mpinfer)/[\w./-]+\.(?:sh|yaml|jsonl|md|py|txt)",
        (REPO / document).read_text(encoding="utf-8"),
    )
    assert not [path for path in named if not (REPO / path).exists()]


@pytest.mark.parametrize("job", sorted((REPO / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_jobs_are_valid_and_their_input_is_there(job: Path) -> None:
    """In the repository, or made by a command that the job's first lines tell."""
    path = load_spec(job).input.path
    assert (REPO / path).exists() or f"{path}\n" in job.read_text(encoding="utf-8").split("\n\n")[0] + "\n"


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in (REPO / "docs").glob("*.md")} - {"index"}
    assert pages == {path.parent.name for path in tmp_path.glob("*/index.html")}
    reference = (tmp_path / "python/index.html").read_text(encoding="utf-8")
    assert all(f'id="mpinfer.api.{name}"' in reference for name in ("run", "Pipeline", "Pipeline.from_pretrained"))
