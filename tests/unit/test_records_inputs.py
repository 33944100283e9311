import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpinfer.errors import InputError, ModelError, RecordError
from mpinfer.plugins import load_object
from mpinfer.records.inputs import Input, input_format, open_input
from mpinfer.records.loader import make_loader
from mpinfer.records.reader import JsonlInput
from mpinfer.spec import InputSpec


def passes(record: dict[str, Any]) -> str | None:
    return None


def opened(path: Path | str, **keys: Any) -> Input:
    return open_input(InputSpec(str(path), **keys), passes, None)


def handed_out(records: Input) -> list[dict[str, Any]]:
    return [json.loads(records.line(index)) for index in range(len(records))]


def loaded(path: Path | str, **keys: Any) -> list[dict[str, Any]]:
    """The fields of each record, through the line that is handed out."""
    load = make_loader(InputSpec(str(path), **keys))
    return [load(record) for record in handed_out(opened(path, **keys))]


def problem(path: Path | str, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(path, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path, data: bytes | str = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def touched(path: Path) -> None:
    """Change nothing of a file but its time."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


# Formats


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("a.json", "jsonl"),
        ("a.txt", "jsonl"),
        ("a", "jsonl"),
        ("a:b.jsonl", "dataset"),  # there is no such file
        ("a.csv", "csv"),
        ("a.TSV", "csv"),
        ("a.parquet", "parquet"),
        ("a.npy", "npy"),
        ("a.npz", "npz"),
        ("a.safetensors", "safetensors"),
        ("a.JPEG", "images"),
        ("a.flac", "audio"),
        ("package.module:name", "dataset"),
    ],
)
def test_format_by_name(name: str, kind: str) -> None:
    assert input_format(InputSpec(name)) == kind
    assert input_format(InputSpec(name, format="npy")) == "npy"


@pytest.mark.parametrize(("name", "kind"), [("d/x.PNG", "images"), ("x.wav", "audio"), ("x.parquet", "parquet")])
def test_format_by_what_a_folder_holds(tmp_path: Path, name: str, kind: str) -> None:
    write(tmp_path / name)
    write(tmp_path / "notes.txt")
    write(tmp_path / ".hidden.mp3")
    write(tmp_path / ".git/x.jpg")
    assert input_format(InputSpec(str(tmp_path))) == kind


def test_a_folder_that_does_not_say_its_format(tmp_path: Path) -> None:
    assert "neither images nor audio" in problem(tmp_path)
    write(tmp_path / "a.png")
    write(tmp_path / "b.wav")
    message = problem(tmp_path)
    assert "holds audio and images; set input.format" in message
    assert opened(tmp_path, format="audio").ids == ["b.wav"]


def test_a_file_whose_name_looks_like_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a:b", '{"x": 1}\n')
    assert input_format(InputSpec("a:b")) == "jsonl"


def test_lines_go_to_the_reader_of_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", '{"x": 1, "id": "a"}\n')
    assert isinstance(opened(path), JsonlInput)
    batch = open_input(InputSpec(str(path), format="openai-batch"), passes, lambda record: {"y": record["x"]})
    assert batch.line(0) == b'{"y": 1}'
    with pytest.raises(InputError, match=r"none\.jsonl: the input cannot be read"):
        opened(tmp_path / "none.jsonl")


def test_lines_keep_their_fields_but_the_id(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", '{"id": 3, "review": "good", "stars": 5}\n')
    assert loaded(path) == [{"review": "good", "stars": 5}]
    assert loaded(path, columns=("text=review",)) == [{"text": "good"}]


def test_a_line_without_the_column_fails_alone(tmp_path: Path) -> None:
    load = make_loader(InputSpec("in.jsonl", columns=("text=review",)))
    with pytest.raises(RecordError, match="no column 'review'; the columns are id, text"):
        load({"id": 0, "text": "x"})
    assert load({"id": 1, "review": "x"}) == {"text": "x"}


def test_the_run_indexes_its_input_without_numpy() -> None:
    code = "import mpinfer.records.inputs, mpinfer.records.loader, sys; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# Folders


def test_images_of_a_folder(tmp_path: Path) -> None:
    for size, name in enumerate(["b.png", "a/z.JPG", "a.webp", "a/.no.png", ".no/x.png", "a/notes.txt"], start=1):
        write(tmp_path / name, b"x" * size)
    records = opened(tmp_path)
    assert records.ids == ["a.webp", "a/z.JPG", "b.png"]  # as text: "." sorts before "/"
    assert handed_out(records)[1] == {"id": "a/z.JPG", "image": str(tmp_path / "a/z.JPG")}
    assert (list(records.lengths), records.total_bytes, len(records)) == ([3, 2, 1], 6, 3)
    assert records.refused == {}
    assert loaded(tmp_path)[2] == {"image": str(tmp_path / "b.png")}


def test_one_sound(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp3")
    write(tmp_path / "b.mp3")
    assert handed_out(opened(path)) == [{"id": "a.mp3", "audio": str(path)}]
    assert loaded(path) == [{"audio": str(path)}]


def test_a_folder_is_another_input_when_a_file_is_renamed_or_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png")
    seen = [opened(tmp_path).sha256]
    assert opened(tmp_path).sha256 == seen[0]
    write(path, b"xy")
    seen.append(opened(tmp_path).sha256)
    touched(path)
    seen.append(opened(tmp_path).sha256)
    path.rename(tmp_path / "b.png")
    seen.append(opened(tmp_path).sha256)
    assert len(set(seen)) == 4


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"\xff.png"), "wb") as file:
        file.write(b"x")
    (fields,) = loaded(tmp_path)
    assert Path(fields["image"]).read_bytes() == b"x"


def test_folders_without_what_was_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    assert "the folder holds no image" in problem(tmp_path, format="images")
    assert "No such file" in problem(tmp_path / "none.png")
    assert "No such file" in problem(tmp_path / "none", format="images")
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere")
    assert f"{tmp_path}/gone.wav cannot be read" in problem(tmp_path)


# CSV


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_rows_of_a_csv_file(tmp_path: Path, end: str, last: bool, bom: str) -> None:
    rows = ["id,text,n", 'x,"a, ""b""",1', "", f'y,"é{end}{end}z",', "z,,03"]
    path = write(tmp_path / "in.csv", bom + end.join(rows) + end * last)
    records = opened(path)
    expected = [
        {"id": "x", "text": 'a, "b"', "n": "1"},
        {"id": "y", "text": f"é{end}{end}z", "n": ""},
        {"id": "z", "text": "", "n": "03"},
    ]
    assert records.ids == ["x", "y", "z"]
    assert [json.loads(records.line(index)) for index in (2, 0, 1)] == [expected[2], expected[0], expected[1]]
    assert len(records.lengths) == 3
    assert records.total_bytes == sum(records.lengths)
    assert loaded(path)[1] == {"text": f"é{end}{end}z", "n": ""}
    records.close()


def test_rows_without_ids_get_their_index(tmp_path: Path) -> None:
    records = opened(write(tmp_path / "in.tsv", "a,b\tc\n1\t2\n3\t4\n"))
    assert list(records.ids) == [0, 1]
    assert handed_out(records) == [{"id": 0, "a,b": "1", "c": "2"}, {"id": 1, "a,b": "3", "c": "4"}]


def test_columns_of_a_csv_file_renamed(tmp_path: Path) -> None:
    path = write(tmp_path / "in.csv", "id,key,review,stars\n0,k,good,5\n0,m,bad,1\n")
    columns = ("text=review", "id=key", "stars")
    assert handed_out(opened(path, columns=columns)) == [
        {"id": "k", "text": "good", "stars": "5"},
        {"id": "m", "text": "bad", "stars": "1"},
    ]
    assert loaded(path, columns=columns) == [{"text": "good", "stars": "5"}, {"text": "bad", "stars": "1"}]
    assert list(opened(path, columns=("text=review",)).ids) == [0, 1]


def test_a_csv_file_is_another_input_when_its_bytes_are(tmp_path: Path) -> None:
    path = write(tmp_path / "in.csv", "a\n1\n")
    first = opened(path).sha256
    touched(path)
    assert opened(path).sha256 == first
    assert opened(write(path, "a\n2\n")).sha256 != first


def test_a_long_value(tmp_path: Path) -> None:
    path = write(tmp_path / "in.csv", "text\n" + "x" * 200_000 + "\n")
    assert loaded(path) == [{"text": "x" * 200_000}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b\n1,2\n3\n", "line 3 has 1 columns, the header has 2; correct that line"),
        ('a,b\n"1\n1",2\n"3\n3",4,5\n', "line 4 has 3 columns"),
        ("a,a\n1,2\n", "the first line must name each column, once"),
        ("", "the first line must name each column"),
        ("a,b\n\n", "has no row below its header"),
        ("id,a\nx,1\n\nx,2\n", "id 'x' is on lines 2 and 4, but ids must be unique"),
        ('a\n"x\n', "unexpected end of data"),
        ('a\n"x"y\n', "is no table"),
        (b"a\n\xff\n", "is not UTF-8"),
        ("a\nbad\n", "line 2: a is bad; correct that line"),
    ],
)
def test_csv_files_that_are_refused(tmp_path: Path, content: bytes | str, words: str) -> None:
    path = write(tmp_path / "in.csv", content)
    with pytest.raises(InputError) as caught:
        open_input(InputSpec(str(path)), lambda record: "a is bad" if record.get("a") == "bad" else None, None)
    assert str(caught.value).startswith(f"input.path={path}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (("text=body",), "input.columns=text=body: no column 'body'; the columns are id, review"),
        (("review", "stars"), "input.columns=stars: no column 'stars'"),
        (("text=review", "text=id"), "input.columns=text=id: the field 'text' has a column already"),
    ],
)
def test_columns_that_a_table_does_not_have(tmp_path: Path, columns: tuple[str, ...], words: str) -> None:
    assert words in problem(write(tmp_path / "in.csv", "id,review\n1,x\n"), columns=columns)
    pq.write_table(pa.table({"id": [1], "review": ["x"]}), tmp_path / "in.parquet")
    assert words in problem(tmp_path / "in.parquet", columns=columns)


