# ruff: noqa: E501  (one case a line)
"""A table of bad input: specs, job files, weights, model directories and records. Each is refused by the command itself,
with exit code 2 and one line that names the value, the rule and the fix; nothing is written.

What only a run can refuse (output directories, layouts, launches) is in `tests/faults/test_bad_input.py`.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Tiny

from mpinfer.cli import main


class Job:
    """A job that was good, in a directory of its own."""

    def __init__(self, root: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
        self._root, self._capsys = root, capsys
        self.model, self.records, self.file = root / "model", root / "records.jsonl", root / "job.yaml"
        shutil.copytree(tiny.model, self.model)
        shutil.copy(tiny.records, self.records)
        tree = yaml.safe_load(tiny.job.read_text())
        tree |= {"model": {"path": str(self.model)}, "input": {"path": str(self.records)}}
        self.file.write_text(yaml.safe_dump(tree | {"output": {"path": str(root / "out")}}))

    def refusal(self, *options: str) -> str:
        """What the command says, with names of files as from the job's directory."""
        before = {path: path.lstat().st_mtime_ns for path in self._root.rglob("*")}
        code = main(["plan", str(self.file), "--ranks", "2", *options])
        printed = self._capsys.readouterr()
        assert (code, printed.out) == (2, ""), printed.err
        assert printed.err.startswith("mpinfer: error: ")
        assert printed.err.count("\n") == 1
        assert "Traceback" not in printed.err
        assert len(printed.err) < 1500
        assert {path: path.lstat().st_mtime_ns for path in self._root.rglob("*")} == before
        return printed.err.removeprefix("mpinfer: error: ").rstrip("\n").replace(f"{self._root}/", "")

    def write_config(self, **keys: Any) -> None:
        config = self.model / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | keys))

    def write_index(self, change: Callable[[dict[str, str]], Any]) -> None:
        index = self.model / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))

    def write_weights(self, header: Any, data_bytes: int = 16, header_bytes: int | None = None) -> None:
        """One safetensors file in the place of all."""
        self.remove_weights()
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        length = struct.pack("<Q", len(text) if header_bytes is None else header_bytes)
        (self.model / "model.safetensors").write_bytes(length + text + bytes(data_bytes))

    def remove_weights(self) -> None:
        for file in self.model.glob("model*"):
            file.unlink()


