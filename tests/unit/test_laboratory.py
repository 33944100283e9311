"""The laboratory without MPI: strategies, matrix files, outputs compared, figures of runs that are made up."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mpinfer.cli import main
from mpinfer.cluster.launch import Launcher
from mpinfer.errors import ExitCode, OutputError, SpecError
from mpinfer.experiments.cell import RunFailed
from mpinfer.experiments.command import starter
from mpinfer.experiments.comparison import compare, perplexity
from mpinfer.experiments.laboratory import Experiment, run_laboratory
from mpinfer.experiments.strategies import STRATEGIES, Strategy, load_matrix, named
from mpinfer.experiments.table import COLUMNS, as_markdown
from mpinfer.spec import JobSpec, load_spec, spec_from_dict

JOB = {"model": {"path": "m"}, "input": {"path": "i"}}
RECORDS = 8
DOCUMENT = (Path(__file__).parents[2] / "docs/bench.md").read_text(encoding="utf-8")


def spec_of(strategy: Strategy, ranks: int) -> JobSpec:
    return spec_from_dict(
        {section: dict(keys) for section, keys in JOB.items()},
        [f"{key}={json.dumps(value)}" for key, value in strategy.on(ranks).items()],
    )


# Strategies


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=lambda strategy: strategy.name)
def test_a_strategy_takes_all_ranks_or_says_why_not(strategy: Strategy, ranks: int) -> None:
    if strategy.misfit(ranks):
        assert ranks < strategy.least_ranks or ranks % strategy.multiple
        return
    layout = spec_of(strategy, ranks).parallel
    shape = (layout.replicas, layout.stages, layout.shards)
    assert shape == ("auto",) * 3 if strategy.name == "auto" else math.prod(shape) == ranks


def test_strategies_are_told_apart_by_what_they_set() -> None:
    at_4 = {name: spec_of(strategy, 4) for name, strategy in STRATEGIES.items()}
    alike = {(a, b) for a in at_4 for b in at_4 if a < b and at_4[a] == at_4[b]}
    assert alike == {("nonblocking", "pipeline"), ("data", "dynamic")}
    lossy = {name for name, spec in at_4.items() if spec.identity() != at_4["data"].identity()}
    assert lossy == {"int8", "wire-bf16", "wire-int8"}


def test_an_unknown_strategy_lists_those_there_are() -> None:
    assert named(["pipeline", "data", "pipeline"]) == (STRATEGIES["pipeline"], STRATEGIES["data"])
    with pytest.raises(SpecError, match=r"--strategies dada: no such strategy; there are auto, data, .*, dynamic$"):
        named(["data", "dada"])


def test_the_document_has_the_strategies() -> None:
    rows = re.findall(r"^\| (`[a-z].*?) \| .* \|$", DOCUMENT.partition("## The strategies")[2], re.MULTILINE)
    assert {name for row in rows for name in re.findall("`(.+?)`", row)} == STRATEGIES.keys()


def test_the_document_has_the_columns() -> None:
    columns = DOCUMENT.partition("## The columns")[2]
    shown = re.findall(r"^\| ([a-z/, -]+?) \| .* \|$", columns, re.MULTILINE)
    heads = [column.head.removesuffix(" (lowest..highest)") for column in COLUMNS[3:]]  # behind what names a row
    assert [head for row in shown[1:] for head in row.split(", ")] == heads


def test_a_matrix_has_strategies_of_the_table_and_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "matrix.yaml"
    path.write_text(
        "strategies:\n  data:\n  mine: {parallel.stages: 2, model.dtype: bfloat16}\n"
        "ranks: [1, 2]\nrepeats: 5\nreference: mine\nweak: true\n"
    )
    matrix, (data, mine) = load_matrix(str(path))
    assert data is STRATEGIES["data"]
    assert mine.on(2) == {
        "parallel.replicas": "auto",
        "parallel.stages": 2,
        "parallel.shards": "auto",
        "model.dtype": "bfloat16",
    }
    assert (matrix.ranks, matrix.repeats, matrix.reference, matrix.weak) == ((1, 2), 5, "mine", True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ranks: [1]", "matrix.yaml: strategies=None: is a mapping from names to settings; write for example 'data:'"),
        ("strategies: [data]", r"matrix.yaml: strategies=\['data'\]: is a mapping from names to settings"),
        ("- data", "matrix.yaml: a matrix file is a mapping of sections, not a list; start with 'strategies:'"),
        ("strategies: {dada: }", "matrix.yaml: strategies.dada: has no settings, and is none of auto, data, "),
        ("strategies: {a: 3}", "matrix.yaml: strategies.a=3: is a mapping of job keys to values"),
        ("strategies: {a: {stages: 2}}", "matrix.yaml: strategies.a.stages: not a key that a strategy can set; those "),
        ("strategies: {a: {input.path: x}}", "matrix.yaml: strategies.a.input.path: not a key that a strategy can set"),
        ("strategies: {a: {parallel.stages: 0}}", "strategies.a.parallel.stages=0: must be at least 1; raise it"),
        ("strategies: {a: {transport.wire: int3}}", "strategies.a.transport.wire='int3': must be 'none' or "),
        ("strategies: {data: }\nranks: [0]", "matrix.yaml: ranks=0: must be at least 1; raise it"),
        (
            "strategies: {data: }\nrepeats: many",
            "matrix.yaml: repeats='many': must be int or 'auto'; correct the value",
        ),
        ("strategies: {data: }\nrank: 3", "matrix.yaml: rank: unknown key; valid keys here are strategies, ranks, "),
        ("strategies: {data: , data: }", "matrix.yaml: not valid YAML at line 1, column 22 .the key 'data' is there"),
    ],
)
def test_a_matrix_that_breaks_a_rule_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "matrix.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=problem):
        load_matrix(str(path))


# Outputs


def write_results(directory: Path, outputs: Sequence[Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    results = [
        {"index": n, "id": n, **({"error": {}} if output is None else {"output": output})}
        for n, output in enumerate(outputs)
    ]
    (directory / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    return directory


def tokens(*each: list[int]) -> list[dict[str, Any]]:
    return [{"text": "", "token_ids": ids, "prompt_tokens": 3} for ids in each]


def test_tokens_count_until_the_first_difference(tmp_path: Path) -> None:
    reference = write_results(tmp_path / "a", tokens([1, 2, 3, 4], [5, 6], [7]))
    found = compare(write_results(tmp_path / "b", tokens([1, 2, 9, 4], [5, 6], [7, 8])), reference)
    assert (found.records, found.same_records, found.tokens, found.same_tokens) == (3, 1, 7, 5)
    first, second = found.divergences
    assert (first.index, first.ours, first.reference) == (0, [1, 2, 9], [1, 2, 3])
    assert (second.index, second.ours, second.reference) == (2, [7, 8], [7])
    assert compare(reference, reference).is_identical


def test_errors_of_arrays_are_relative_to_the_largest_number(tmp_path: Path) -> None:
    def arrays(directory: Path, values: np.ndarray) -> Path:
        places = [{"x": {"file": "arrays/0.x.npy", "row": row}, "y": [1.0, row]} for row in range(len(values))]
        write_results(directory, places)
        (directory / "arrays").mkdir()
        np.save(directory / "arrays/0.x.npy", values)
        return directory

    values = np.array([[1.0, -200.0], [3.0, math.nan]])
    reference = arrays(tmp_path / "a", values)
    assert compare(arrays(tmp_path / "b", values.copy()), reference).is_identical
    found = compare(arrays(tmp_path / "c", values + np.array([[0.0, 0.02], [0.0, 0.0]])), reference)
    assert found.same_records == 1
    assert found.largest_error == pytest.approx(1e-4)
    assert compare(arrays(tmp_path / "d", np.nan_to_num(values)), reference).largest_error == math.inf


def test_scores_are_compared_by_label(tmp_path: Path) -> None:
    def label(*top: tuple[str, float]) -> dict[str, Any]:
        return {"label": top[0][0], "score": top[0][1], "top": [list(pair) for pair in top]}

    reference = write_results(tmp_path / "a", [label(("cat", 0.5), ("dog", 0.4)), label(("cow", 0.9), ("cat", 0.1))])
    found = compare(
        write_results(tmp_path / "b", [label(("dog", 0.45), ("cat", 0.44)), label(("cow", 0.9), ("dog", 0.05))]),
        reference,
    )
    assert (found.labels, found.same_labels) == (2, 1)
    assert found.errors["score"] == pytest.approx(0.06)  # of cat


def test_records_that_fail_in_one_run_alone_are_unlike(tmp_path: Path) -> None:
    reference = write_results(tmp_path / "a", [*tokens([1]), None, None])
    found = compare(write_results(tmp_path / "b", [None, None, *tokens([1])]), reference)
    assert (found.unlike, found.same_records) == ([0, 2], 1)


def test_perplexity_is_of_all_tokens(tmp_path: Path) -> None:
    scores = [{"scores": [{"token_logprobs": [-1.0, -2.0]}]}, None, {"scores": [{"token_logprobs": [-3.0]}]}]
    assert perplexity(write_results(tmp_path / "a", scores)) == pytest.approx(math.exp(2.0))
    assert perplexity(write_results(tmp_path / "b", [None])) is None


# Runs

Outputs = Callable[[JobSpec, int], list[dict[str, Any]]]


class Bench:
    """A laboratory whose worlds are made up: each takes `seconds` of its spec and gives `outputs`."""

    def __init__(self, root: Path) -> None:
        self.root, self.started = root, list[tuple[int, str]]()
        (root / "model").mkdir()
        (root / "model/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
        (root / "model/model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
        (root / "in.jsonl").write_text("".join(json.dumps({"token_ids": [n + 1]}) + "\n" for n in range(RECORDS)))
        tree = {"model": {"path": str(root / "model")}, "input": {"path": str(root / "in.jsonl")}}
        (root / "job.yaml").write_text(yaml.safe_dump(tree))
        self.seconds: Callable[[JobSpec, int], float] = lambda spec, ranks: 8.0
        self.outputs: Outputs = lambda spec, ranks: tokens(*[[n, n + 1] for n in range(RECORDS)])
        self.scores: Callable[[JobSpec, list[int]], list[float]] = lambda spec, ids: [-1.0] * len(ids)
        self.cores_of_node = 2

    def start(self, ranks: int, overrides: Sequence[str], directory: Path) -> None:
        self.started.append((ranks, directory.name))
        spec = load_spec(self.root / "job.yaml", overrides)
        wall_s = self.seconds(spec, ranks)
        if spec.model.task == "score":
            asked = [json.loads(line) for line in Path(spec.input.path).read_text().splitlines()]
            outputs = [
                {"scores": [{"token_logprobs": self.scores(spec, ids)} for ids in record["continuations"]]}
                for record in asked
            ]
        else:
            outputs = self.outputs(spec, ranks)
            outputs = outputs if spec.input.limit == "auto" else outputs[: spec.input.limit]
        write_results(directory, outputs)
        figures = {"bubble": 0.25, "overlap": None, "imbalance": 0.1, "start_s": 1.0, "load_s": 0.5}
        rank = {"host": "a", "cores": range(self.cores_of_node), "threads": 1, "bytes_sent": 3, "weight_bytes": 7}
        layout = {"replicas": ranks, "stages": 1, "shards": 1, "layouts": [{"stages": 1, "shards": 1}]}
        timing = {
            **figures,
            "wall_s": wall_s,
            "predicted_wall_s": 6.0,
            "planned_wall_s": 4.0,
            "records": len(outputs),
            "records_per_s": len(outputs) / wall_s,
            "tokens_per_s": 1.0,
            "all_tokens_per_s": 2.0,
            "plan": layout,
            "ranks": [{**rank, "cores": [*rank["cores"]], "peak_memory_bytes": 10 * (n + 1)} for n in range(ranks)],
        }
        (directory / "timing.json").write_text(json.dumps(timing))
        (directory / "manifest.json").write_text(json.dumps({"failed": 0, "versions": {"mpi": "Open MPI v5, long"}}))

    def run(self, *names: str, ranks: Sequence[int] = (2,), repeats: int = 1, **keys: Any) -> ExitCode:
        experiment = Experiment(
            command="mpinfer bench job.yaml",
            job=str(self.root / "job.yaml"),
            overrides=(),
            strategies=named(names),
            ranks=tuple(ranks),
            repeats=repeats,
            reference=keys.pop("reference", None),
            weak=keys.pop("weak", False),
            output=self.root / "bench",
        )
        return run_laboratory(experiment, self.start)

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.root / "bench/bench.json").read_text())
        return report

    def row(self, strategy: str, ranks: int = 2) -> dict[str, Any]:
        return next(row for row in self.report["rows"] if (row["strategy"], row["ranks"]) == (strategy, ranks))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_rounds_are_interleaved_and_a_row_has_the_median(bench: Bench) -> None:
    walls = iter([8.0, 16.0, 4.0, 16.0, 5.0, 16.0])
    bench.seconds = lambda spec, ranks: next(walls)
    assert bench.run("data", "pipeline", repeats=3) is ExitCode.COMPLETE
    assert [name for _, name in bench.started] == [f"{name}-2-{n}" for n in (1, 2, 3) for name in ("data", "pipeline")]
    row = bench.row("data")
    assert (row["wall_s"], row["wall_lowest_s"], row["wall_highest_s"], row["runs"]) == (5.0, 4.0, 8.0, 3)
    assert row["prediction_error"] == pytest.approx(0.2)
    assert row["planning_error"] == pytest.approx(-0.2)
    assert (row["peak_memory_bytes"], row["bytes_sent"], row["weight_bytes"]) == (20, 6, 7)
    assert bench.row("pipeline")["speed_up"] == pytest.approx(5 / 16)
    assert (row["verdict"], bench.row("pipeline")["verdict"]) == ("reference", "identical")


def test_the_ideal_is_what_the_cores_can_do(bench: Bench) -> None:
    bench.seconds = lambda spec, ranks: {1: 8.0, 2: 5.0, 4: 4.0}[ranks]
    bench.run("data", ranks=(1, 2, 4))
    figures = [(row["cores"], row["ideal"], row["speed_up"], row["efficiency"]) for row in bench.report["rows"]]
    assert figures == [(1, 1, 1, 1), (2, 2, 1.6, 0.8), (2, 2, 2, 1)]
    assert "4 ranks share 2 cores" in (bench.root / "bench/bench.md").read_text()


def test_weak_scaling_gives_each_rank_as_many_records(bench: Bench) -> None:
    bench.run("data", ranks=(1, 3), weak=True)
    assert [row["records"] for row in bench.report["rows"]] == [2, 6]
    assert bench.row("data", 3)["speed_up"] == pytest.approx(3)
    assert bench.report["scaling"] == "weak"
    assert {row["verdict"] for row in bench.report["rows"]} == {
        "reference",
        "identical",
    }  # of the records that both have


def test_what_fails_or_does_not_fit_is_a_row(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    def seconds(spec: JobSpec, ranks: int) -> float:
        if spec.parallel.shards != 1:
            raise RunFailed("parallel.shards=2: too many; use 1")
        return 8.0

    bench.seconds = seconds
    assert bench.run("tensor", "data", "hybrid", repeats=2, reference="tensor") is ExitCode.COMPLETE
    assert bench.report["reference"] == "data"  # the first that completes
    assert bench.row("tensor")["status"] == "failed"
    assert bench.row("hybrid")["problem"] == "needs 4 ranks or more"
    assert [name for _, name in bench.started] == ["tensor-2-1", "data-2-1", "data-2-2"]
    printed = capsys.readouterr().out
    assert "failed: parallel.shards=2: too many; use 1" in printed
    assert "skipped: needs 4 ranks or more" in printed


def test_a_strategy_whose_settings_clash_with_the_job_is_a_row(bench: Bench) -> None:
    tree = yaml.safe_load((bench.root / "job.yaml").read_text())
    tree["model"]["dtype"] = "bfloat16"
    (bench.root / "job.yaml").write_text(yaml.safe_dump(tree))
    assert bench.run("data", "int8") is ExitCode.COMPLETE
    assert bench.row("int8")["status"] == "skipped"
    assert bench.row("int8")["problem"].startswith("model.dtype='bfloat16': model.quantize=int8 computes in float32")


def test_equal_settings_share_their_runs(bench: Bench) -> None:
    bench.run("data", "dynamic", "static")
    assert [name for _, name in bench.started] == ["data-2-1", "static-2-1"]
    assert bench.row("dynamic")["same_runs_as"] == "data"
    assert bench.row("dynamic")["wall_s"] == bench.row("data")["wall_s"]


def test_nothing_that_completes_is_bad_input(bench: Bench) -> None:
    bench.outputs = lambda spec, ranks: (_ for _ in ()).throw(RunFailed("no"))
    assert bench.run("data", "dynamic", "static") is ExitCode.BAD_INPUT
    assert {row["status"] for row in bench.report["rows"]} == {"failed"}


def test_other_results_of_a_lossless_strategy_are_an_alarm(bench: Bench) -> None:
    other = tokens(*[[n, n + 1] for n in range(RECORDS - 1)], [7, 8, 9])  # one only continues the other
    bench.outputs = lambda spec, ranks: tokens(*[[n, n + 1] for n in range(RECORDS)]) if ranks == 2 else other
    assert bench.run("data", ranks=(2, 3)) is ExitCode.RECORDS_FAILED
    row = bench.row("data", 3)
    assert (row["verdict"], row["same_records"], row["lossless"]) == ("differs", 7 / 8, True)
    assert "DIFFERS" in as_markdown(bench.report)


@pytest.mark.parametrize(("margin", "verdict"), [(5e-4, "within"), (5e-2, "differs")])
def test_tokens_may_leave_the_reference_at_a_tie_alone(bench: Bench, margin: float, verdict: str) -> None:
    def outputs(spec: JobSpec, ranks: int) -> list[dict[str, Any]]:
        return tokens(*[[n, 5 if spec.parallel.stages == 2 and n == 3 else 4, n] for n in range(RECORDS)])

    bench.outputs = outputs
    bench.scores = lambda spec, ids: [-0.5, -1.0 - margin * (ids[-1] == 5)]
    bench.run("data", "pipeline")
    assert bench.row("pipeline")["verdict"] == verdict
    asked = [json.loads(line) for line in (bench.root / "bench/runs/ties-pipeline-2.jsonl").read_text().splitlines()]
    assert asked == [{"id": 3, "token_ids": [4], "continuations": [[3, 5], [3, 4]]}]


def test_lossy_strategies_get_a_figure_and_no_alarm(bench: Bench) -> None:
    bench.outputs = lambda spec, ranks: tokens(*[[n, spec.model.quantize == "int8"] for n in range(RECORDS)])
    bench.scores = lambda spec, ids: [-2.0 if spec.model.quantize == "int8" else -1.0] * len(ids)
    assert bench.run("data", "int8", ranks=(1, 2)) is ExitCode.COMPLETE
    row = bench.row("int8")
    assert (row["verdict"], row["same_records"], row["same_tokens"]) == ("lossy", 0.0, 0.5)
    assert row["perplexity"] == pytest.approx(math.exp(2))
    assert row["reference_perplexity"] == pytest.approx(math.exp(1))
    assert bench.row("int8", 1)["perplexity"] is None  # scored once, on the most ranks
    asked = [json.loads(line) for line in (bench.root / "bench/runs/perplexity.jsonl").read_text().splitlines()]
    assert asked[2] == {"id": 2, "token_ids": [3], "continuations": [[2, False]]}


def test_a_laboratory_that_is_told_to_stop_shows_what_it_has(bench: Bench) -> None:
    def seconds(spec: JobSpec, ranks: int) -> float:
        if spec.parallel.dispatch == "static":
            raise KeyboardInterrupt
        return 8.0

    bench.seconds = seconds
    assert bench.run("data", "static") is ExitCode.INTERRUPTED
    assert bench.row("data")["status"] == "complete"
    assert bench.row("static")["problem"] == "has not run"
    assert (bench.root / "bench/bench.md").exists()


def test_another_laboratory_is_not_written_over(bench: Bench) -> None:
    bench.run("data")
    with pytest.raises(OutputError, match=r"bench: is there already, and not empty; give another --output, or remove"):
        bench.run("data")


def test_the_reference_must_run(bench: Bench) -> None:
    with pytest.raises(SpecError, match=r"--reference tensor: is not among the strategies that run; give one of data"):
        bench.run("data", reference="tensor")
    bench.run("data", "static", reference="static")
    assert (bench.report["reference"], bench.row("static")["verdict"]) == ("static", "reference")


def test_weak_scaling_needs_a_record_for_each_rank(bench: Bench) -> None:
    with pytest.raises(SpecError, match="--weak: 8 records are not enough for 9 ranks; give more, or fewer ranks"):
        bench.run("data", ranks=(1, 9), weak=True)


def test_the_table_has_a_cell_for_every_column(bench: Bench) -> None:
    bench.run("data", "tensor", "hybrid")
    table = [line for line in as_markdown(bench.report).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {len(COLUMNS) + 1}
    assert "`mpinfer bench job.yaml`" in as_markdown(bench.report)
    assert "Open MPI v5, mpinfer" not in as_markdown(bench.report)


# The command


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "bench: needs numbers of ranks; give -n, for example -n 1,2,4, or ranks in the matrix file"),
        (["-n", "0,2"], "-n 0,2: must be numbers of ranks of at least 1, with commas between; write -n 1,2,4"),
        (["-n", "2", "--repeats", "0"], "--repeats 0: must be at least 1; raise it"),
        (["-n", "2", "--strategies", "data,foo"], "--strategies foo: no such strategy; there are auto, data,"),
        (["-n", "2", "--strategies", ","], "--strategies : no such strategy; there are auto, data,"),
        (["-n", "2", "--reference", "int8"], "--reference int8: is not among the strategies that run; give one of"),
        (["-n", "2", "--matrix", "nowhere.yaml"], "nowhere.yaml: the matrix file cannot be read (No such file"),
        (["-n", "2", "--set", "model.path=nowhere"], "model.path=nowhere: no such directory; give a directory with"),
        (["-n", "2", "--set", "a=1"], "a: unknown key; valid keys here are model, input"),
    ],
)
def test_a_command_that_cannot_be_begun_is_refused(
    bench: Bench, options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["bench", str(bench.root / "job.yaml"), "--output", str(bench.root / "bench"), *options])
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith(f"mpinfer: error: {problem}")
    assert not (bench.root / "bench").exists()


def test_a_world_cannot_start_worlds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert main(["bench", str(bench.root / "job.yaml"), "-n", "2"]) == 2
    assert "bench: Open MPI mpirun has started it on 2 ranks, but it starts worlds itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prints", "problem"),
    [
        ("[vm] mpinfer: error: parallel.shards=9: too many; use 1", "^parallel.shards=9: too many; use 1$"),
        ("mpinfer: fatal on rank 1: no memory", "^on rank 1: no memory$"),
        ("Segmentation fault", r"^ended with exit code 3; .*/runs/data-2-1.log has what it printed$"),
    ],
)
def test_a_run_that_fails_says_why(tmp_path: Path, prints: str, problem: str) -> None:
    launcher = tmp_path / "mpiexec"
    launcher.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$*\"\necho '{prints}' >&2\nexit 3\n")
    launcher.chmod(0o755)
    (tmp_path / "runs").mkdir()
    directory = tmp_path / "runs/data-2-1"
    start = starter(Launcher(str(launcher), "mpich"), "job.yaml", ["a", "b"])
    with pytest.raises(RunFailed, match=problem):
        start(2, ["parallel.replicas=2"], directory)
    arguments = (tmp_path / "runs/data-2-1.log").read_text().splitlines()[0]
    assert arguments.startswith("-n 2 ")
    assert "-hosts a,b" in arguments
    assert arguments.endswith(f"run job.yaml --output {directory} --set parallel.replicas=2")