def test_tables_that_cannot_be_opened(tmp_path: Path) -> None:
    assert "No such file" in problem(tmp_path / "none.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    assert "not a regular file" in problem(tmp_path / "pipe.csv")


def test_a_csv_file_that_became_shorter(tmp_path: Path) -> None:
    path = write(tmp_path / "in.csv", "a\n" + "x" * 100_000 + "\nlast\n")
    records = opened(path)
    os.truncate(path, 10)
    with pytest.raises(InputError, match="became shorter while it was in use"):
        records.line(0)


# Parquet


def test_rows_of_parquet_files(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    (folder / "sub").mkdir(parents=True)
    write(folder / ".part.parquet")
    pq.write_table(pa.table({"id": ["a", "b", "c"], "n": [1, 2, 3]}), folder / "1.parquet", row_group_size=2)
    pq.write_table(pa.table({"n": pa.array([], pa.int64()), "id": pa.array([], pa.string())}), folder / "2.parquet")
    pq.write_table(pa.table({"n": [4], "id": ["d"]}), folder / "sub/0.parquet")
    records = opened(folder)
    assert records.ids == ["a", "b", "c", "d"]
    assert handed_out(records)[3] == {"id": "d", "row": 3}
    assert len(records.lengths) == len(records) == 4
    assert records.total_bytes == sum(file.stat().st_size for file in folder.rglob("[0-9].parquet"))
    load = make_loader(InputSpec(str(folder)))
    assert [load({"id": "x", "row": row}) for row in (3, 0, 2, 1)] == [{"n": 4}, {"n": 1}, {"n": 3}, {"n": 2}]
    with pytest.raises(RecordError, match="row 4: cannot be read"):
        load({"id": "x", "row": 4})


def test_parquet_values_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    image = {"bytes": b"\x89", "path": None}
    pq.write_table(pa.table({"img": [image], "raw": [b"\0\1"], "vector": [[1.5, None]], "n": [7]}), path)
    assert list(opened(path).ids) == [0]
    assert loaded(path) == [{"img": image, "raw": b"\0\1", "vector": [1.5, None], "n": 7}]
    assert loaded(path, columns=("image=img", "id=n")) == [{"image": image}]
    assert opened(path, columns=("id=n",)).ids == [7]
    assert loaded(path, columns=("x=n", "y=n")) == [{"x": 7, "y": 7}]


def test_a_row_group_is_read_once_for_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"n": range(6)}), path, row_group_size=3)
    load = make_loader(InputSpec(str(path)))
    read: list[int] = []
    real = pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, **keys: Any) -> Any:
        read.append(group)
        return real(self, group, **keys)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert [load({"row": row})["n"] for row in (0, 2, 1, 3, 5, 4, 0)] == [0, 2, 1, 3, 5, 4, 0]
    assert read == [0, 1, 0]


