"""Input that cannot be run: one line that names the value, the rule and the fix, exit code 2, and nothing left over.

Each case breaks a job that was good. It runs alone, and in a world: of 4 ranks where torch never loads, else of 2.
"""

import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Mpi, Tiny, assert_token_rule, find_mpis, mpirun, read_jsonl, require, write_jsonl

from mpinfer.records.journal import Journal
from mpinfer.records.reader import JsonlInput
from mpinfer.records.rules import RecordRules
from mpinfer.spec import load_spec

LIMIT_S = 10  # on a machine that is slow today: twice what a good job takes to get as far
MPIS = find_mpis()


class Job:
    """A good job of its own, to be broken."""

    def __init__(self, root: Path, tiny: Tiny, ranks: int) -> None:
        self.root, self.ranks = root, ranks
        self.file, self.model, self.input = root / "job.yaml", root / "model", root / "records.jsonl"
        self.output = root / "out"
        self.options: list[str] = []
        self.environ: dict[str, str] = {}
        self.meanwhile = ExitStack()  # what goes on during the run
        shutil.copytree(tiny.model, self.model)
        shutil.copy(tiny.records, self.input)
        self._tree = yaml.safe_load(tiny.job.read_text())
        self.write(model={"path": str(self.model)}, input={"path": str(self.input)}, output={"path": str(self.output)})

    def write(self, **sections: Any) -> None:
        """Write the job file with these sections in the place of the good ones."""
        self._tree |= sections
        self.file.write_text(yaml.safe_dump(self._tree))

    def write_records(self, *lines: str) -> None:
        self.input.write_text("".join(line + "\n" for line in lines))

    def write_config(self, **keys: Any) -> None:
        config = self.model / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | keys))

    def shard_with(self, tensor: str) -> Path:
        """The safetensors file that holds a tensor."""
        index = json.loads((self.model / "model.safetensors.index.json").read_text())
        return self.model / index["weight_map"][tensor]

    def rewrite(self, shard: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        """Save a shard with other tensors."""
        from safetensors.torch import load_file, save_file

        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})

    def begin(self) -> Journal:
        """Start this job's journal, as a run does, and keep one result in it."""
        records = JsonlInput(self.input, RecordRules(load_spec(self.file)).problem)
        journal = Journal.open(self.output, load_spec(self.file).identity(), records.sha256, records.ids, resume=False)
        journal.append({"index": 0, "id": records.ids[0], "output": {"token_ids": [1]}})
        journal.flush()
        return journal


@dataclass(frozen=True)
class Case:
    """How to break a job, and what the error says: a pattern for the value, one for the rule, one for the fix."""

    break_it: Callable[[Job], None]
    value: str
    rule: str
    fix: str
    loads_torch: bool  # whether it takes torch to find out
    alone: bool  # whether only a run without a launcher can have it: launchers set what it breaks

    @property
    def name(self) -> str:
        return self.break_it.__name__


CASES: list[Case] = []


def case(
    value: str, rule: str, fix: str, loads_torch: bool = False, alone: bool = False
) -> Callable[[Callable[[Job], None]], None]:
    return lambda break_it: CASES.append(Case(break_it, value, rule, fix, loads_torch, alone))


# -- the spec


@case(r"job\.yaml", r"cannot be read \(No such file", "give the path")
def no_job_file(job: Job) -> None:
    job.file.unlink()


@case(r"job\.yaml", r"not valid YAML at line 2", "correct that line")
def not_yaml(job: Job) -> None:
    job.file.write_text("model:\n  path: ]\n")


@case(r"job\.yaml", "a job file is a mapping of sections, not a list", "start with 'model:'")
def no_mapping(job: Job) -> None:
    job.file.write_text("- model\n- input\n")


@case(r"parallel\.stagez", "unknown key", "valid keys here are .*stages")
def unknown_key(job: Job) -> None:
    job.write(parallel={"stagez": 2})


@case("paralel", "unknown key", "valid keys here are .*parallel")
def unknown_section(job: Job) -> None:
    job.write(paralel={"stages": 2})


@case(r"generate\.max_new_tokens='many'", "must be int", "correct the value")
def wrong_type(job: Job) -> None:
    job.write(generate={"max_new_tokens": "many"})