@pytest.fixture
def job(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.chdir(tmp_path)
    return Job(tmp_path, tiny, capsys)


SPECS = [
    ("generate.top_p=2", "generate.top_p=2.0: must be at most 1; lower it"),
    ("generate.top_p=-0.1", "generate.top_p=-0.1: must be at least 0; raise it"),
    ("generate.min_p=1.5", "generate.min_p=1.5: must be at most 1; lower it"),
    ("generate.top_k=-1", "generate.top_k=-1: must be at least 0; raise it"),
    ("generate.n=0", "generate.n=0: must be at least 1; raise it"),
    ("generate.n=true", "generate.n=True: must be int; correct the value"),
    ("generate.repetition_penalty=0", "generate.repetition_penalty=0.0: must be at least 0.01; raise it"),
    ("generate.seed=x", "generate.seed='x': must be int; correct the value"),
    ("generate.stop=[1]", "generate.stop=1: must be str; correct the value"),
    ("generate.stop_token_ids=[-1]", "generate.stop_token_ids=-1: must be at least 0; raise it"),
    ("generate.stop_token_ids=x", "generate.stop_token_ids='x': must be int; correct the value"),
    ("generate.logprobs=-1", "generate.logprobs=-1: must be at least 0; raise it"),
    ("generate.max_length=1", "generate.max_length=1: must be at least 2; raise it"),
    ("generate.step_tokens=0", "generate.step_tokens=0: must be at least 1; raise it"),
    ("generate.kv_cache_gb=-1", "generate.kv_cache_gb=-1.0: must be at least 0; raise it"),
    ("generate.min_new_tokens=-1", "generate.min_new_tokens=-1: must be at least 0; raise it"),
    ("generate.min_new_tokens=99", "generate.min_new_tokens=99: above generate.max_new_tokens=12; lower it"),
    ("generate.temperature=.nan", "generate.temperature=nan: is not a number; correct the value"),
    ("generate.temperature=.inf", "generate.temperature=inf: is not a finite number; correct the value"),
    ("generate.max_new_tokens=1.5", "generate.max_new_tokens=1.5: must be int; correct the value"),
    ("parallel.replicas=0", "parallel.replicas=0: must be at least 1; raise it"),
    ("parallel.stages=1.5", "parallel.stages=1.5: must be int or 'auto'; correct the value"),
    ("parallel.shards=-2", "parallel.shards=-2: must be at least 1; raise it"),
    ("parallel.micro_batch=0", "parallel.micro_batch=0: must be at least 1; raise it"),
    ("parallel.in_flight=0", "parallel.in_flight=0: must be at least 1; raise it"),
    ("parallel.memory_limit_gb=-1", "parallel.memory_limit_gb=-1.0: must be at least 0; raise it"),
    ("parallel.cluster=nowhere.yaml", "nowhere.yaml: the cluster file cannot be read (No such file or directory); give the path of a YAML file"),
    ("transport.wire=int4", "transport.wire='int4': must be 'none' or 'bf16' or 'fp16' or 'int8'; correct the value"),
    ("transport.blocking=maybe", "transport.blocking='maybe': must be bool; correct the value"),
    ("transport.progress=magic", "transport.progress='magic': must be 'points' or 'thread' or 'library'; correct the value"),
    ("stop.drain_limit_s=-1", "stop.drain_limit_s=-1.0: must be at least 0; raise it"),
    ("watchdog.timeout_s=-1", "watchdog.timeout_s=-1.0: must be at least 0; raise it"),
    ("watchdog.timeout_s=.nan", "watchdog.timeout_s=nan: is not a number; correct the value"),
    ("model.task=translate", "model.task='translate': must be 'generate' or 'score' or 'embed' or 'classify' or 'forward'; correct the value"),
    ("model.quantize=int4", "model.quantize='int4': must be 'none' or 'int8'; correct the value"),
    ("model.trust=perhaps", "model.trust='perhaps': must be bool; correct the value"),
    ("input.format=xml", "input.format='xml': must be 'jsonl' or 'openai-batch' or 'csv' or 'parquet' or 'images' or 'audio' or 'npy' or 'npz' or 'safetensors' or 'dataset' or 'auto'; correct the value"),
    ("images.resize=0", "images.resize=0: must be at least 1; raise it"),
    ("images.mean=[a]", "images.mean='a': must be float; correct the value"),
    ("audio.max_seconds=-1", "audio.max_seconds=-1.0: must be at least 0; raise it"),
    ("audio.sample_rate=0", "audio.sample_rate=0: must be at least 1; raise it"),
    ("classify.top_k=0", "classify.top_k=0: must be at least 1; raise it"),
    ("embed.pooling=max", "embed.pooling='max': must be 'mean' or 'last' or 'first' or 'auto'; correct the value"),
    ("embed.normalize=2", "embed.normalize=2: must be bool; correct the value"),
    ("output.arrays=hdf5", "output.arrays='hdf5': must be 'inline' or 'npy' or 'auto'; correct the value"),
    ("output.responses=x.jsonl", "output.responses='x.jsonl': input.format auto has no responses; leave it out, or set input.format to openai-batch"),
    ("model=5", "model=5: a section is a mapping of keys; indent its keys below it"),
    ("generate=[]", "generate=[]: a section is a mapping of keys; indent its keys below it"),
    ("model.path=[1]", "model.path=[1]: must be str; correct the value"),
    ("model.path=", "model.path=None: must be str; correct the value"),
    ("a.b.c=1", "a: unknown key; valid keys here are model, input, output, parallel, generate, embed, classify, images, audio, transport, stop, watchdog"),
    ("=3", "--set =3: an override is key.path=value; write for example --set parallel.stages=2"),
    ("generate.n=2", "generate.n=2: greedy samples are all the same; raise generate.temperature above 0"),
    ("generate.top_p=0", "generate.top_p=0: leaves no token to choose; use a value above 0, or temperature 0"),
    ("model.path.x=1", "--set model.path.x=1: 'path' is not a section; valid keys are model.path, "),
]  # fmt: skip

BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(8)
)
FILES = [
    (b"", "model.path: a required key is missing; add it to the job file"),
    (b"42", "job.yaml: a job file is a mapping of sections, not a int; start with 'model:'"),
    (b"model:\n\tpath: x\n", "job.yaml: not valid YAML at line 2, column 1 (found character '\\t' that cannot start"),
    (b"\x00\xff\xfe", "job.yaml: the job file cannot be read ('utf-8' codec can't decode byte 0xff"),
    (b"model: {path: caf\xe9}\n", "job.yaml: the job file cannot be read ('utf-8' codec can't decode byte 0xe9"),
    (b"model: {path: a}\nmodel: {path: b}\n", "job.yaml: not valid YAML at line 2, column 1 (the key 'model' is there twice"),
    (b"model: {path: a, path: b}\n", "job.yaml: not valid YAML at line 1, column 18 (the key 'path' is there twice"),
    (b"model: !!python/object/apply:os.system [touch pwned]\n", "(could not determine a constructor for the tag"),
    (BOMB, "a: unknown key; valid keys here are model, input"),
    (b"model: " + b"[" * 20000, "job.yaml: not usable YAML (nested too deeply); correct it"),
    (b"model: {path: a}\n---\nmodel: {path: b}\n", "job.yaml: not valid YAML at line 2, column 1 (but found another document)"),
    (b"model: {path: a}\n", "input.path: a required key is missing; add it to the job file"),
    (b"model: {path: a}\ninput:\n", "input.path: a required key is missing; add it to the job file"),
    (b"model: {path: a}\n3: 4\n", "3: unknown key; valid keys here are model, input"),
    (b"model: {path: 'a\n", "job.yaml: not valid YAML at line 2, column 1 (found unexpected end of stream); correct that line"),
    (b"model: &m {path: *m}\ninput: {path: x}\n", "model.path={'path': {'path': "),
]  # fmt: skip

GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
AGAIN = "fetch or convert the model again"
NO_WEIGHTS = "model.safetensors: not a safetensors file"
WEIGHTS: list[tuple[str, Callable[[Job], object], str]] = [
    ("huge header", lambda job: job.write_weights({}, 0, 2**63), f"{NO_WEIGHTS} (a header of 9223372036854775808 bytes in a file of 10)"),
    ("long header", lambda job: job.write_weights({}, 0, 10**9), f"{NO_WEIGHTS} (a header of 1000000000 bytes in a file of 10)"),
    ("no JSON", lambda job: job.write_weights(b"{'a'"), f"{NO_WEIGHTS} (Expecting property name"),
    ("no object", lambda job: job.write_weights([]), f"{NO_WEIGHTS} (its header is no JSON object)"),
    ("deep", lambda job: job.write_weights(b'{"a":' * 50_000), f"{NO_WEIGHTS} (maximum recursion depth"),
    ("no UTF-8", lambda job: job.write_weights(b'{"caf\xe9":1}'), f"{NO_WEIGHTS} ('utf-8' codec can't decode byte 0xe9"),
    ("cut off", lambda job: job.write_weights({"w": GOOD | {"shape": [16], "data_offsets": [0, 64]}}), "truncated or damaged"),
    ("negative", lambda job: job.write_weights({"w": GOOD | {"data_offsets": [-16, 0]}}), "tensor 'w' has dtype 'F32', shape [4] and data_offsets [-16, 0]"),
    ("reversed", lambda job: job.write_weights({"w": GOOD | {"data_offsets": [16, 0]}}), "tensor 'w' of shape [4] in F32 has -16 bytes"),
    ("overlap", lambda job: job.write_weights({"v": GOOD, "w": GOOD}), "tensor 'w' shares bytes with another"),
    ("hole", lambda job: job.write_weights({"w": GOOD | {"data_offsets": [16, 32]}}, 32), "tensor 'w' lies behind bytes that are no tensor's"),
    ("other shape", lambda job: job.write_weights({"w": GOOD | {"shape": [5]}}), "tensor 'w' of shape [5] in F32 has 16 bytes"),
    ("vast shape", lambda job: job.write_weights({"w": GOOD | {"shape": [2**62, 4]}}), "tensor 'w' of shape [4611686018427387904, 4] in F32 has 16 bytes"),
    ("negative shape", lambda job: job.write_weights({"w": GOOD | {"shape": [-4, -1]}}), "shape [-4, -1]"),
    ("shape of text", lambda job: job.write_weights({"w": GOOD | {"shape": "4"}}), "shape '4'"),
    ("no offsets", lambda job: job.write_weights({"w": {"dtype": "F32", "shape": [4]}}), "tensor 'w' is without dtype, shape or data_offsets"),
    ("no entry", lambda job: job.write_weights({"w": 5}), "tensor 'w' is without dtype, shape or data_offsets"),
    ("twice", lambda job: job.write_weights(b'{"w":%b,"w":%b}' % ((json.dumps(GOOD).encode(),) * 2)), "its header names a tensor twice"),
    ("empty file", lambda job: [file.write_bytes(b"") for file in job.model.glob("*.safetensors")], "not a safetensors file"),
    ("two bytes", lambda job: [file.write_bytes(b"\1\2") for file in job.model.glob("*.safetensors")], "not a safetensors file"),
    ("of another model", lambda job: job.write_weights({"w": GOOD}), "tensor 'model.embed_tokens.weight' is missing"),
]  # fmt: skip