def test_no_parquet_file_stays_open(tmp_path: Path) -> None:
    for number in range(20):  # a folder may have thousands, a process may often open 1024
        pq.write_table(pa.table({"id": [number], "n": [number]}), tmp_path / f"{number:02}.parquet")
    before = len(os.listdir("/proc/self/fd"))
    records, load = opened(tmp_path), make_loader(InputSpec(str(tmp_path)))
    assert len(os.listdir("/proc/self/fd")) == before
    assert [load(record)["n"] for record in handed_out(records)] == list(range(20))
    assert len(os.listdir("/proc/self/fd")) == before


def test_parquet_files_that_are_refused(tmp_path: Path) -> None:
    def table(name: str, **columns: Any) -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / name)
        return tmp_path / name

    assert "cannot be read as Parquet" in problem(write(tmp_path / "no.parquet", b"PAR1"))
    assert "cannot be read as Parquet" in problem(tmp_path / "none.parquet")
    assert "has no row" in problem(table("empty.parquet", n=pa.array([], pa.int64())))
    for ids in ([1, 1], [None, 1], [True, False], [1.0, 2.0]):
        assert "column 'id' is the id" in problem(table("ids.parquet", id=ids))
    (tmp_path / "nothing").mkdir()
    assert "holds no .parquet file" in problem(tmp_path / "nothing", format="parquet")
    table("d/1.parquet", id=["a"], n=[1])
    table("d/2.parquet", n=[2])
    assert "2.parquet has the columns n, the first file id, n" in problem(tmp_path / "d")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'mpinfer[parquet]'" in problem(write(tmp_path / "in.parquet"))


