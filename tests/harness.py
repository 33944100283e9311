"""Start worlds of ranks under the MPIs at hand, and hold what they computed against transformers."""

import functools
import json
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

REPO = Path(__file__).resolve().parents[1]
FAULTY_RANK = REPO / "tests/faults/faulty_rank.py"
VENVS_VARIABLE = "MPINFER_TEST_VENVS"
DEFAULT_VENVS = "openmpi=.venv mpich=.venv-mpich"
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (1, 4)]  # replicas x stages
MAX_NEW_TOKENS = 12  # of the small job
NEAR_TIE = 1e-3  # logits closer than this may fall either way
DIVERGED_SHARE = 0.01  # of the records that may meet such a tie

# mpinfer binds by itself, and more ranks than cores are the rule here.
_LAUNCHER_OPTIONS = {"openmpi": ("--oversubscribe", "--bind-to", "none"), "mpich": ("-bind-to", "none")}
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
_MARK = "MPINFER_TEST_WORLD"


@dataclass(frozen=True)
class Mpi:
    """An environment with an MPI library, its launcher, and mpinfer."""

    name: str
    bin_dir: Path
    options: tuple[str, ...] = ()  # of its launcher, besides the usual ones

    def command(self, ranks: int | None, args: Sequence[Any]) -> list[str]:
        """Start a program of this environment on `ranks` ranks; on None alone, without a launcher."""
        program = [str(self.bin_dir / str(args[0])), *map(str, args[1:])]
        if ranks is None:
            return program
        return [str(self.bin_dir / "mpiexec"), *_LAUNCHER_OPTIONS[self.name], *self.options, "-n", str(ranks), *program]


@functools.cache
def _kernels() -> list[Path]:
    """Compiled once for all tests."""
    import torch

    from mpinfer.directories import cache_directory
    from mpinfer.models.kernels import find_kernels

    find_kernels("auto", "cpu", torch.float32)
    return list(cache_directory().glob("kernels-*.so"))


def own_cache(scratch: Path) -> dict[str, str]:
    """A variable that gives a world a cache of its own: links that one test measured are not another's."""
    directory = scratch / "mpinfer"
    directory.mkdir(mode=0o700)
    for library in _kernels():
        (directory / library.name).symlink_to(library)
    return {"XDG_CACHE_HOME": str(scratch)}


def find_mpis() -> list[Mpi]:
    """The MPIs that MPINFER_TEST_VENVS names, there or not; without it the default ones that are there."""
    named = os.environ.get(VENVS_VARIABLE)
    pairs = [entry.partition("=") for entry in (named or DEFAULT_VENVS).split()]
    mpis = [Mpi(name, REPO / venv / "bin") for name, _, venv in pairs]
    if unknown := {mpi.name for mpi in mpis} - _LAUNCHER_OPTIONS.keys():
        raise pytest.UsageError(f"{VENVS_VARIABLE}={named}: {unknown} is none of {', '.join(_LAUNCHER_OPTIONS)}")
    # With nothing there every test has to fail, not to vanish.
    return mpis if named else [mpi for mpi in mpis if mpi.bin_dir.is_dir()] or mpis


def require(mpi: Mpi) -> Mpi:
    """Fail the test when the environment is incomplete."""
    for program in ("mpiexec", "mpinfer", "python"):
        if not (mpi.bin_dir / program).exists():
            pytest.fail(f"{mpi.name}: no {program} in {mpi.bin_dir}; set {VENVS_VARIABLE} to what is there")
    return mpi