INDEX = "model/model.safetensors.index.json"
NO_INDEX = f"{INDEX}: not a safetensors index (no weight_map from tensors to files); fetch the model again"
MODELS: list[tuple[str, Callable[[Job], object], str]] = [
    ("file above", lambda job: job.write_index(lambda files: files | {"w": "../w.safetensors"}), f"{INDEX}: names '../w.safetensors', a path outside the model directory; refuse this model"),
    ("file anywhere", lambda job: job.write_index(lambda files: files | {"w": "/etc/passwd"}), f"{INDEX}: names '/etc/passwd', a path outside the model directory; refuse this model"),
    ("pickle in the index", lambda job: job.write_index(lambda files: files | {"w": "w.bin"}), "model/w.bin: this shard is named in the index but missing; fetch it again"),
    ("number in the index", lambda job: job.write_index(lambda files: files | {"w": 7}), NO_INDEX),
    ("list in the index", lambda job: job.write_index(list), NO_INDEX),
    ("index of nothing", lambda job: job.write_index(lambda files: {}), "tensor 'model.embed_tokens.weight' is missing"),
    ("index without map", lambda job: (job.model.parent / INDEX).write_text("{}"), NO_INDEX),
    ("index no object", lambda job: (job.model.parent / INDEX).write_text("[]"), f"{INDEX}: not valid JSON (not an object)"),
    ("index no JSON", lambda job: (job.model.parent / INDEX).write_text("{"), f"{INDEX}: not valid JSON (Expecting property name"),
    ("config no object", lambda job: (job.model / "config.json").write_text("[]"), "model/config.json: not valid JSON (not an object)"),
    ("config no UTF-8", lambda job: (job.model / "config.json").write_bytes(b'{"a":"\xe9"}'), "model/config.json: not valid JSON ('utf-8' codec"),
    ("deep config", lambda job: (job.model / "config.json").write_text('{"a":' * 100_000), "model/config.json: not valid JSON (maximum recursion"),
    ("config without type", lambda job: (job.model / "config.json").write_text("{}"), "model/config.json: transformers refuses it (Unrecognized model"),
    ("type a number", lambda job: job.write_config(model_type=5), "model/config.json: transformers refuses it"),
    ("code of its own", lambda job: job.write_config(model_type="own", auto_map={"AutoConfig": "own.Config"}), "model/config.json: transformers refuses it"),
    ("fewer layers", lambda job: job.write_config(num_hidden_layers=0), "tensor 'model.layers.0.input_layernorm.weight' belongs to no part"),
    ("no heads", lambda job: job.write_config(num_attention_heads=0), "model/config.json: transformers refuses it (integer modulo by zero)"),
    ("size of text", lambda job: job.write_config(hidden_size="big"), "model/config.json: transformers refuses it"),
    ("vast vocabulary", lambda job: job.write_config(vocab_size=10**12), "config.json: its model cannot be built"),
    ("no weights", lambda job: job.remove_weights(), "model: has no model.safetensors; convert the weights to safetensors first"),
    ("a pickle alone", lambda job: (job.remove_weights(), (job.model / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")), "model: has no model.safetensors; convert"),
    ("a loop", lambda job: (shutil.rmtree(job.model), os.symlink(job.model, job.model)), "model.path=model: no such directory"),
    ("a file", lambda job: (shutil.rmtree(job.model), job.model.write_text("x")), "model.path=model: no such directory"),
    ("no records", lambda job: job.records.unlink(), "records.jsonl: the input cannot be read (No such file or directory)"),
    ("records in a loop", lambda job: (job.records.unlink(), os.symlink(job.records, job.records)), "records.jsonl: the input cannot be read (Too many levels"),
    ("records in a pipe", lambda job: (job.records.unlink(), os.mkfifo(job.records)), "records.jsonl: not a regular file"),
    ("records in a folder", lambda job: (job.records.unlink(), job.records.mkdir()), "input.path=records.jsonl: the folder holds neither"),
]  # fmt: skip

TOKENS = "token_ids must be a list of integers from 0 up"
MESSAGES = 'messages must be a non-empty list of {"role": string, "content": string}'
RECORDS = [
    (b'{"token_ids": [1', "not valid JSON (Expecting ',' delimiter, column 17)"),
    (b'{"token_ids": [1]} x', "not valid JSON (Extra data, column 20)"),
    (b'{"token_ids": NaN}', "not valid JSON (NaN is not a JSON value)"),
    (b'{"token_ids": [' + b"9" * 5000 + b"]}", "not valid JSON (Exceeds the limit (4300 digits)"),
    (b'{"x": ' * 100_000, "not usable JSON (nested too deeply)"),
    (b"\xff", "not UTF-8 (byte 0xff in column 1)"),
    ('{"token_ids": [1]}'.encode("utf-16"), "not UTF-8 (byte 0xff in column 1)"),
    (b"[]", "a record is a JSON object, not []"),
    (b"null", "a record is a JSON object, not None"),
    (b"7", "a record is a JSON object, not 7"),
    (b'{"token_ids": "12"}', TOKENS),
    (b'{"token_ids": [1.5]}', TOKENS),
    (b'{"token_ids": [-1]}', TOKENS),
    (b'{"token_ids": [true]}', TOKENS),
    (b'{"prompt": 5}', "prompt must be a string, not 5"),
    (b'{"prompt": null}', "prompt must be a string, not None"),
    (b'{"prompt": "a", "messages": []}', "prompt and messages are given together, but exactly one is allowed"),
    (b'{"messages": []}', MESSAGES),
    (b'{"messages": "hi"}', MESSAGES),
    (b'{"messages": [{"role": "user"}]}', MESSAGES),
    (b'{"token_ids": [1], "id": null}', "id must be a string or an integer, not None"),
    (b'{"token_ids": [1], "id": 1.5}', "id must be a string or an integer, not 1.5"),
    (b'{"token_ids": [1], "id": ["a"]}', "id must be a string or an integer, not ['a']"),
    (b'{"token_ids": [1], "id": 0}', "id 0 is on lines 1 and 2, but ids must be unique (a record without an id gets its index)"),
    (b'{"token_ids": [1], "generate": 5}', "generate must be an object of its keys, not 5"),
    (b'{"token_ids": [1], "generate": {"nonesuch": 1}}', "generate.nonesuch: unknown key; valid keys here are max_new"),
    (b'{"token_ids": [1], "generate": {"temperature": -1}}', "generate.temperature=-1.0: must be at least 0"),
    (b'{"token_ids": [1], "generate": {"step_tokens": 4}}', "generate.step_tokens: unknown key; valid keys here are max_new"),
    (b'{"token_ids": [1], "generate": {"top_p": "x"}}', "generate.top_p='x': must be float"),
]  # fmt: skip


def test_there_are_at_least_120() -> None:
    assert len(SPECS) + len(FILES) + len(WEIGHTS) + len(MODELS) + len(RECORDS) >= 120


@pytest.mark.parametrize(("key", "says"), SPECS, ids=[key for key, _ in SPECS])
def test_keys(job: Job, key: str, says: str) -> None:
    assert job.refusal("--set", key).startswith(says)


@pytest.mark.parametrize(("text", "says"), FILES, ids=range(len(FILES)))
def test_job_files(job: Job, text: bytes, says: str) -> None:
    job.file.write_bytes(text)
    assert says in job.refusal()


@pytest.mark.parametrize(("break_it", "says"), [case[1:] for case in WEIGHTS], ids=[case[0] for case in WEIGHTS])
def test_weights(job: Job, break_it: Callable[[Job], object], says: str) -> None:
    break_it(job)
    told = job.refusal()
    assert says in told
    assert told.endswith(AGAIN)


@pytest.mark.parametrize(("break_it", "says"), [case[1:] for case in MODELS], ids=[case[0] for case in MODELS])
def test_models_and_inputs(job: Job, break_it: Callable[[Job], object], says: str) -> None:
    break_it(job)
    told = job.refusal()
    assert says in told
    assert "; " in told, "no fix"


@pytest.mark.parametrize(("line", "says"), RECORDS, ids=range(len(RECORDS)))
def test_records(job: Job, line: bytes, says: str) -> None:
    job.records.write_bytes(b'{"token_ids": [1]}\n' + line + b"\n")
    told = job.refusal()
    assert told.startswith(f"records.jsonl: line 2: {says}")
    assert told.endswith("; correct that line")