# Arrays


def safetensors(path: Path, header: Any, data: bytes = b"", header_bytes: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return write(path, struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data)


def tensor(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint16", "int8", "bool", ">f4"])
def test_rows_of_an_npy_file(tmp_path: Path, dtype: str) -> None:
    values = np.arange(12).reshape(3, 2, 2).astype(dtype)
    np.save(tmp_path / "in.npy", values)
    records = opened(tmp_path / "in.npy")
    assert handed_out(records) == [{"id": row, "row": row} for row in range(3)]
    assert len(records.lengths) == len(records) == 3
    rows = loaded(tmp_path / "in.npy")
    for row, fields in enumerate(rows):
        assert fields.keys() == {"input"}
        assert type(fields["input"]) is np.ndarray
        assert fields["input"].dtype == values.dtype
        assert np.array_equal(fields["input"], values[row])
        fields["input"][:] = 0  # a copy: the next reader still finds the file's
    assert np.array_equal(loaded(tmp_path / "in.npy")[1]["input"], values[1])


def test_numbers_as_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.array([1.5, 2.5]))
    fields = loaded(tmp_path / "in.npy")[1]
    assert fields["input"].shape == ()
    assert fields["input"] == 2.5


def test_rows_of_an_npz_file(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "in.npz", x=np.arange(4).reshape(2, 2), y=np.array([7, 8], np.uint16))
    fields = loaded(tmp_path / "in.npz")[1]
    assert fields.keys() == {"x", "y"}
    assert fields["x"].tolist() == [2, 3]
    assert (fields["y"].dtype, fields["y"].tolist()) == (np.uint16, 8)


def test_rows_of_a_safetensors_file(tmp_path: Path) -> None:
    halves = struct.pack("<4H", 0x3F80, 0xC040, 0x0001, 0x7F80)  # 1, -3, the smallest, infinity
    whole = np.array([[1, 65535], [3, 4]], np.uint16).tobytes()
    header = {
        "__metadata__": {"format": "pt"},
        "b": tensor("BF16", [2, 2], 0, 8),
        "u": tensor("U16", [2, 2], 8, 16),
        "s": tensor("BF16", [2], 16, 20),
    }
    path = safetensors(tmp_path / "in.SAFETENSORS", header, halves + whole + halves[:4])
    first, second = loaded(path)
    assert first.keys() == {"b", "u", "s"}
    assert all(type(value) is np.ndarray for value in (*first.values(), *second.values()))
    assert (first["b"].dtype, first["b"].tolist()) == (np.float32, [1.0, -3.0])
    assert second["b"].tolist() == [2.0**-133, float("inf")]
    assert (first["u"].dtype, first["u"].tolist()) == (np.uint16, [1, 65535])
    assert (second["s"].dtype, second["s"].shape, second["s"].tolist()) == (np.float32, (), -3.0)


def test_safetensors_as_their_own_library_writes_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in ("bfloat16", "float16", "int64")}
    save_file(values, tmp_path / "in.safetensors")
    for row, fields in enumerate(loaded(tmp_path / "in.safetensors")):
        assert {name: value.tolist() for name, value in fields.items()} == {
            n: v[row].tolist() for n, v in values.items()
        }


