"""The job file: what is accepted, what is refused, and what the refusal says."""

import pytest

from mpinfer.errors import SpecError
from mpinfer.spec import load_spec, spec_from_dict

MINIMAL = {"model": {"path": "m"}, "input": {"path": "i.jsonl"}}


def write(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_defaults_and_sections(tmp_path):
    spec = load_spec(write(tmp_path, "model: {path: m}\ninput: {path: i.jsonl}\n"))
    assert spec.parallel.stages == "auto"
    assert spec.generate.max_new_tokens == 64
    assert spec_from_dict(spec.to_dict()) == spec


def test_overrides_and_output(tmp_path):
    path = write(tmp_path, "model: {path: m}\ninput: {path: i.jsonl}\n")
    spec = load_spec(path, ["parallel.stages=2", "transport.blocking=true", "generate.temperature=0"], output="o: 1")
    assert spec.parallel.stages == 2
    assert spec.transport.blocking is True
    assert spec.generate.temperature == 0.0
    assert spec.output.path == "o: 1"


def test_fingerprint_ignores_the_layout_and_sees_what_decides_results():
    base = spec_from_dict(MINIMAL)
    same = spec_from_dict({**MINIMAL, "parallel": {"stages": 3}, "output": {"path": "x"}})
    other = spec_from_dict({**MINIMAL, "generate": {"max_new_tokens": 65}})
    assert base.fingerprint() == same.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": {}}, ["modle", "unknown key", "model"]),
        ({"model": {"path": "m", "pth": 1}}, ["model.pth", "unknown key", "dtype"]),
        ({"model": {}}, ["model.path", "required", "--set"]),
        ({"model": "m"}, ["model='m'", "section"]),
        ({"model": {"path": 3}}, ["model.path=3", "str"]),
        ({"model": {"path": ""}}, ["model.path", "empty"]),
        ({"model": {"path": "m", "dtype": "float31"}}, ["model.dtype='float31'", "float32"]),
        ({"parallel": {"stages": 0}}, ["parallel.stages=0", "at least 1"]),
        ({"parallel": {"stages": True}}, ["parallel.stages=True", "int"]),
        ({"parallel": {"stages": 1.5}}, ["parallel.stages=1.5", "int"]),
        ({"parallel": {"shards": 0}}, ["parallel.shards=0", "at least 1"]),
        ({"generate": {"temperature": -1}}, ["generate.temperature=-1", "at least 0"]),
        ({"generate": {"top_p": 1.5}}, ["generate.top_p=1.5", "at most 1"]),
        ({"generate": {"top_p": 0}}, ["generate.top_p=0", "no token"]),
        ({"generate": {"min_p": float("nan")}}, ["generate.min_p=nan", "not a number"]),
        ({"generate": {"stop": ["a", 3]}}, ["generate.stop=3", "str"]),
        ({"generate": {"stop": ""}}, ["generate.stop=''", "empty"]),
        ({"generate": {"stop_token_ids": [-1]}}, ["generate.stop_token_ids=-1", "at least 0"]),
        ({"generate": {"logprobs": "all"}}, ["generate.logprobs='all'", "none"]),
        ({"generate": {"n": 2}}, ["generate.n=2", "greedy", "temperature"]),
        ({"generate": {"min_new_tokens": 65}}, ["min_new_tokens=65", "max_new_tokens=64"]),
        ({"embed": {"pooling": "max"}}, ["embed.pooling='max'", "mean"]),
        ({"transport": {"wire": "int4"}}, ["transport.wire='int4'", "none", "int8"]),
    ],
)
def test_refusals_name_value_rule_and_fix(change, words):
    with pytest.raises(SpecError) as error:
        spec_from_dict({**MINIMAL, **change})
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "override", "word"),
    [
        ("model: [", None, "not valid YAML at line 2"),
        ("- 1\n", None, "mapping"),
        ("model: {path: m}", "stages", "key.path=value"),
        ("model: {path: m}", "model.path.x=1", "not a section"),
        ("model: {path: m}", "model.path=[", "not valid YAML"),
    ],
)
def test_unreadable_files_and_overrides(tmp_path, text, override, word):
    with pytest.raises(SpecError, match=word.replace("[", r"\[")):
        load_spec(write(tmp_path, text + "\n"), [override] if override else [])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere\.yaml: the job file cannot be read"):
        load_spec(tmp_path / "nowhere.yaml")
