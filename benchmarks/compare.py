"""mpinfer beside vLLM and transformers, and beside what the machine can do: one command, one machine.

    .venv/bin/python benchmarks/compare.py MODEL_DIR PROMPTS.jsonl

Every system gets the same token ids and the same cores, decodes greedily in float32 (int8: weights in 8 bits) to the
model's stop token or the limit, and runs in processes of its own. A rate is (prompt + new tokens) / wall; start-up and
loading are outside the wall, new tokens are counted in each system's own output. Systems are run in turn, round after
round; medians are shown with the lowest and the highest. The sections:

reference  the workload on all systems; of mpinfer the linear layers' rates, too, beside the limits of this machine
single     one sequence at a time, beside the limit: bandwidth / bytes of weights
prefill    prompts of 2,000 tokens and one new token, beside the rate of the same multiplications alone
overhead   many short records: what else than computing the ranks do

GEMM limits come from one process a core, all at once, and from the model's own shapes (limits.py); of as many
measurements as there are rounds the best counts, while the systems are judged by their medians. A layout is
REPLICASxSTAGES. `--records` scales the number of records of all sections. benchmarks/make_vllm_venv.sh installs vLLM.
"""

import argparse
import functools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from limits import linear_shapes, meta_model

HERE = Path(__file__).resolve().parent
VLLM_VENV = HERE.parent / ".venv-vllm"
CORES = sorted(os.sched_getaffinity(0))
SYSTEMS = ["transformers", "vllm", "vllm-pp2"]
SYSTEMS += [f"mpinfer-{name}" for name in ("2x1", "1x2", "1x1", "2x2", "1x4", "int8-2x1", "int8-1x2")]
PRELOADS = [VLLM_VENV / "lib" / name for name in ("libiomp5.so", "libtcmalloc_minimal.so.4")]  # as vLLM advises
STEP_TOKENS = 256  # of mpinfer, its default: rows of a step that prefills
LONG_PROMPT = 2000
RECORDS = 64


@dataclass
class Run:
    """One run of one system, or why there is none."""

    wall_s: float = 0.0
    outputs: dict[str, list[int]] = field(default_factory=dict)  # by record, the new tokens
    timing: dict[str, Any] = field(default_factory=dict)  # mpinfer's timing.json
    version: str = ""
    error: str = ""

    @property
    def new_tokens(self) -> int:
        return sum(map(len, self.outputs.values()))


@dataclass(frozen=True)
class Bench:
    """What all sections need."""

    model: Path
    scratch: Path
    repeats: int
    systems: Sequence[str]
    prompts: dict[str, list[int]]
    new_tokens: int
    share: float  # of the records that the sections have by default
    layers: list[tuple[int, int]]  # shapes of the linear layers but the head
    head: tuple[int, int]
    attention_width: int  # heads x head size, over all layers

    @property
    def layer_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.layers)

    @property
    def head_weights(self) -> int:
        return self.head[0] * self.head[1]


def say(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)


# Systems


def execute(bench: Bench, system: str, prompts: dict[str, list[int]], new_tokens: int) -> Run:
    with tempfile.TemporaryDirectory(dir=bench.scratch) as directory:
        records = Path(directory) / "records.jsonl"
        records.write_text("".join(json.dumps({"id": i, "token_ids": ids}) + "\n" for i, ids in prompts.items()))
        if system.startswith("mpinfer-"):
            return run_mpinfer(bench.model, system.removeprefix("mpinfer-"), records, new_tokens)
        arguments = [str(bench.model), str(records), str(new_tokens)]
        if system == "transformers":
            return run_script(sys.executable, "transformers_run.py", arguments, {"OMP_NUM_THREADS": str(len(CORES))})
        return run_vllm(arguments, 2 if system == "vllm-pp2" else 1)


def run_vllm(arguments: list[str], stages: int) -> Run:
    python = VLLM_VENV / "bin" / "python"
    if not python.exists():
        return Run(error="not installed: benchmarks/make_vllm_venv.sh")
    share = len(CORES) // stages
    threads = [",".join(map(str, CORES[stage * share : (stage + 1) * share])) for stage in range(stages)]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(threads),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "LD_PRELOAD": ":".join(str(library) for library in PRELOADS if library.exists()),
    }
    return run_script(str(python), "vllm_run.py", [*arguments, str(stages)], environment)


