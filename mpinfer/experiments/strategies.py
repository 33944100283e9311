"""The strategies that can be compared: names, and the settings of a job that each stands for on so many ranks.

To add one, add a row to `STRATEGIES`; a matrix file adds more without any code.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpinfer.errors import SpecError
from mpinfer.spec import AUTO, Auto, build, read_mapping, rule, spec_from_dict, valid_keys

Settings = Mapping[str, Any]  # keys of a job file, as `--set` has them
Shape = Callable[[int], tuple[int | str, int | str, int | str]]  # of ranks: replicas, stages, shards

_AXES = ("parallel.replicas", "parallel.stages", "parallel.shards")


def _replicas(ranks: int) -> tuple[int, int, int]:
    return ranks, 1, 1


def _stages(ranks: int) -> tuple[int, int, int]:
    return 1, ranks, 1


def _shards(ranks: int) -> tuple[int, int, int]:
    return 1, 1, ranks


def _both(ranks: int) -> tuple[int, int, int]:
    return ranks // 2, 2, 1


def _planned(ranks: int) -> tuple[str, str, str]:
    return AUTO, AUTO, AUTO


@dataclass(frozen=True)
class Strategy:
    """One way to run a job. Those that divide nothing on a single rank need two."""

    name: str
    about: str
    shape: Shape = _planned
    settings: Settings = field(default_factory=dict)
    least_ranks: int = 1
    multiple: int = 1  # of which the number of ranks must be one

    def misfit(self, ranks: int) -> str:
        """Why it cannot be had on so many ranks; "" if it can."""
        if ranks < self.least_ranks:
            return f"needs {self.least_ranks} ranks or more"
        return f"needs a multiple of {self.multiple} ranks" if ranks % self.multiple else ""

    def on(self, ranks: int) -> dict[str, Any]:
        """Its settings."""
        return {**dict(zip(_AXES, self.shape(ranks), strict=True)), **self.settings}


STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("auto", "the layout that the planner chooses"),
        Strategy("data", "a copy of the model on each rank", _replicas),
        Strategy("pipeline", "one copy, a stage on each rank", _stages, least_ranks=2),
        Strategy("tensor", "one copy, every layer in a shard on each rank", _shards, least_ranks=2),
        Strategy("hybrid", "copies of two stages", _both, least_ranks=4, multiple=2),
        Strategy("blocking", "pipeline that waits for each send", _stages, {"transport.blocking": True}, least_ranks=2),
        Strategy(
            "nonblocking", "pipeline whose sends go on meanwhile", _stages, {"transport.blocking": False}, least_ranks=2
        ),
        Strategy("int8", "data, with weights and products in int8", _replicas, {"model.quantize": "int8"}),
        Strategy("wire-bf16", "pipeline, activations sent in bf16", _stages, {"transport.wire": "bf16"}, least_ranks=2),
        Strategy("wire-int8", "pipeline, activations sent in int8", _stages, {"transport.wire": "int8"}, least_ranks=2),
        Strategy(
            "static", "data, an even share for each rank", _replicas, {"parallel.dispatch": "static"}, least_ranks=2
        ),
        Strategy(
            "dynamic", "data, records as ranks ask for them", _replicas, {"parallel.dispatch": "dynamic"}, least_ranks=2
        ),
    )
}
DEFAULT = ("data", "pipeline", "tensor", "hybrid", "auto")


def named(names: Collection[str]) -> tuple[Strategy, ...]:
    """Strategies of the table, each once. Raises `SpecError` for a name that it does not have."""
    for name in names or [""]:
        if name not in STRATEGIES:
            raise SpecError(f"--strategies {name}: no such strategy; there are {', '.join(STRATEGIES)}")
    return tuple(STRATEGIES[name] for name in dict.fromkeys(names))


@dataclass(frozen=True)
class Matrix:
    """The keys of a matrix file. `strategies` are names here; what they stand for comes beside."""

    strategies: tuple[str, ...]
    ranks: tuple[int, ...] = rule((), minimum=1)
    repeats: int | Auto = rule(AUTO, minimum=1)
    reference: str | Auto = rule(AUTO)
    weak: bool = rule(False)


def load_matrix(path: str) -> tuple[Matrix, tuple[Strategy, ...]]:
    """A YAML file of strategies: names of the table, with nothing behind them, or the user's own with settings.

    Raises `SpecError`.
    """
    tree = read_mapping(path, "matrix file", "strategies")
    given = tree.get("strategies")
    if not isinstance(given, dict) or not given:
        raise SpecError(
            f"{path}: strategies={given!r}: is a mapping from names to settings; write for example 'data:' for one of "
            f"the table below it, or 'mine: {{parallel.stages: 2}}' for your own"
        )
    try:
        matrix: Matrix = build(Matrix, tree | {"strategies": [str(name) for name in given]}, "")
        return matrix, tuple(_strategy(str(name), settings) for name, settings in given.items())
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def _strategy(name: str, settings: Any) -> Strategy:
    if settings is None:
        if name not in STRATEGIES:
            raise SpecError(
                f"strategies.{name}: has no settings, and is none of {', '.join(STRATEGIES)}; give it settings"
            )
        return STRATEGIES[name]
    if not isinstance(settings, dict):
        raise SpecError(
            f"strategies.{name}={settings!r}: is a mapping of job keys to values; write for example "
            f"{{parallel.stages: 2}}"
        )
    keys = [key for key in valid_keys() if not key.startswith(("input.", "output."))]
    for key in settings:
        if key not in keys:
            raise SpecError(f"strategies.{name}.{key}: not a key that a strategy can set; those are {', '.join(keys)}")
    tree: dict[str, Any] = {"model": {"path": "-"}, "input": {"path": "-"}}
    for key, value in settings.items():
        section, _, leaf = key.partition(".")
        tree.setdefault(section, {})[leaf] = value
    try:
        spec_from_dict(tree)
    except SpecError as error:
        raise SpecError(f"strategies.{name}.{error}") from None
    return Strategy(name, "as the matrix file has it", settings=settings)