def test_arrays_are_another_input_when_their_file_or_shape_is(tmp_path: Path) -> None:
    path = tmp_path / "in.npy"
    np.save(path, np.zeros((2, 3), np.float32))
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    first = opened(path).sha256
    assert opened(path).sha256 == first
    np.save(path, np.zeros((3, 2), np.float32))
    os.utime(path, ns=times)
    second = opened(path).sha256
    touched(path)
    assert len({first, second, opened(path).sha256}) == 3


def test_the_given_format_counts_and_not_the_suffix(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.ones((2, 3)))
    (tmp_path / "in.npz").rename(tmp_path / "in.bin")
    assert loaded(tmp_path / "in.bin", format="npz")[0]["x"].tolist() == [1, 1, 1]
    assert "cannot be read as npy" in problem(tmp_path / "in.bin", format="npy")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array(1.0), "holds input []; give arrays with equally many rows, one or more"),
        (np.zeros((0, 2)), "input.path="),
        (np.array([{"a": 1}], dtype=object), "cannot be read as npy"),
    ],
)
def test_npy_files_that_are_refused(tmp_path: Path, values: np.ndarray, words: str) -> None:
    np.save(tmp_path / "in.npy", values, allow_pickle=True)
    assert words in problem(tmp_path / "in.npy")


def test_arrays_that_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "cut.npy", np.ones(100))
    os.truncate(tmp_path / "cut.npy", 300)
    assert "cannot be read as npy" in problem(tmp_path / "cut.npy")
    assert "cannot be read as npy" in problem(write(tmp_path / "text.npy", b"1 2 3"))
    assert "No such file" in problem(tmp_path / "none.npy")
    np.savez(tmp_path / "rows.npz", x=np.zeros((2, 3)), y=np.zeros(3))
    assert "holds x [2, 3], y [3]; give arrays with equally many rows" in problem(tmp_path / "rows.npz")
    np.savez(tmp_path / "none.npz")
    assert "holds no array" in problem(tmp_path / "none.npz")
    np.savez(tmp_path / "object.npz", x=np.array([{}], dtype=object))
    assert "cannot be read as npz" in problem(tmp_path / "object.npz")
    np.savez(tmp_path / "cut.npz", x=np.zeros(100))
    os.truncate(tmp_path / "cut.npz", 300)
    assert "cannot be read as npz" in problem(tmp_path / "cut.npz")


@pytest.mark.parametrize(
    ("header", "data", "header_bytes", "words"),
    [
        ({"x": tensor("F32", [2], 0, 8)}, b"\0" * 7, None, "tensor 'x' does not lie in the file"),
        ({"x": tensor("F32", [2], 0, 4)}, b"\0" * 8, None, "tensor 'x' does not lie in the file"),
        ({"x": tensor("F32", [1], -4, 0)}, b"\0" * 8, None, "tensor 'x' does not lie in the file"),
        ({"x": tensor("F32", [-1, -2], 0, 8)}, b"\0" * 8, None, "cannot be read as safetensors"),
        ({"x": tensor("F4", [2], 0, 1)}, b"\0", None, "tensor 'x' is F4, not one of F64, F32"),
        ({"x": {"dtype": "F32"}}, b"", None, "cannot be read as safetensors"),
        ({"x": [1]}, b"", None, "cannot be read as safetensors"),
        ([], b"", None, "cannot be read as safetensors"),
        (b"{", b"", None, "cannot be read as safetensors"),
        (b"[" * 200_000, b"", None, "cannot be read as safetensors"),
        ({}, b"", None, "holds no array"),
        ({"x": tensor("F32", [2], 0, 8)}, b"", 1000, "a header of 1000 bytes in a file of"),
        ({"x": tensor("F32", [0, 2], 0, 0)}, b"", None, "holds x [0, 2]"),
        ({"x": tensor("F32", [], 0, 4)}, b"\0" * 4, None, "holds x []"),
        ({"x": tensor("U8", [2], 0, 2), "y": tensor("U8", [1], 2, 3)}, b"\0" * 3, None, "holds x [2], y [1]"),
    ],
)
def test_safetensors_that_are_refused(
    tmp_path: Path, header: Any, data: bytes, header_bytes: int | None, words: str
) -> None:
    assert words in problem(safetensors(tmp_path / "in.safetensors", header, data, header_bytes))


