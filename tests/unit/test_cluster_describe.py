import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpinfer.cluster import describe
from mpinfer.cluster.describe import load_cluster, local_cluster
from mpinfer.errors import SpecError
from mpinfer.plan.machine import TYPICAL_BETWEEN, TYPICAL_INSIDE, Hardware, Link, Seat

REPO = Path(__file__).parents[2]
EXAMPLE = REPO / "jobs" / "data" / "cluster.yaml"
DOCUMENT = REPO / "docs" / "cluster-file.md"
THREE = "nodes: [{count: 3, cores: 2, memory_gb: 4}]"
MIXED = "nodes: [{count: 3, cores: 2, memory_gb: 4}, {ranks: 4, cores: 4, memory_gb: 16}]"


@pytest.mark.parametrize("nodes", [18, None])
def test_the_example(nodes: int | None) -> None:
    machine = load_cluster(EXAMPLE, 136, nodes)
    assert machine.nodes == 18
    assert machine.seats[:128] == tuple(Seat(rank // 8, 32 * 10**9) for rank in range(128))
    assert machine.seats[128:] == tuple(Seat(16 + rank // 4, 32 * 10**9, speed=0.5) for rank in range(8))
    assert (machine.inside, machine.between) == (Link(1e-6, 10e9), Link(2e-6, 12e9))
    assert machine.hardware == Hardware(900e9, 40e9)


def test_a_short_file_takes_typical_links_and_spreads_the_ranks(tmp_path: Path) -> None:
    machine = load_cluster(cluster(tmp_path, THREE), 9)
    assert [seat.node for seat in machine.seats] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {(seat.memory_bytes, seat.cores) for seat in machine.seats} == {(1_333_333_333, 2 / 3)}
    assert (machine.inside, machine.between, machine.hardware) == (TYPICAL_INSIDE, TYPICAL_BETWEEN, None)


def test_groups_without_ranks_share_what_the_others_leave(tmp_path: Path) -> None:
    machine = load_cluster(cluster(tmp_path, MIXED), 10, 4)
    assert [seat.node for seat in machine.seats] == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]


def test_one_group_needs_no_brackets(tmp_path: Path) -> None:
    assert len(load_cluster(cluster(tmp_path, "nodes: {cores: 1, memory_gb: 2}"), 1).seats) == 1


@pytest.mark.parametrize(
    ("text", "ranks", "nodes", "message"),
    [
        (None, 8, 2, "describes 18 nodes with 136 ranks; use --ranks 136 --nodes 18"),
        (None, 128, 17, "; use --ranks 136 --nodes 18, or set nodes[0].count to 15"),
        (None, 132, 17, "; use --ranks 136 --nodes 18, or set nodes[1].count to 1"),
        (None, 120, None, "; use --ranks 136, or set nodes[0].count to 14"),
        (THREE, 10, None, "describes 3 nodes with an equal number of ranks on each; use --ranks 9 or --ranks 12"),
        (THREE, 8, 3, "; use --ranks 6 --nodes 3 or --ranks 9 --nodes 3"),
        (THREE, 2, 3, "; use --ranks 3 --nodes 3"),
        (THREE, 6, 2, "; use --ranks 6 --nodes 3, or set nodes[0].count to 2"),
        (MIXED, 3, None, "4 nodes with 4 ranks and an equal number of ranks on 3 of them; use --ranks 7"),
        (MIXED, 0, 0, "; use --ranks 7 --nodes 4"),
    ],
)
def test_other_numbers_than_described(
    tmp_path: Path, text: str | None, ranks: int, nodes: int | None, message: str
) -> None:
    path = cluster(tmp_path, text) if text else EXAMPLE
    asked = f"--ranks {ranks}: " if nodes is None else f"--ranks {ranks} --nodes {nodes}: "
    with pytest.raises(SpecError, match=re.escape(f"{asked}{path} ")) as caught:
        load_cluster(path, ranks, nodes)
    assert str(caught.value).endswith(message)


def test_the_advice_works(tmp_path: Path) -> None:
    """Whatever was asked for, the numbers that the message gives are right."""
    for text in (THREE, MIXED, EXAMPLE.read_text()):
        path = cluster(tmp_path, text)
        for ranks in range(1, 30):
            try:
                load_cluster(path, ranks)
            except SpecError as error:
                fix = str(error).partition("; ")[2]
                numbers = re.findall(r"--ranks (\d+)", fix)
                assert numbers
                for number in numbers:
                    load_cluster(path, int(number))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nodes: a required key is missing; add it to the file"),
        ("[1]", "a cluster file is a mapping of sections, not a list; start with 'nodes:'"),
        ("nodes: []", "nodes=[]: must be at least one group of nodes; add {cores: ..., memory_gb: ...}"),
        ("nodes: 5", "nodes[0]=5: a section is a mapping of keys; indent its keys below it"),
        ("nodes: [{cores: 2}]", "nodes[0].memory_gb: a required key is missing; add it to the file"),
        ("nodes: [{core: 2}]", "nodes[0].core: unknown key; valid keys here are cores, memory_gb, count, ranks, speed"),
        ("nodes: [{cores: 1.5, memory_gb: 1}]", "nodes[0].cores=1.5: must be int; correct the value"),
        ("nodes: [{cores: 0, memory_gb: 1}]", "nodes[0].cores=0: must be at least 1; raise it"),
        ("nodes: [{cores: 1, memory_gb: .inf}]", "nodes[0].memory_gb=inf: must be at most 1e+06; lower it"),
        ("nodes: [{cores: 1, memory_gb: .nan}]", "nodes[0].memory_gb=nan: is not a number; correct the value"),
        ("nodes: [{cores: 1, memory_gb: 1, ranks: x}]", "nodes[0].ranks='x': must be int or 'auto'; correct the value"),
        (THREE + "\nlinks: {outside: 1}", "links.outside: unknown key; valid keys here are inside, between"),
        (
            THREE + "\nlinks: {inside: {latency_us: 1}}",
            "links.inside.gb_per_s: a required key is missing; add it to the file",
        ),
        (
            THREE + "\nlinks: {between: {latency_us: 1, gb_per_s: 0}}",
            "links.between.gb_per_s=0.0: must be at least 1e-06; raise it",
        ),
        (THREE + "\nrank: {gflops: 1}", "rank.memory_gb_per_s: a required key is missing; add it to the file"),
        (THREE + "\nspeed: 1", "speed: unknown key; valid keys here are nodes, links, rank"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = cluster(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        load_cluster(path, 3)
    assert str(caught.value) == f"{path}: {message}"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the cluster file cannot be read"):
        load_cluster(tmp_path / "none.yaml", 1)


def test_nodes_like_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "local_memory_bytes", lambda: 12 * 10**9)
    monkeypatch.setattr(describe, "allowed_cores", lambda: frozenset(range(8)))
    monkeypatch.setattr(describe, "cpu_quota", lambda: 2.0)
    machine = local_cluster(5, 2)
    assert machine.seats == (*[Seat(0, 4 * 10**9, cores=2 / 3)] * 3, *[Seat(1, 6 * 10**9)] * 2)
    assert (machine.inside, machine.between, machine.hardware) == (TYPICAL_INSIDE, TYPICAL_BETWEEN, None)


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 2), (0, 0), (1, 0)])
def test_every_node_has_a_rank(ranks: int, nodes: int) -> None:
    with pytest.raises(SpecError, match=f"--ranks {ranks} --nodes {nodes}: "):
        local_cluster(ranks, nodes)


def test_the_document_shows_the_example() -> None:
    [shown] = re.findall(r"^```yaml\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert shown in EXAMPLE.read_text(encoding="utf-8")


def test_the_document_has_every_key() -> None:
    shown = re.findall(r"^\| `([\w.]+)` \| .+? \| (.+?) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    links = {"inside": TYPICAL_INSIDE, "between": TYPICAL_BETWEEN}
    assert dict(shown) == {
        **dict(keys(describe.NodesSpec, "nodes.")),
        **{f"links.{name}.latency_us": f"`{link.latency_s * 1e6:g}`" for name, link in links.items()},
        **{f"links.{name}.gb_per_s": f"`{link.bytes_per_s / 1e9:g}`" for name, link in links.items()},
        **dict(keys(describe.RankSpec, "rank.")),
    }


def keys(section: type, prefix: str) -> Iterator[tuple[str, str]]:
    """Each key with its default, as the document shows it."""
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING
        yield prefix + field.name, "required" if required else f"`{field.default}`"


def cluster(directory: Path, text: str) -> Path:
    path = directory / "cluster.yaml"
    path.write_text(text)
    return path