def run_script(python: str, script: str, arguments: list[str], environment: dict[str, str]) -> Run:
    done = call([python, str(HERE / script), *arguments], environment)
    figures = [line for line in done.stdout.splitlines() if line.startswith('{"version"')]
    return Run(**json.loads(figures[-1])) if figures else Run(error=reason(done))


def run_mpinfer(model: Path, layout: str, records: Path, new_tokens: int) -> Run:
    replicas, stages = map(int, layout.removeprefix("int8-").split("x"))
    output, job = records.with_name("out"), records.with_name("job.yaml")
    sections = {
        "model": {"path": str(model), "dtype": "float32"},
        "input": {"path": str(records)},
        "generate": {"max_new_tokens": new_tokens, "step_tokens": STEP_TOKENS},
    }
    job.write_text(json.dumps(sections))  # JSON is YAML
    command = [sys.executable, "-m", "mpinfer", "launch", "-n", str(replicas * stages), str(job)]
    command += ["--set", f"parallel.replicas={replicas}", "--set", f"parallel.stages={stages}"]
    command += ["--set", "model.quantize=int8"] if layout.startswith("int8-") else []
    done = call([*command, "--output", str(output)], {})
    if done.returncode:
        return Run(error=reason(done))
    timing = json.loads((output / "timing.json").read_text())
    results = [json.loads(line) for line in (output / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    outputs = {result["id"]: result["output"]["token_ids"] for result in results}
    return Run(
        timing["wall_s"], outputs, timing, json.loads((output / "manifest.json").read_text())["versions"]["mpinfer"]
    )


def call(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=inherited | {"HF_HUB_OFFLINE": "1"} | environment
    )


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that tells best why a process failed."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line.lower()] or lines or ["no message"]
    return f"exit code {done.returncode}: {telling[0 if 'mpinfer: error' in telling[0] else -1][:160]}"


def rounds(
    bench: Bench,
    title: str,
    systems: Iterable[str],
    prompts: dict[str, list[int]],
    new_tokens: int,
    beside: Callable[[], object] = lambda: None,
) -> dict[str, list[Run]]:
    """All runs of each system: round after round, so that a slow spell of the machine hits all; and what is called
    `beside` them."""
    runs: dict[str, list[Run]] = {system: [] for system in systems}
    for repeat in range(bench.repeats):
        for system, done in runs.items():
            if done and done[-1].error:
                continue  # it would fail again
            done.append(execute(bench, system, prompts, new_tokens))
            say(f"{title}, round {repeat + 1}, {system}: {done[-1].error or f'{done[-1].wall_s:.2f} s'}")
        beside()
    return runs


# Limits of the machine


def bandwidth_gb_per_s() -> float:
    done = call([sys.executable, str(HERE / "limits.py"), "bandwidth"], {"OMP_NUM_THREADS": str(len(CORES))})
    return float(json.loads(done.stdout)["gb_per_s"])


def gemm_gflop_per_s(bench: Bench, rows: int, head: bool) -> float:
    """Of all cores together, for the linear layers (and the head) at this many rows: the best of some measurements."""
    return max(measure_gemm(bench, rows, head)["all"] for _ in range(bench.repeats))


def measure_gemm(bench: Bench, rows: int, head: bool) -> dict[str, float]:
    """Of the libraries of torch alone, and of all kernels."""
    command = [sys.executable, str(HERE / "limits.py"), "gemm", str(bench.model), str(rows)]
    processes = [
        subprocess.Popen([*command, str(core)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for core in CORES
    ]
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            sys.exit("compare: limits.py failed")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    figures = [json.loads(process.communicate()[0]) for process in processes]
    weights = bench.layer_weights + (bench.head_weights if head else 0)
    return {
        name: sum(
            2e-9 * weights * rows / (of[name]["layers_s"] + (of[name]["head_s"] if head else 0)) for of in figures
        )
        for name in figures[0]
    }


# Sections


def reference(bench: Bench) -> dict[str, Any]:
    prompts, new_tokens = bench.prompts, bench.new_tokens
    runs = rounds(bench, "reference", bench.systems, prompts, new_tokens)
    rates = {system: rate_summary(done, sum(map(len, prompts.values()))) for system, done in runs.items()}
    theirs = runs["transformers"][0].outputs
    bases = {"vllm": "/vllm", "transformers": "/transf.", "mpinfer-2x1": "/2x1"}
    rows = []
    for system, done in runs.items():
        if done[-1].error:
            rows.append([system, done[-1].error])
            continue
        same = sum(done[0].outputs[key] == tokens for key, tokens in theirs.items())
        agreement = f"{same / len(theirs):.0%}" if theirs else "-"
        ratios = [ratio(rates, runs, system, base) for base in bases]
        walls = statistics.median(run.wall_s for run in done)
        rows.append([system, *spread(rates[system]), f"{walls:.2f}", f"{done[0].new_tokens}", agreement, *ratios])
    columns = ["system", "tokens/s", "min..max", "wall s", "new tokens", "= transf.", *bases.values()]
    print_table(f"reference: {len(prompts)} records, at most {new_tokens} new tokens each", columns, rows)
    print("  = transf.: share of records with the very tokens of transformers; / ratios of tokens/s")
    print("  versions:", ", ".join(f"{system} {done[0].version}" for system, done in runs.items() if done[0].version))
    return {"runs": dump(runs), "achieved": achieved(bench, runs)}


def achieved(bench: Bench, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Rates of the linear layers in the reference runs of mpinfer, beside the machine's limits."""
    done = {system: each for system, each in runs.items() if each[0].timing and not each[-1].error}
    middle = {system: sorted(each, key=lambda run: run.wall_s)[(len(each) - 1) // 2] for system, each in done.items()}
    decode_rows = {int(run.timing["plan"]["micro_batch"]) for run in middle.values()}
    say("measuring the limits")
    limits = {rows: gemm_gflop_per_s(bench, rows, head=True) for rows in sorted({*decode_rows, STEP_TOKENS})}
    gb_per_s = bandwidth_gb_per_s()
    rows = []
    for system, run in middle.items():
        timing, plan = run.timing, run.timing["plan"]
        tokens = timing["prompt_tokens"] + run.new_tokens - len(run.outputs)  # the last token is not fed back
        gflop = 2e-9 * (bench.layer_weights * tokens + bench.head_weights * run.new_tokens)
        reads = max(map(len, run.outputs.values())) * plan["replicas"] * plan["in_flight"]
        gb = reads * (bench.layer_weights + bench.head_weights) * (1 if "int8" in system else 4) / 1e9
        compute = statistics.mean(rank["compute_s"] for rank in timing["ranks"]) / run.wall_s
        weights_mb = sum(rank["weight_bytes"] for rank in timing["ranks"]) / 1e6
        overlap = "-" if timing["overlap"] is None else f"{timing['overlap']:.0%}"
        speeds = [f"{gflop / run.wall_s:.1f}", f"{limits[plan['micro_batch']]:.1f}", f"{limits[STEP_TOKENS]:.1f}"]
        bounds = [f"{gb / run.wall_s:.1f}", f"{gb_per_s:.1f}"]
        account = [f"{compute:.0%}", f"{timing['bubble']:.0%}", overlap, f"{weights_mb:.0f}"]
        rows.append([system, str(plan["micro_batch"]), *speeds, *bounds, *account])
    columns = ["system", "rows", "GFLOP/s", "limit", f"at {STEP_TOKENS}", "GB/s", "limit"]
    columns += ["compute", "bubble", "overlap", "weights MB"]
    print_table("reference: linear layers and head, over the whole wall", columns, rows)
    print(f"  limit: these float32 multiplications alone at the rows of a decode step, and at {STEP_TOKENS} rows")
    print("  GB/s: weights, each read once a step of a group, for as many steps as the longest output has tokens")
    return {"gemm_gflop_per_s": limits, "read_gb_per_s": gb_per_s}


def single(bench: Bench) -> dict[str, Any]:
    text = [token for ids in bench.prompts.values() for token in ids]
    new_tokens = 2 * bench.new_tokens
    systems = ["transformers", "mpinfer-1x1", "mpinfer-int8-1x1"]
    runs = rounds(bench, "single", systems, {"single": text[:16]}, new_tokens)
    say("measuring the bandwidth")
    gb_per_s = bandwidth_gb_per_s()
    rows = []
    for system, done in runs.items():
        limit = gb_per_s * 1e9 / ((bench.layer_weights + bench.head_weights) * (1 if "int8" in system else 4))
        if done[-1].error:
            rows.append([system, done[-1].error])
            continue
        rates = [run.new_tokens / run.wall_s for run in done]
        of_limit = f"{statistics.median(rates) / limit:.0%}"
        rows.append([system, *spread(rates), str(done[0].new_tokens), f"{limit:.1f}", of_limit])
    columns = ["system", "new tok/s", "min..max", "new tokens", "limit", "of limit"]
    print_table(f"single: one sequence, a prompt of 16 tokens, {len(CORES)} cores", columns, rows)
    print(
        f"  limit: {gb_per_s:.1f} GB/s, measured, / bytes of the linear weights with the head; the wall has the prompt"
    )
    return {"runs": dump(runs), "read_gb_per_s": gb_per_s}


def prefill(bench: Bench) -> dict[str, Any]:
    text = [token for ids in bench.prompts.values() for token in ids]
    text *= 1 + LONG_PROMPT // len(text)
    records = max(2, round(8 * bench.share))
    # Each starts elsewhere in the text, so that no two have a beginning in common.
    prompts = {f"long-{i}": (text[i * 7 :] + text)[:LONG_PROMPT] for i in range(records)}
    limits: list[dict[str, float]] = []
    measure = functools.partial(measure_gemm, bench, STEP_TOKENS, head=False)
    runs = rounds(bench, "prefill", ["mpinfer-2x1", "mpinfer-1x1"], prompts, 1, lambda: limits.append(measure()))
    limit, own = (statistics.median(each[name] for each in limits) for name in ("libraries", "all"))
    attention = 2 * bench.attention_width * LONG_PROMPT**2 * records / 1e9  # QK and PV, under the causal mask
    linear = 2 * bench.layer_weights * LONG_PROMPT * records / 1e9
    rows = []
    for system, done in runs.items():
        if done[-1].error:
            rows.append([system, done[-1].error])
            continue
        wall_s = statistics.median(run.wall_s for run in done)
        rates = [LONG_PROMPT * records / run.wall_s for run in done]
        speeds = linear / wall_s, (linear + attention) / wall_s
        beside = [text for speed in speeds for text in (f"{speed:.1f}", f"{speed / limit:.0%}", f"{speed / own:.0%}")]
        rows.append([system, *spread(rates), f"{limit:.1f}", f"{own:.1f}", *beside])
    columns = ["system", "prompt tok/s", "min..max", "limit", "own limit", "GFLOP/s", "of limit", "of own"]
    columns += ["with attn", "of limit", "of own"]
    print_table(f"prefill: {records} prompts of {LONG_PROMPT} tokens, 1 new token", columns, rows)
    print(f"  GFLOP/s: linear layers without the head ({linear:.0f} GFLOP); attention adds {attention:.0f} GFLOP")
    beside = ", ".join(f"{each['libraries']:.1f} and {each['all']:.1f}" for each in limits)
    print(
        f"  limit: the same multiplications alone at {STEP_TOKENS} rows, one process on each core, after each round: by"
    )
    print(f"  torch or oneDNN; own: by mpinfer's kernel, where it is faster. {beside} GFLOP/s")
    return {"runs": dump(runs), "gemm_gflop_per_s": limits, "linear_gflop": linear, "attention_gflop": attention}


def overhead(bench: Bench) -> dict[str, Any]:
    text = [token for ids in bench.prompts.values() for token in ids]
    records = round(2000 * bench.share)
    prompts = {f"short-{i}": [text[(8 * i + k) % len(text)] for k in range(8)] for i in range(records)}
    runs = rounds(bench, "overhead", ["mpinfer-2x1"], prompts, 8)
    rows = []
    for repeat, run in enumerate(runs["mpinfer-2x1"]):
        phases = ("compute", "overhead", "send_wait", "receive_wait", "idle")
        for rank in run.timing.get("ranks", []):
            shares = [f"{rank[f'{phase}_s'] / run.wall_s:.2%}" for phase in phases]
            rows.append([str(repeat + 1), str(rank["rank"]), f"{run.wall_s:.2f}", *shares])
        if run.error:
            rows.append([str(repeat + 1), run.error])
        else:
            first, second = (rank["overhead_s"] for rank in run.timing["ranks"])
            beyond = (first - second) / run.wall_s
            rows.append([str(repeat + 1), "0 - 1", "", "", f"{beyond:.2%}"])
    columns = ["round", "rank", "wall s", "compute", "overhead", "send wait", "receive wait", "idle"]
    print_table(f"overhead: {records} records of 8 + 8 tokens, 2x1, shares of the wall", columns, rows)
    return {"runs": dump(runs)}


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "reference": reference,
    "single": single,
    "prefill": prefill,
    "overhead": overhead,
}


# Figures and tables


def rate_summary(done: list[Run], prompt_tokens: int) -> list[float]:
    return [] if done[-1].error else [(prompt_tokens + run.new_tokens) / run.wall_s for run in done]


def ratio(rates: dict[str, list[float]], runs: dict[str, list[Run]], system: str, base: str) -> str:
    if not rates.get(base):
        installed = base not in runs or not runs[base][-1].error.startswith("not installed")
        return "not run" if base not in runs else "failed" if installed else "not installed"
    return f"{statistics.median(rates[system]) / statistics.median(rates[base]):.2f}"


def spread(rates: list[float]) -> list[str]:
    return [f"{statistics.median(rates):.1f}", f"{min(rates):.1f}..{max(rates):.1f}"]


def dump(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """For `--json`: all of a run but its texts."""
    return {
        system: [{**asdict(run), "outputs": len(run.outputs), "new_tokens": run.new_tokens} for run in done]
        for system, done in runs.items()
    }


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Right-aligned but for the first column; a row of two cells is a name and a message."""
    full = [columns, *(row for row in rows if len(row) > 2)]
    first = max(len(row[0]) for row in [columns, *rows])
    widths = [max(len(row[i]) for row in full if i < len(row)) for i in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, *rows]:
        cells = [cell if len(row) == 2 else cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        print("  " + "  ".join([row[0].ljust(first), *cells]).rstrip(), flush=True)


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    wide = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if name in flags]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    preloaded = [library.name for library in PRELOADS if library.exists()]
    return {"cpu": model, "flags": wide, "cores": len(CORES), "versions": versions, "vllm_preloads": preloaded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("prompts", type=Path, help='JSONL file of {"id", "prompt"}')
    parser.add_argument("--records", type=int, default=RECORDS, help="records of the workload (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="most new tokens of a record (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (%(default)s)")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="of the reference section (%(default)s)")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    systems, sections = options.systems.split(","), options.sections.split(",")
    for name, known in [
        *((system, SYSTEMS) for system in systems),
        *((section, list(SECTIONS)) for section in sections),
    ]:
        if name not in known:
            parser.error(f"{name}: must be one of {', '.join(known)}")
    if "transformers" not in systems:
        systems.insert(0, "transformers")  # what the others' tokens are held against

    facts = machine()
    print(shlex.join(["python", *sys.argv]))
    print(f"{facts['cpu']} ({' '.join(facts['flags'])}), {facts['cores']} cores; ", end="")
    print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()), flush=True)
    figures: dict[str, Any] = {"command": sys.argv, "machine": facts}
    with tempfile.TemporaryDirectory() as scratch:
        bench = prepare(options, systems, Path(scratch))
        for section in sections:
            figures[section] = SECTIONS[section](bench)
            if options.json:  # also after a section, as a whole comparison takes long
                options.json.write_text(json.dumps(figures, indent=2) + "\n")


def prepare(options: argparse.Namespace, systems: list[str], scratch: Path) -> Bench:
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "prompt" in record][: options.records]
    if len(records) < options.records:
        say(f"{options.prompts} has {len(records)} prompts only")
    prompts = {str(record["id"]): tokenizer(record["prompt"])["input_ids"] for record in records}
    model = meta_model(str(options.model))
    layers, head = linear_shapes(model)
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Bench(
        model=options.model.resolve(),
        scratch=scratch,
        repeats=options.repeats,
        systems=systems,
        prompts=prompts,
        new_tokens=options.new_tokens,
        share=options.records / RECORDS,
        layers=layers,
        head=head,
        attention_width=config.num_hidden_layers * config.num_attention_heads * head_size,
    )


if __name__ == "__main__":
    main()