def test_a_safetensors_header_that_is_too_long_or_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path / "in.safetensors", b"\0" * 7)
    assert "cannot be read as safetensors" in problem(path)
    write(path, struct.pack("<Q", 100_000_001))
    os.truncate(path, 200_000_000)  # a hole: it takes no space
    assert "a header of 100000001 bytes" in problem(path)


# Datasets


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of the user's module, which lies in the working directory."""
    name = "user_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    write(
        tmp_path / f"{name}.py",
        """
class Items:
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item

def mixed():
    return Items({"x": 1, "y": 2}, (3, 4), [5], 6, "text", ValueError("broken\\nfile"))

def more():
    return Items(1, 2, 3)

def empty():
    return []

def fails():
    raise RuntimeError("no\\ndisk")

def endless():
    return iter([1])

def numbers():
    return {1, 2}

constant = 5
""",
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return name


def test_items_of_a_dataset(user: str) -> None:
    records = opened(f"{user}:mixed")
    assert handed_out(records) == [{"id": row, "row": row} for row in range(6)]
    assert len(records.lengths) == 6
    load = make_loader(InputSpec(f"{user}:mixed"))
    assert [load({"id": row, "row": row}) for row in range(5)] == [
        {"x": 1, "y": 2},
        {"0": 3, "1": 4},
        {"0": 5},
        {"input": 6},
        {"input": "text"},
    ]
    with pytest.raises(RecordError, match="row 5: cannot be read \\(ValueError: broken file\\)"):
        load({"id": 5, "row": 5})
    names = [f"{user}:mixed", f"{user}:more"]
    assert len({opened(name).sha256 for name in names}) == 2
    assert opened(names[0]).sha256 == records.sha256


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", "raised RuntimeError: no disk"),
        ("endless", "raised TypeError: object of type 'list_iterator' has no len()"),
        ("numbers", "gave set, without items by index"),
        ("constant", "raised TypeError: 'int' object is not callable"),
        ("empty", "the dataset is empty"),
        ("missing", "has no 'missing'; it has Items, mixed, more, empty, fails"),
    ],
)
def test_factories_that_are_refused(user: str, name: str, words: str) -> None:
    message = problem(f"{user}:{name}")
    assert message.startswith(f"input.path={user}:{name}: ")
    assert words in message


def test_objects_of_the_user(user: str, tmp_path: Path) -> None:
    assert load_object(f"{user}:constant", "model.path", ModelError) == 5
    assert load_object(f"{user}:Items.__len__", "model.path", ModelError).__name__ == "__len__"
    assert str(tmp_path) in sys.path
    for path in ("module", ":name", "module:"):
        with pytest.raises(ModelError, match=f"model.path={path}: is not of the form package.module:name"):
            load_object(path, "model.path", ModelError)
    with pytest.raises(ModelError, match="cannot be imported \\(ModuleNotFoundError: No module named 'not_there'\\)"):
        load_object("not_there:name", "model.path", ModelError)
    write(tmp_path / f"{user}_broken.py", "def f(:\n")
    with pytest.raises(ModelError, match="cannot be imported \\(SyntaxError"):
        load_object(f"{user}_broken:f", "model.path", ModelError)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "npy"])
def test_a_limit_leaves_the_first_records(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"records.{kind}"
    match kind:
        case "npy":
            np.save(path, np.arange(10.0))
        case "csv":
            write(path, "id,text\n" + "".join(f"r{n},x\n" for n in range(10)))
        case "jsonl":
            write(path, "".join(json.dumps({"id": f"r{n}", "text": "x"}) + "\n" for n in range(10)))
    every, some = opened(path), opened(path, limit=3)
    assert len(some) == len(some.ids) == len(some.lengths) == 3
    assert list(some.ids) == list(every.ids)[:3]
    assert handed_out(some) == handed_out(every)[:3]
    assert some.total_bytes == sum(every.lengths[:3])
    with pytest.raises(IndexError):
        some.ids[3]
    assert len({every.sha256, some.sha256, opened(path, limit=4).sha256}) == 3  # what a resumed run must find again
    assert opened(path, limit=10).sha256 == every.sha256