@case(r"generate\.max_new_tokens=0", "at least 1", "raise it")
def below_minimum(job: Job) -> None:
    job.write(generate={"max_new_tokens": 0})


@case(r"model\.dtype='float23'", "must be 'float32' or 'bfloat16' or 'float16'", "correct the value")
def bad_choice(job: Job) -> None:
    job.write(model={"path": str(job.model), "dtype": "float23"})


@case(r"model\.path", "required key is missing", "add it")
def no_model(job: Job) -> None:
    job.write(model={})


@case("--set parallel.stages", "key.path=value", "--set parallel.stages=2")
def override_without_value(job: Job) -> None:
    job.options = ["--set", "parallel.stages"]


@case(r"generate\.steps", "unknown key", "step_tokens")
def override_of_unknown_key(job: Job) -> None:
    job.options = ["--set", "generate.steps=2"]


@case(r"generate\.temperature=-1", "at least 0", "raise it")
def temperature(job: Job) -> None:
    job.write(generate={"temperature": -1})


# -- the layout


@case(r"parallel\.replicas=3 x parallel\.stages=1", r"the world has \d", "start 3 ranks", loads_torch=True)
def layout_of_another_size(job: Job) -> None:
    job.write(parallel={"replicas": 3, "stages": 1})


@case(r"parallel\.stages=99", "more stages than the model's 8 blocks", "use at most 8", loads_torch=True)
def more_stages_than_blocks(job: Job) -> None:
    job.write(parallel={"stages": 99})


@case(r"parallel\.stages=3", r"does not divide \d ranks", "start a multiple of 3", loads_torch=True)
def stages_do_not_divide_ranks(job: Job) -> None:
    job.write(parallel={"stages": 3})


# -- the model


@case(r"model\.path=.*/nowhere", "no such directory", "give a directory")
def no_model_directory(job: Job) -> None:
    job.write(model={"path": str(job.root / "nowhere")})


@case(r"model\.path=.*/model", "has no config.json", "give a Hugging Face model directory")
def no_config(job: Job) -> None:
    (job.model / "config.json").unlink()


@case(r"config\.json", "not valid JSON", "fetch")
def broken_config(job: Job) -> None:
    (job.model / "config.json").write_text('{"model_type": "llama",')


@case(r"model-00002-of-0000\d.safetensors", "named in the index but missing", "fetch it again")
def missing_shard(job: Job) -> None:
    next(job.model.glob("model-00002-*")).unlink()


@case(r"model-00002-of-0000\d.safetensors", "truncated", "fetch")
def truncated_shard(job: Job) -> None:
    shard = next(job.model.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-100])


@case(r"model-00001-of-0000\d.safetensors", "not a safetensors file", "fetch")
def garbage_in_header(job: Job) -> None:
    shard = next(job.model.glob("model-00001-*"))
    data = bytearray(shard.read_bytes())
    data[8:24] = b"\xff" * 16
    shard.write_bytes(data)


NORM = "model.layers.5.post_attention_layernorm.weight"  # of the last layer: not every rank reads it


@case(f"tensor '{NORM}'", "is missing", "fetch", loads_torch=True)
def missing_tensor(job: Job) -> None:
    job.rewrite(job.shard_with(NORM), lambda tensors: tensors.pop(NORM))


@case("tensor 'model.layers.9.stranger.weight'", "belongs to no part", "check that", loads_torch=True)
def extra_tensor(job: Job) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["model.layers.9.stranger.weight"] = tensors[NORM].clone()

    job.rewrite(job.shard_with(NORM), add)


@case(f"tensor '{NORM}'", r"has shape \[63\], config.json asks for \[64\]", "check that", loads_torch=True)
def wrong_shape(job: Job) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        tensors[NORM] = tensors[NORM][:-1].clone()

    job.rewrite(job.shard_with(NORM), cut)
    job.write(parallel={"stages": job.ranks})


@case("model_type='bert'", "no pipeline plan", "use a family", loads_torch=True)
def architecture_that_cannot_be_cut(job: Job) -> None:
    job.write_config(model_type="bert", architectures=["BertLMHeadModel"])


