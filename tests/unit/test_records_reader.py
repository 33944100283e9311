import hashlib
import json
import os
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpinfer.errors import InputError
from mpinfer.records import reader
from mpinfer.records.reader import JsonlInput
from mpinfer.records.rules import RecordRules
from mpinfer.spec import spec_from_dict

CHECK = RecordRules(spec_from_dict({"model": {"path": "m"}, "input": {"path": "i"}})).problem


def read(tmp_path: Path, content: bytes) -> JsonlInput:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    return JsonlInput(path, CHECK)


def problem(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(InputError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / 'in.jsonl'}: ")
    return message.removeprefix(f"{tmp_path / 'in.jsonl'}: ")


def test_records_by_index(tmp_path: Path) -> None:
    lines = [b'{"id": "a", "prompt": "x"}', b'{"prompt": "\xc3\xa9t\xc3\xa9"}', b'{"id": 7, "token_ids": [1]}']
    content = b"\n".join(lines) + b"\n"
    records = read(tmp_path, content)
    assert len(records) == 3
    assert list(records.ids) == ["a", 1, 7]
    assert [records.line(i) for i in (2, 0, 1, 2)] == [lines[2], lines[0], lines[1], lines[2]]
    assert list(records.lengths) == [len(line) for line in lines]
    assert records.total_bytes == sum(len(line) for line in lines)
    assert records.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_blank_lines_and_bom(tmp_path: Path, end: bytes, last: bool, bom: bytes) -> None:
    content = bom + end.join([b'{"prompt": "a"}', b"", b" \t", b'{"prompt": "b"}']) + (end if last else b"")
    records = read(tmp_path, content)
    assert list(records.ids) == [0, 1]
    assert [records.line(0), records.line(1)] == [b'{"prompt": "a"}', b'{"prompt": "b"}']
    assert records.sha256 == hashlib.sha256(content).hexdigest()


def test_a_byte_order_mark_is_only_tolerated_at_the_start(tmp_path: Path) -> None:
    assert problem(tmp_path, b'{"prompt": "a"}\n\xef\xbb\xbf{"prompt": "a"}').startswith("line 2: not valid JSON")


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    assert problem(tmp_path, b'\n\n{"prompt": "a"}\n\n{"x": 1}\n').startswith("line 5: missing field")


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_no_record(tmp_path: Path, content: bytes) -> None:
    assert "holds no record" in problem(tmp_path, content)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: .*No such file"):
        JsonlInput(tmp_path / "none.jsonl", CHECK)


def test_directory_and_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match="not a regular file"):
            JsonlInput(path, CHECK)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"{}")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"in\.jsonl: .*Permission denied"):
        JsonlInput(tmp_path / "in.jsonl", CHECK)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "a"', "not valid JSON"),
        (b"prompt", "not valid JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}', "not valid JSON (Extra data, column 17)"),
        (b'{"prompt": "\xff"}', "not UTF-8 (byte 0xff in column 13)"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8 (byte 0xff in column 1)"),
        (b'["prompt"]', "a record is a JSON object, not ['prompt']"),
        (b"null", "a record is a JSON object, not None"),
        (b'{"prompt": "a", "x": NaN}', "NaN is not a JSON value"),
        (b'{"prompt": "a", "x": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"prompt": "a", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"x": ' * 200_000, "nested too deeply"),
        (b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"prompt": "a", "id": true}', "id must be a string or an integer, not True"),
        (b'{"prompt": "a", "id": 1.0}', "id must be a string or an integer, not 1.0"),
        (b'{"prompt": "a", "id": null}', "id must be a string or an integer, not None"),
        (b'{"prompt": "a", "id": [1]}', "id must be a string or an integer, not [1]"),
    ],
)
def test_bad_lines(tmp_path: Path, line: bytes, words: str) -> None:
    message = problem(tmp_path, b'{"prompt": "good"}\n' + line)
    assert message.startswith("line 2: ")
    assert words in message
    assert "correct that line" in message
    assert len(message) < 300


def test_the_first_of_several_bad_lines_is_named_and_the_others_counted(tmp_path: Path) -> None:
    content = b'{"prompt": "a"}\n{}\n1\n{"prompt": "b"}\n{\n\xff\n'
    assert problem(tmp_path, content).startswith("line 2: missing field")
    assert problem(tmp_path, content).endswith("(and 3 more lines)")
    assert problem(tmp_path, b"{}\n{}\n").endswith("(and 1 more line)")
    assert "more line" not in problem(tmp_path, b'{}\n{"prompt": "a"}\n')


def test_many_records_are_found_again_and_take_little_memory(tmp_path: Path) -> None:
    lines = [b'{"id": "%d", "prompt": "%b"}' % (n, b"x" * (n % 7)) for n in range(5000)]
    ends = [b"\n\n" if n % 100 == 3 else b" \n" if n % 50 == 7 else b"\n" for n in range(5000)]
    records = read(tmp_path, b"".join(line + end for line, end in zip(lines, ends, strict=True)))
    assert [records.line(n).rstrip() for n in range(5000)] == lines
    assert list(records.ids) == [str(n) for n in range(5000)]
    held = [value for value in vars(records).values() if isinstance(value, array)]
    assert sum(len(each) * each.itemsize for each in held) < 7 * len(records)


