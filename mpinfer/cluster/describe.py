"""Machines that are not measured: described in a file, or made of nodes like this one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mpinfer.cluster.binding import allowed_cores, cpu_quota
from mpinfer.cluster.memory import local_memory_bytes
from mpinfer.errors import SpecError
from mpinfer.plan.machine import TYPICAL_BETWEEN, TYPICAL_INSIDE, Hardware, Link, Machine, Seat
from mpinfer.spec import AUTO, Auto, build, read_mapping, rule

# No real cluster comes near these; beyond them a number has a wrong unit.
_MOST = 1e6
_LEAST = 1e-6


@dataclass(frozen=True)
class NodesSpec:
    """A group of equal nodes."""

    cores: int = rule(minimum=1, maximum=_MOST)  # of a node
    memory_gb: float = rule(minimum=_LEAST, maximum=_MOST)  # of a node, in 10**9 bytes
    count: int = rule(1, minimum=1, maximum=_MOST)
    ranks: int | Auto = rule(AUTO, minimum=1, maximum=_MOST)  # of a node; auto: as many as on the others without
    speed: float = rule(1.0, minimum=_LEAST, maximum=_MOST)  # of a rank; a rank of speed 2 needs half the time


@dataclass(frozen=True)
class LinkSpec:
    latency_us: float = rule(minimum=0, maximum=_MOST)
    gb_per_s: float = rule(minimum=_LEAST, maximum=_MOST)  # in 10**9 bytes


@dataclass(frozen=True)
class LinksSpec:
    inside: LinkSpec | None = None  # a node
    between: LinkSpec | None = None  # nodes


@dataclass(frozen=True)
class RankSpec:
    """What a rank of speed 1 can do with all its cores."""

    gflops: float = rule(minimum=_LEAST, maximum=1e9)  # float32
    memory_gb_per_s: float = rule(minimum=_LEAST, maximum=_MOST)


@dataclass(frozen=True)
class ClusterSpec:
    nodes: tuple[NodesSpec, ...]
    links: LinksSpec = LinksSpec()
    rank: RankSpec | None = None


def load_cluster(path: str | Path, ranks: int, nodes: int | None = None) -> Machine:
    """The machine that a YAML file describes, with `ranks` ranks on `nodes` nodes (None: as many as it describes).

    Raises `SpecError` when the file cannot be read, breaks a rule, or describes other numbers of ranks or nodes.
    """
    spec = _read(path)
    per_node = _ranks_per_node(path, spec.nodes, ranks, nodes)
    groups = [group for group in spec.nodes for _ in range(group.count)]
    counts = [count for group, count in zip(spec.nodes, per_node, strict=True) for _ in range(group.count)]
    seats = [
        Seat(node, int(group.memory_gb * 1e9 / count), group.speed, min(1.0, group.cores / count))
        for node, (group, count) in enumerate(zip(groups, counts, strict=True))
        for _ in range(count)
    ]
    rank = spec.rank
    return Machine(
        tuple(seats),
        _link(spec.links.inside, TYPICAL_INSIDE),
        _link(spec.links.between, TYPICAL_BETWEEN),
        Hardware(rank.gflops * 1e9, rank.memory_gb_per_s * 1e9) if rank else None,
    )


def equal_nodes(path: str | Path) -> tuple[int, int, int]:
    """Nodes, ranks of a node, and whole cores of a rank (at least 1) that a YAML file describes.

    Raises `SpecError` when the file cannot be read or breaks a rule, and when its nodes differ in these.
    """
    groups = _read(path).nodes
    kinds = {(group.ranks, group.cores) for group in groups}
    (ranks, cores), *others = kinds
    if others or ranks == AUTO:
        what = "nodes differ in ranks or cores" if others else "nodes.ranks=auto"
        raise SpecError(
            f"{path}: {what}: a batch script asks for equal nodes with so many ranks; set nodes.ranks, or give --nodes "
            "and --ntasks-per-node instead of --cluster"
        )
    return sum(group.count for group in groups), ranks, max(1, cores // ranks)


def local_cluster(ranks: int, nodes: int) -> Machine:
    """`ranks` ranks spread evenly over `nodes` nodes like this one, the first ones taking the remainder.

    Their links are `TYPICAL_INSIDE` and `TYPICAL_BETWEEN`. Raises `SpecError` when a node would get no rank.
    """
    if not 1 <= nodes <= ranks:
        raise SpecError(
            f"--ranks {ranks} --nodes {nodes}: must be at least one rank on each of one or more nodes; raise --ranks"
        )
    memory_bytes, cores = local_memory_bytes(), min(len(allowed_cores()), cpu_quota() or float("inf"))
    each, more = divmod(ranks, nodes)
    counts = [each + (node < more) for node in range(nodes)]
    seats = [
        Seat(node, memory_bytes // count, cores=min(1.0, cores / count))
        for node, count in enumerate(counts)
        for _ in range(count)
    ]
    return Machine(tuple(seats), TYPICAL_INSIDE, TYPICAL_BETWEEN)


def _read(path: str | Path) -> ClusterSpec:
    tree = read_mapping(path, "cluster file", "nodes")
    spec: ClusterSpec = build(ClusterSpec, tree, f"{path}: ", "add it to the file")
    if not spec.nodes:
        raise SpecError(f"{path}: nodes=[]: must be at least one group of nodes; add {{cores: ..., memory_gb: ...}}")
    return spec


def _link(spec: LinkSpec | None, typical: Link) -> Link:
    return Link(spec.latency_us * 1e-6, spec.gb_per_s * 1e9) if spec else typical


def _ranks_per_node(path: str | Path, groups: Sequence[NodesSpec], ranks: int, nodes: int | None) -> list[int]:
    """Of each group: its own, or an equal share of what the others leave. Raises `SpecError` when they do not fit."""
    counts = _fit(groups, ranks, nodes)
    if counts is not None:
        return counts
    fixed, free, total = _sums(groups)
    described = [_plural(fixed, "rank")] if fixed else []
    described += [f"an equal number of ranks on {'each' if free == total else f'{free} of them'}"] if free else []
    flags = [
        f"--ranks {number}" + ("" if nodes is None else f" --nodes {total}") for number in _near(ranks, fixed, free)
    ]
    fixes = [f"use {' or '.join(flags)}"]
    for index, group in enumerate(groups):
        if nodes is not None:
            more = nodes - total
        else:
            more = 0 if group.ranks == AUTO else (ranks - fixed) // group.ranks
        other = replace(group, count=group.count + more)
        if other.count >= 1 and _fit([*groups[:index], other, *groups[index + 1 :]], ranks, nodes) is not None:
            fixes.append(f"set nodes[{index}].count to {other.count}")
    asked = f"--ranks {ranks}" + ("" if nodes is None else f" --nodes {nodes}")
    raise SpecError(
        f"{asked}: {path} describes {_plural(total, 'node')} with {' and '.join(described)}; {', or '.join(fixes)}"
    )


def _fit(groups: Sequence[NodesSpec], ranks: int, nodes: int | None) -> list[int] | None:
    """The ranks of a node of each group; None where they cannot be `ranks` on `nodes` nodes."""
    fixed, free, total = _sums(groups)
    if ranks not in _near(ranks, fixed, free) or nodes not in (None, total):
        return None
    share = (ranks - fixed) // free if free else 0
    return [share if group.ranks == AUTO else group.ranks for group in groups]


def _sums(groups: Sequence[NodesSpec]) -> tuple[int, int, int]:
    """Ranks of the groups that say how many they have, nodes of those that do not, nodes of all."""
    fixed = sum(group.count * group.ranks for group in groups if group.ranks != AUTO)
    free = sum(group.count for group in groups if group.ranks == AUTO)
    return fixed, free, sum(group.count for group in groups)


def _near(ranks: int, fixed: int, free: int) -> list[int]:
    """The numbers of ranks closest to `ranks` that come out even with `fixed` ranks and `free` equal nodes."""
    if ranks - fixed < free:
        return [fixed + free]
    rest = (ranks - fixed) % free if free else ranks - fixed
    return [ranks - rest, ranks - rest + free] if rest and free else [ranks - rest]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