@case(r"config\.json", "`nonesuch`.*does not recognize", "fetch the model again", loads_torch=True)
def unknown_architecture(job: Job) -> None:
    job.write_config(model_type="nonesuch", architectures=["Nonesuch"])


# -- the records


@case(r"records\.jsonl", "cannot be read", "give a readable JSONL file")
def no_records_file(job: Job) -> None:
    job.input.unlink()


@case(r"records\.jsonl", "holds no record", "give a file")
def no_records(job: Job) -> None:
    job.write_records()


@case(r"records\.jsonl: line 2", "not valid JSON", "correct that line")
def bad_json(job: Job) -> None:
    job.write_records('{"token_ids": [1]}', '{"token_ids": [1', '{"token_ids": [2]}')


@case(r"records\.jsonl: line 2", "missing field", r"correct that line \(and 1 more line\)")
def missing_field(job: Job) -> None:
    job.write_records('{"token_ids": [1]}', '{"id": "a"}', '{"id": "b"}')


@case(r"records\.jsonl: line 1", "prompt and token_ids are given together", "correct that line")
def two_fields(job: Job) -> None:
    job.write_records('{"token_ids": [1], "prompt": "one"}')


@case(r"records\.jsonl: line 3", "id 'a' is on lines 1 and 3", "correct that line")
def duplicate_id(job: Job) -> None:
    job.write_records(*(f'{{"id": "{name}", "token_ids": [1]}}' for name in "aba"))


# -- the output directory


@case(r"/out", "is not a directory", r"choose another output\.path")
def output_is_a_file(job: Job) -> None:
    job.output.write_text("mine")


@case(r"/taken/out", "Not a directory", r"choose another output\.path")
def output_below_a_file(job: Job) -> None:
    (job.root / "taken").write_text("mine")
    job.options = ["--output", str(job.root / "taken" / "out")]


@case(r"/out", "holds an unfinished run", "use --resume")
def unfinished_run(job: Job) -> None:
    job.begin().close()


@case(r"generate\.max_new_tokens is 13", "was begun with 12", "set it back")
def resume_of_another_job(job: Job) -> None:
    job.begin().close()
    job.options = ["--resume", "--set", "generate.max_new_tokens=13"]


@case(r"/out", "the input file changed", "restore the input")
def resume_with_another_input(job: Job) -> None:
    job.begin().close()
    job.write_records('{"token_ids": [1]}')
    job.options = ["--resume"]


@case(r"/out", "in use by another run", "wait for its end")
def output_in_use(job: Job) -> None:
    job.meanwhile.callback(job.begin().close)
    job.options = ["--resume"]


# -- the environment

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
STEP = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}


@case("OMP_NUM_THREADS=many", "must be a thread count of at least 1", "correct or unset it")
def threads_in_words(job: Job) -> None:
    job.environ = {"OMP_NUM_THREADS": "many"}


@case("OMP_NUM_THREADS=0", "must be a thread count of at least 1", "correct or unset it")
def no_threads(job: Job) -> None:
    job.environ = {"OMP_NUM_THREADS": "0"}


@case("OMPI_COMM_WORLD_RANK=first", "a whole number", "unset it", alone=True)
def rank_in_words(job: Job) -> None:
    job.environ = OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "first"}


@case("Open MPI mpirun started 4 ranks", "a world of 1", "mpiexec of the MPI that mpi4py uses", alone=True)
def ranks_of_another_launcher(job: Job) -> None:
    job.environ = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}


@case("SLURM_PROCID=3", "must be below SLURM_STEP_NUM_TASKS=1", "start again with mpirun or srun", alone=True)
def rank_of_another_world(job: Job) -> None:
    job.environ = STEP | {"SLURM_PROCID": "3"}


@case(r"SLURM_STEP_TASKS_PER_NODE=2\(x", r"ranks per node such as 4 or 2\(x3\),1", "unset it", alone=True)
def tasks_of_half_a_list(job: Job) -> None:
    job.environ = STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x"}


