"""What `mpinfer doctor` prints: who runs where, with what, and what looks wrong."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mpinfer.cluster.binding import overlap
from mpinfer.cluster.context import NO_LAUNCHER

_BIND_NOTHING = (
    "let mpinfer bind them: --bind-to none (Open MPI), -bind-to none (MPICH), I_MPI_PIN=0 (Intel MPI) or "
    "--cpu-bind=none (srun)"
)

_MOST_LINES = 12  # kinds of node in a report
_MOST_SPANS = 6  # spans in a list of numbers

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class RankFacts:
    """What one rank knows of itself."""

    rank: int
    node: str
    local_rank: int
    cores: tuple[int, ...]
    threads: int
    mpi_library: str
    mpi4py_version: str
    torch_version: str
    mpinfer_version: str
    python_version: str
    device: str
    memory_bytes: int  # that its node lets us use


# What a version is called, and where it stands.
_VERSIONS = {
    "mpinfer": "mpinfer_version",
    "Python": "python_version",
    "torch": "torch_version",
    "mpi4py": "mpi4py_version",
    "MPI": "mpi_library",
}


def doctor_report(launcher: str, ranks: Sequence[RankFacts]) -> str:
    """A report that fits a screen however many the ranks: ranks with equal facts share a line."""
    nodes = _by_node(ranks)
    core_count = sum(len(_cores(members)) for members in nodes.values())
    software = _fold((_software(facts), facts.rank) for facts in ranks)
    hardware = _fold((_hardware(members), node) for node, members in nodes.items())
    lines = [
        f"launcher  {launcher}",
        f"world     {_plural(len(ranks), 'rank')} on {_plural(len(nodes), 'node')}, {_plural(core_count, 'core')}",
    ]
    for text, numbers in software.items():
        where = f"{_ranks(numbers)}: " if len(software) > 1 else ""
        lines.append(f"software  {where}{text}")
    for text, names in list(hardware.items())[:_MOST_LINES]:
        numbers = [facts.rank for name in names for facts in nodes[name]]
        lines.append(f"{_names(names)}  {_ranks(numbers)}: {text}")
    if len(hardware) > _MOST_LINES:
        lines.append(f"and {len(hardware) - _MOST_LINES} more kinds of node")
    found = warnings(launcher, ranks)
    return "\n".join([*lines, *(f"warning: {text}" for text in found), *([] if found else ["ok"])])


def warnings(launcher: str, ranks: Sequence[RankFacts]) -> list[str]:
    """What looks wrong, one line each; empty when nothing does."""
    mixed = mixed_versions([facts.node for facts in ranks], [_versions(facts) for facts in ranks])
    return [*mixed, *_crowded_nodes(ranks), *_lonely_rank(launcher, ranks)]


def mixed_versions(nodes: Sequence[str], software: Sequence[Mapping[str, str]]) -> list[str]:
    """What differs between ranks, one line each; `software` holds for each rank the versions of what it runs."""
    found = []
    for name in software[0]:
        versions = _fold((versions[name], rank) for rank, versions in enumerate(software))
        if len(versions) > 1:
            listed = ", ".join(
                f"{version} on {_ranks(ranks)} of {_names(list(dict.fromkeys(nodes[rank] for rank in ranks)))}"
                for version, ranks in versions.items()
            )
            found.append(f"{name} differs between ranks: {listed}; use one environment on all nodes")
    return found


def overlapping_bindings(nodes: Sequence[str], cores: Sequence[Sequence[int]]) -> list[str]:
    """One line, if any; `nodes` and `cores` hold for each rank where it is and what it was bound to."""
    masks = _fold((node, frozenset(own)) for node, own in zip(nodes, cores, strict=True))
    names = [node for node, peers in masks.items() if overlap(peers)]
    return [f"{_names(names)}: the launcher's bindings of ranks overlap in part; {_BIND_NOTHING}"] if names else []


def _versions(facts: RankFacts) -> dict[str, str]:
    return {name: _first_line(getattr(facts, attribute)) for name, attribute in _VERSIONS.items()}


def _crowded_nodes(ranks: Sequence[RankFacts]) -> list[str]:
    crowded, overlapping = [], []
    nodes = _by_node(ranks)
    for node, members in nodes.items():
        cores = _cores(members)
        if len(members) > len(cores):
            crowded.append(node)
        elif sum(len(facts.cores) for facts in members) > len(cores):
            overlapping.append(node)
    found = []
    if crowded:
        members = nodes[crowded[0]]
        found.append(
            f"{_names(crowded)}: more ranks than cores ({len(members)} ranks on {len(_cores(members))} cores); "
            "they take turns: start at most one rank a core"
        )
    if overlapping:
        found.append(f"{_names(overlapping)}: ranks run on the same cores; {_BIND_NOTHING}")
    return found


def _lonely_rank(launcher: str, ranks: Sequence[RankFacts]) -> list[str]:
    if len(ranks) > 1 or launcher == NO_LAUNCHER:
        return []
    return [
        f"{launcher} shows a world of one rank: if you asked for more, use the mpiexec beside this Python, "
        "or srun --mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH)"
    ]


def _software(facts: RankFacts) -> str:
    versions = _versions(facts).items()
    return ", ".join(version if name == "MPI" else f"{name} {version}" for name, version in versions)


def _hardware(members: Sequence[RankFacts]) -> str:
    """One node in one line, without its name and ranks, so that equal nodes give equal lines."""
    return ", ".join(
        [
            f"{len(members)} a node",
            f"cores {_spans(_cores(members))}",
            f"{_extent(len(facts.cores) for facts in members)} a rank",
            f"threads {_extent(facts.threads for facts in members)}",
            f"device {' '.join(sorted({facts.device for facts in members}))}",
            f"{min(facts.memory_bytes for facts in members) / 2**30:.0f} GiB",
        ]
    )


def _by_node(ranks: Sequence[RankFacts]) -> dict[str, list[RankFacts]]:
    return _fold((facts.node, facts) for facts in ranks)


def _cores(members: Iterable[RankFacts]) -> set[int]:
    return {core for facts in members for core in facts.cores}


Value = TypeVar("Value")


def _fold(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """The values of equal keys together, in the order of their first appearance."""
    folded: dict[Key, list[Value]] = defaultdict(list)
    for key, value in pairs:
        folded[key].append(value)
    return folded


def _first_line(version: str) -> str:
    """MPI libraries tell their whole build; the name and the number are the first words."""
    return " ".join(version.split("\n")[0].split(",")[0].split())


def _ranks(numbers: Sequence[int]) -> str:
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {_spans(numbers)}"


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} nodes)"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _extent(numbers: Iterable[int]) -> str:
    """4, or 3-4 where they differ."""
    ordered = sorted(numbers)
    return f"{ordered[0]}" if ordered[0] == ordered[-1] else f"{ordered[0]}-{ordered[-1]}"


def _spans(numbers: Iterable[int]) -> str:
    """0-3, 8, 10-11; a long list ends in how many are left."""
    ordered = sorted(numbers)
    spans: list[list[int]] = []
    for number in ordered:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    shown, hidden = spans[:_MOST_SPANS], spans[_MOST_SPANS:]
    more = [f"{sum(map(len, hidden))} more"] if hidden else []
    return ", ".join([*map(_extent, shown), *more])
