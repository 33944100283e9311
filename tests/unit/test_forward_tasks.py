"""What a job wants of a model's outputs, held against plain computations on rows."""

import json
import math

import pytest
import torch

from mpinfer.errors import ModelError, RecordError
from mpinfer.forward.tasks import Classify, Embed, Forward, load_labels, make_task
from mpinfer.spec import spec_from_dict

NAN, INF = math.nan, math.inf


def spec(task="classify", path="no-directory", **sections):
    return spec_from_dict({"model": {"path": str(path), "task": task}, "input": {"path": "r.jsonl"}, **sections})


# -- classify


def test_labels_come_best_first_with_their_softmax():
    logits = torch.tensor([[0.0, math.log(3.0), 0.0], [math.log(8.0), 0.0, 0.0]])
    first, second = Classify(["a", "b", "c"], 2).outputs({"logits": logits}, 2)
    assert first["label"] == "b"
    assert first["score"] == pytest.approx(0.6)
    assert first["top"][0] == ["b", first["score"]]
    assert [len(first["top"]), len(second["top"])] == [2, 2]
    assert first["top"][1][1] == pytest.approx(0.2)
    assert second["label"] == "a"
    assert second["top"] == [["a", pytest.approx(0.8)], [second["top"][1][0], pytest.approx(0.1)]]


def test_there_are_no_more_labels_than_classes_and_numbers_stand_for_names():
    (output,) = Classify(None, 5).outputs({"logits": torch.tensor([[0.0, 2.0, 1.0]])}, 1)
    assert [label for label, _ in output["top"]] == ["1", "2", "0"]
    assert sum(score for _, score in output["top"]) == pytest.approx(1)
    json.dumps(output)


def test_padding_rows_and_later_outputs_are_ignored():
    batch = {"logits": torch.tensor([[1.0, 0.0], [NAN, NAN]]), "states": torch.zeros(1)}
    outputs = Classify(None, 1).outputs(batch, 1)
    assert [output["label"] for output in outputs] == ["0"]


def test_halves_and_whole_numbers_are_classified_in_float32():
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        (output,) = Classify(None, 2).outputs({"logits": torch.tensor([[1, 3]], dtype=dtype)}, 1)
        assert output["score"] == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-6)


def test_nan_is_the_error_of_its_record_alone():
    logits = torch.tensor([[0.0, 1.0], [NAN, 1.0], [-INF, 0.0]])
    first, second, third = Classify(None, 2).outputs({"logits": logits}, 3)
    assert (first["label"], third["top"]) == ("1", [["1", 1.0], ["0", 0.0]])
    assert isinstance(second, RecordError)
    assert "logits" in str(second)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4, 2), ()])
def test_an_output_that_is_no_row_of_classes_is_refused(shape):
    with pytest.raises(ModelError, match=r"logits: has shape .*classify needs") as caught:
        Classify(None, 2).outputs({"logits": torch.zeros(shape)}, 1)
    assert str(list(shape)) in str(caught.value)


def test_labels_that_do_not_fit_the_classes_are_refused():
    with pytest.raises(ModelError, match="3 classes, but there are 2 labels"):
        Classify(["a", "b"], 2).outputs({"logits": torch.zeros(1, 3)}, 1)


@pytest.mark.parametrize("task", [Classify(None, 1), Embed(False), Forward()])
def test_fewer_rows_than_records_are_refused(task):
    with pytest.raises(ModelError, match=r"\[2, 3\] for 4 records"):
        task.outputs({"x": torch.zeros(2, 3)}, 4)


# -- labels


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "cat\nbig dog\n"),
        ("l.json", '["cat", "big dog"]'),
        ("l.json", '{"1": "big dog", "0": "cat"}'),
    ],
)
def test_labels_are_read_from_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    job = spec(classify={"labels": str(tmp_path / name)})
    assert load_labels(job, {"id2label": {"0": "ignored"}}) == ["cat", "big dog"]


@pytest.mark.parametrize("text", ['{"1": "a", "2": "b"}', "[1, 2]", "[]", '"a"', "{", '{"0": null}'])
def test_a_file_without_a_name_for_each_class_is_refused(tmp_path, text):
    file = tmp_path / "l.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        load_labels(spec(classify={"labels": str(file)}), None)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["none.txt", "none.json"])
def test_a_missing_file_of_labels_is_refused(tmp_path, name):
    with pytest.raises(ModelError, match=name):
        load_labels(spec(classify={"labels": str(tmp_path / name)}), None)


def test_labels_of_the_model_are_used_as_they_are():
    assert load_labels(spec(), {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}) == ["LABEL_0", "LABEL_1"]
    assert load_labels(spec(), {"id2label": {str(n): str(n) for n in range(12)}}) == [str(n) for n in range(12)]
    assert load_labels(spec(), {}) is None
    assert load_labels(spec(), None) is None


def test_the_task_of_a_directory_has_its_labels(tmp_path):
    (tmp_path / "config.json").write_text('{"id2label": {"0": "no", "1": "yes"}}')
    task = make_task(spec(path=tmp_path, classify={"top_k": 1}))
    assert task.outputs({"logits": torch.tensor([[0.0, 9.0]])}, 1)[0]["top"] == [["yes", pytest.approx(1, abs=1e-3)]]


# -- embed, forward


def test_vectors_are_normalized_if_asked():
    batch = {"logits": torch.zeros(2), "embedding": torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]])}
    plain = make_task(spec("embed", embed={"normalize": False})).outputs(batch, 2)
    unit = make_task(spec("embed")).outputs(batch, 2)
    assert [output["embedding"].tolist() for output in plain] == [[3, 4], [0, 0]]
    assert [output["embedding"].tolist() for output in unit] == [pytest.approx([0.6, 0.8]), [0, 0]]


def test_a_vector_is_the_first_output_in_float32_with_memory_of_its_own():
    (output,) = Embed(False).outputs({"output": torch.ones(4, 3, dtype=torch.bfloat16)}, 1)
    assert output["embedding"].dtype == torch.float32
    assert output["embedding"].untyped_storage().nbytes() == 3 * 4


def test_a_vector_with_nan_is_an_error_and_other_shapes_are_refused():
    first, second = Embed(True).outputs({"x": torch.tensor([[1.0, NAN], [1.0, 0.0]])}, 2)
    assert isinstance(first, RecordError)
    assert second["embedding"].tolist() == [1, 0]
    with pytest.raises(ModelError, match=r"x: has shape \[2, 3, 4\]"):
        Embed(True).outputs({"x": torch.zeros(2, 3, 4)}, 2)


def test_forward_gives_every_output_of_a_record():
    batch = {
        "a": torch.arange(12).reshape(2, 3, 2).transpose(1, 2),
        "b": torch.tensor([0.5, NAN, 2.0], dtype=torch.bfloat16),
    }
    first, second = make_task(spec("forward")).outputs(batch, 2)
    assert first["a"].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert second["a"].is_contiguous()
    assert first["a"].untyped_storage().nbytes() == 6 * 8
    assert (first["b"].item(), first["b"].dtype, first["a"].dtype) == (0.5, torch.float32, torch.int64)
    assert second["b"].isnan()