@case("transport.progress='library'", "is not set", r"export \w+=1 on all ranks before the launch", loads_torch=True)
def progress_that_the_library_was_not_told_of(job: Job) -> None:
    job.options = ["--set", "transport.progress=library"]


@pytest.fixture(scope="module")
def limit_s(tiny: Tiny) -> float:
    """Seconds that an error may take. Not for a disk that reads torch for the first time: that happens here."""
    for mpi in MPIS:
        begun = time.monotonic()
        mpirun(require(mpi), None, ["mpinfer", "run", tiny.job, "--dry-run"])
    return max(LIMIT_S, 2 * (time.monotonic() - begun))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_alone(case: Case, tiny: Tiny, limit_s: float, tmp_path: Path, sample: Callable[[bool], None]) -> None:
    sample(case.alone or CASES.index(case) % 4 < 2)
    check(case, MPIS[CASES.index(case) % len(MPIS)], None, tiny, limit_s, tmp_path)


@pytest.mark.parametrize("case", [case for case in CASES if not case.alone], ids=lambda case: case.name)
def test_in_a_world(case: Case, tiny: Tiny, limit_s: float, tmp_path: Path, sample: Callable[[bool], None]) -> None:
    sample(CASES.index(case) % 4 > 1)
    check(case, MPIS[(CASES.index(case) + 1) % len(MPIS)], 2 if case.loads_torch else 4, tiny, limit_s, tmp_path)


def check(case: Case, mpi: Mpi, ranks: int | None, tiny: Tiny, limit_s: float, root: Path) -> None:
    job = Job(root, tiny, ranks or 1)
    case.break_it(job)
    before = contents(job.output)
    with job.meanwhile:
        begun = time.monotonic()
        run = mpirun(mpi, ranks, ["mpinfer", "run", job.file, *job.options], env=job.environ)
        elapsed_s = time.monotonic() - begun
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    [line] = re.findall(r"mpinfer: error: .*", run.stderr)
    assert re.search(f"{case.value}.*{case.rule}.*{case.fix}", line), line
    assert elapsed_s < limit_s
    if before is not None:
        assert contents(job.output) == before
    else:
        # Whatever is left must not stop a later, good run, of this job or another.
        Journal.open(job.output, {"another": "job"}, "and input", ["a"], resume=False).close()


def contents(path: Path) -> dict[str, bytes] | None:
    """What lies at a path: a file, or the files of a directory; None for nothing."""
    if not path.exists():
        return None
    return {str(file): file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()}


def test_record_errors(mpi: Mpi, tiny: Tiny, tmp_path: Path) -> None:
    """A record that cannot be computed fails alone: the others are computed, and the run says 1."""
    job = Job(tmp_path, tiny, 2)
    good = [{"id": f"good {n}", "token_ids": prompt} for n, prompt in enumerate(tiny.prompts[:3])]
    bad = {
        "no token": ({"token_ids": []}, "empty"),
        "too long": ({"token_ids": [1] * 512}, "512"),
        "unknown token": ({"token_ids": [1, 256]}, "256"),
        "no tokenizer": ({"prompt": "Once upon a time"}, "no tokenizer"),
    }
    failing = [{"id": name, **record} for name, (record, _) in bad.items()]
    # Good ones first, between and last.
    write_jsonl(job.input, [good[0], *failing[:2], good[1], *failing[2:], good[2]])
    run = mpirun(mpi, 2, ["mpinfer", "run", job.file, "--set", "parallel.stages=2"])
    assert run.returncode == 1, run.stderr
    results = read_jsonl(job.output / "results.jsonl")
    errors = {result["id"]: result["error"] for result in results if "error" in result}
    assert errors.keys() == bad.keys()
    for name, (_, says) in bad.items():
        assert errors[name]["type"] == "RecordError"
        assert says in errors[name]["message"]
    computed = [result for result in results if "output" in result]
    assert [result["id"] for result in computed] == [record["id"] for record in good]
    assert_token_rule([{**result, "index": n} for n, result in enumerate(computed)], tiny.references[:3])
    verified = mpirun(mpi, None, ["mpinfer", "verify", job.output])
    assert verified.returncode == 1
    assert json.loads(verified.stdout) == {"complete": True, "records": 7, "failed": 4}