def test_all_repeated_ids_are_counted(tmp_path: Path) -> None:
    content = b"".join(b'{"id": %d, "prompt": "x"}\n' % (n % 90) for n in range(100))
    message = problem(tmp_path, content)
    assert message.startswith("line 91: id 0 is on lines 1 and 91")
    assert message.endswith("(and 9 more lines)")


def test_duplicate_ids(tmp_path: Path) -> None:
    message = problem(tmp_path, b'\n{"id": "a", "prompt": "x"}\n{"prompt": "x"}\n\n{"id": "a", "prompt": "y"}')
    assert message.startswith("line 5: id 'a' is on lines 2 and 5")


def test_an_explicit_id_may_not_be_the_default_of_another_record(tmp_path: Path) -> None:
    message = problem(tmp_path, b'{"id": 1, "prompt": "x"}\n{"prompt": "x"}')
    assert "id 1 is on lines 1 and 2" in message
    assert "gets its index" in message


def test_a_bad_line_does_not_shift_default_ids_into_others(tmp_path: Path) -> None:
    message = problem(tmp_path, b'{}\n{"id": 1, "prompt": "x"}\n{"prompt": "x"}')
    assert message.startswith("line 1: ")
    assert "more" not in message


def test_a_string_and_an_integer_are_different_ids(tmp_path: Path) -> None:
    records = read(tmp_path, b'{"id": "1", "prompt": "x"}\n{"id": 1, "prompt": "x"}')
    assert list(records.ids) == ["1", 1]


def test_lines_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "LINE_LIMIT_BYTES", 100)
    good = b'{"prompt": "%b"}' % (b"x" * 86)
    assert len(good) == 100
    records = read(tmp_path, good + b"\n" + good)
    assert [records.line(0), records.line(1)] == [good, good]
    for long in (good + b" ", b" " * 100 + good, b"\xef\xbb\xbf" + good, b"x" * 1000, b" " * 1000):
        message = problem(tmp_path, long + b"\n" + good + b"\n{}")
        assert message.startswith("line 1: longer than the limit of 100 bytes")
        assert message.endswith("(and 1 more line)")


def test_a_file_that_shrinks_under_a_run(tmp_path: Path) -> None:
    records = read(tmp_path, b'{"prompt": "a"}\n{"prompt": "b"}\n')
    os.truncate(tmp_path / "in.jsonl", 20)
    assert records.line(0) == b'{"prompt": "a"}'
    with pytest.raises(InputError, match="became shorter"):
        records.line(1)


def test_text_is_not_held(tmp_path: Path) -> None:
    records = read(tmp_path, b'{"prompt": "%b"}\n' % (b"x" * 1_000_000) * 3)
    assert sum(sys.getsizeof(value) for value in vars(records).values()) < 200_000


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "x"},
        {"prompt": ""},
        {"token_ids": []},
        {"token_ids": [0, 5]},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": "x", "name": "y"}]},
        {"prompt": "x", "custom_id": 3, "meta": {"messages": 1}},
    ],
)
def test_good_generate_records(record: dict[str, Any]) -> None:
    assert CHECK(record) is None


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "missing field: one of prompt, messages, token_ids"),
        ({"promt": "x"}, "missing field"),
        ({"prompt": "x", "token_ids": [1]}, "prompt and token_ids"),
        ({"prompt": "x", "messages": None}, "prompt and messages"),
        ({"prompt": None}, "prompt must be a string, not None"),
        ({"prompt": ["x"]}, "prompt must be a string"),
        ({"messages": []}, "messages must be"),
        ({"messages": {}}, "messages must be"),
        ({"messages": ["x"]}, "messages must be"),
        ({"messages": [{"role": "user"}]}, "messages must be"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": 1, "content": "x"}]}, "messages must be"),
        ({"token_ids": "12"}, "token_ids must be"),
        ({"token_ids": [1, -1]}, "token_ids must be"),
        ({"token_ids": [1, True]}, "token_ids must be"),
        ({"token_ids": [1.0]}, "token_ids must be"),
    ],
)
def test_bad_generate_records(record: dict[str, Any], words: str) -> None:
    assert words in str(CHECK(record))


@given(
    st.binary(max_size=200) | st.lists(st.sampled_from([b'{"prompt": "a"}', b"{", b"\n", b"\r", b"\xef"])).map(b"".join)
)
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    try:
        records = JsonlInput(path, CHECK)
    except InputError as error:
        refusal = str(error)
    else:
        refusal = ""
        for index in range(len(records)):
            assert CHECK(json.loads(records.line(index))) is None
        records.close()
    assert "\n" not in refusal
