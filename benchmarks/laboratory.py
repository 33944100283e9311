"""Run the laboratory on SmolLM2 and EfficientNet, and write docs/laboratory.md: every strategy on 1, 2 and 4 ranks.

    .venv/bin/python benchmarks/laboratory.py [--ranks 1,2,4] [--repeats 1] [--strategies A,B] [--photographs 512]

A rank computes with one thread, so that twice the ranks are twice the cores, as long as there are any. Needs the models
of launch/fetch_smollm2.sh and launch/fetch_efficientnet.sh, and a machine that does nothing else meanwhile.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("out/laboratory")
PAGE = ROOT / "docs/laboratory.md"
STRATEGIES = "data,pipeline,tensor,hybrid,blocking,nonblocking,int8,wire-bf16,wire-int8,static,dynamic,auto"
WEAK = "data,pipeline"  # strategies of the weak scaling


def repeat_photographs(count: int) -> Path:
    """A folder of the photographs of jobs/, as often as need be."""
    folder = OUTPUT / "photographs"
    (ROOT / folder).mkdir(parents=True)
    photographs = sorted((ROOT / "jobs/data/images").iterdir())
    for number in range(count):
        source = photographs[number % len(photographs)]
        os.link(source, ROOT / folder / f"{number:04}-{source.name}")
    return folder


def bench(name: str, *arguments: str) -> tuple[str, int]:
    """The table of one laboratory as Markdown, and how it ended."""
    program = [sys.executable, "-m", "mpinfer", "bench", *arguments, "--output", str(OUTPUT / name)]
    done = subprocess.run(program, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode > 1:
        sys.exit(f"{' '.join(program)} ended with {done.returncode}")
    return (ROOT / OUTPUT / name / "bench.md").read_text(encoding="utf-8"), done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4", metavar="N,...", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--strategies", default=STRATEGIES, metavar="A,...", help="(%(default)s)")
    parser.add_argument("--photographs", type=int, default=512, metavar="N", help="(%(default)s)")
    options = parser.parse_args()
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    photographs = repeat_photographs(options.photographs)
    common = ["-n", options.ranks, "--repeats", str(options.repeats)]
    every = ["--strategies", options.strategies, *common]
    tables = {
        "SmolLM2-135M: 32 prompts, at most 32 new tokens": bench("smollm2", "jobs/quickstart.yaml", *every),
        f"EfficientNet-Lite0: {options.photographs} photographs, of 4": bench(
            "efficientnet", "jobs/classify_images.yaml", "--set", f"input.path={photographs}", *every
        ),
        "SmolLM2-135M, weak scaling": bench("weak", "jobs/quickstart.yaml", "--strategies", WEAK, *common, "--weak"),
    }
    command = shlex.join(["python", "benchmarks/laboratory.py", *sys.argv[1:]])
    lines = [
        "# The laboratory",
        f"Written by `{command}`, which runs the commands below "
        "with `OMP_NUM_THREADS=1`. What the columns mean: [Strategies side by side](bench.md#the-columns).",
        *(f"## {title}\n\n{table.strip()}" for title, (table, _) in tables.items()),
    ]
    PAGE.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(max(code for _, code in tables.values()))


if __name__ == "__main__":
    main()