class World:
    """A program on the ranks of one MPI; as a context, until its last process is dead.

    Its processes are told by a mark in their environment: the launchers put ranks into process groups of
    their own, so killing the launcher's group would leave them behind.
    """

    def __init__(
        self,
        mpi: Mpi,
        ranks: int | None,
        args: Sequence[Any],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        mark = uuid.uuid4().hex
        self._mark = f"{_MARK}={mark}".encode()
        self._scratch = tempfile.TemporaryDirectory(prefix="world-")  # launchers that are killed leave files behind
        self._texts = Path(self._scratch.name, "stdout"), Path(self._scratch.name, "stderr")
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        cache = own_cache(Path(self._scratch.name))
        with self._texts[0].open("wb") as stdout, self._texts[1].open("wb") as stderr:
            self.launcher = subprocess.Popen(
                mpi.command(ranks, args),
                cwd=cwd,
                env={**inherited, **root, **cache, **(env or {}), "TMPDIR": self._scratch.name, _MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._scratch.cleanup()

    def processes(self) -> dict[int, dict[bytes, bytes]]:
        """Environments of this world's living processes, by process id."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                entries = path.read_bytes().split(b"\0")
            except OSError:  # ended meanwhile, or not ours
                continue
            if self._mark in entries:
                found[int(path.parts[2])] = {name: value for name, _, value in (e.partition(b"=") for e in entries)}
        return found

    def ranks(self) -> dict[int, int]:
        """Process ids by rank. A rank's own children come after it."""
        found: dict[int, int] = {}
        for pid, environment in sorted(self.processes().items()):
            for variable in _RANK_VARIABLES:
                if rank := environment.get(variable.encode()):
                    found.setdefault(int(rank), pid)
        return found

    @property
    def ended(self) -> bool:
        return self.launcher.poll() is not None and not self.processes()

    @property
    def stderr(self) -> str:
        return self._read()[1]

    def wait(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Wait for the end of all processes; fails the test when one still lives after `timeout_s`."""
        if not eventually(lambda: self.ended, timeout_s):
            self._fail(f"still ran after {timeout_s} s")
        return subprocess.CompletedProcess(self.launcher.args, self.launcher.returncode, *self._read())

    def wait_until(self, condition: Callable[[], Any], timeout_s: float) -> None:
        """Wait for something to happen; fails the test when the world ends before, or `timeout_s` is over."""
        if not eventually(lambda: condition() or self.ended, timeout_s) or self.ended:
            self._fail("ended" if self.ended else f"had not come so far after {timeout_s} s")

    def kill(self) -> None:
        while processes := self.processes():
            for pid in processes:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        self.launcher.wait()

    def _fail(self, problem: str) -> NoReturn:
        self.kill()
        pytest.fail("\n".join([f"{self.launcher.args} {problem}", *self._read()]))

    def _read(self) -> list[str]:
        return [text.read_text(errors="replace") for text in self._texts]


def mpirun(
    mpi: Mpi,
    ranks: int | None,
    args: Sequence[Any],
    timeout_s: float = 120,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program on `ranks` ranks to its end, or on None alone; nothing of it is left afterwards."""
    with World(mpi, ranks, args, cwd, env) as world:
        return world.wait(timeout_s)


def complete_run(
    mpi: Mpi,
    ranks: int | None,
    job: Path,
    output: Path,
    *overrides: str,
    resume: bool = False,
    cwd: Path | None = None,
    timeout_s: float = 120,
) -> Path:
    """Run a job to its end and check that it says it is complete; returns the output directory."""
    options = [part for override in overrides for part in ("--set", override)]
    program = ["mpinfer", "run", job, "--output", output, *options, *["--resume"] * resume]
    run = mpirun(mpi, ranks, program, timeout_s, cwd)
    assert run.returncode == 0, run.stderr
    assert json.loads((output / "manifest.json").read_text())["complete"] is True
    return output


def eventually(condition: Callable[[], Any], timeout_s: float) -> bool:
    """Poll until `condition` holds; False when it still does not after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_timing(output: Path) -> dict[str, Any]:
    return json.loads((output / "timing.json").read_text())


@dataclass(frozen=True)
class Reference:
    """What transformers generates greedily for one prompt."""

    tokens: list[int]
    margins: list[float]  # between the two best logits, for each token


@dataclass(frozen=True)
class Tiny:
    """A small model with random weights, a job for it, and what transformers makes of the job."""

    directory: Path
    prompts: list[list[int]]
    references: list[Reference]

    @property
    def job(self) -> Path:
        return self.directory / "job.yaml"

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def records(self) -> Path:
        return self.directory / "records.jsonl"


def generate_reference(model: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Reference]:
    """What transformers' `generate` makes of each prompt. Prompts of one length share a batch: nothing is padded."""
    import torch

    by_length = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    references: dict[int, Reference] = {}
    for length, indices in by_length.items():
        ids = torch.tensor([prompts[index] for index in indices])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(made.logits, dim=1).topk(2).values  # [records, tokens, 2]
        for row, index in enumerate(indices):
            tokens = _until_stop(made.sequences[row, length:].tolist(), model.generation_config.eos_token_id)
            margins = (best[row, :, 0] - best[row, :, 1]).tolist()
            references[index] = Reference(tokens, margins[: len(tokens)])
    return [references[index] for index in range(len(prompts))]


@contextmanager
def one_thread() -> Iterator[None]:
    """For a model so small that threads would only wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _until_stop(tokens: list[int], stop: int | list[int] | None) -> list[int]:
    """A batch goes on until its last row has stopped: cut the padding after a row's own end."""
    stops = stop if isinstance(stop, list) else [stop]
    end = next((position for position, token in enumerate(tokens, start=1) if token in stops), len(tokens))
    return tokens[:end]


def assert_token_rule(results: Sequence[dict[str, Any]], references: Sequence[Reference]) -> None:
    """Greedy tokens equal the reference's; a few records may leave it, but only from a near tie on."""
    assert [result["index"] for result in results] == list(range(len(references)))
    diverged = 0
    for result, reference in zip(results, references, strict=True):
        tokens = result["output"]["token_ids"]
        if tokens == reference.tokens:
            continue
        pairs = zip(tokens, reference.tokens, strict=False)
        position = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        where = f"record {result['index']}: {tokens} instead of {reference.tokens}"
        assert position is not None, f"{where}: one only continues the other"
        assert reference.margins[position] <= NEAR_TIE, f"{where}: no tie, {reference.margins[position]} apart"
        diverged += 1
    assert diverged <= DIVERGED_SHARE * len(references), f"{diverged} of {len(references)} records diverge"
