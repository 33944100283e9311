import os
import re
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mpinfer.cluster.allocation import LinkCache, allocation_key, machine_links
from mpinfer.plan.machine import Link

INSIDE, BETWEEN = Link(0.6e-6, 9.1e9), Link(12e-6, 1.1e9)
TWO_NODES = ["a", "a", "b", "b"]
LIBRARY = "Open MPI v5"


class Rank:
    """A rank that broadcasts to itself, or hears what rank 0 said."""

    def __init__(self, rank: int = 0, heard: Any = None) -> None:
        self.rank, self.said, self._heard = rank, None, heard

    def broadcast(self, body: Any) -> Any:
        self.said = body
        return body if self.rank == 0 else self._heard


class Probe:
    def __init__(self, between: Link | None = BETWEEN) -> None:
        self.calls, self._links = 0, (INSIDE, between)

    def __call__(self) -> tuple[Link, Link | None]:
        self.calls += 1
        return self._links


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_links_are_measured_once(environ: dict[str, str]) -> None:
    probe = Probe()
    first = machine_links(Rank(), TWO_NODES, LIBRARY, probe, environ)
    second = machine_links(Rank(), TWO_NODES, LIBRARY, probe, environ)
    assert probe.calls == 1
    figures = "links: inside 0.6 us, 9.1 GB/s; between nodes 12 us, 1.1 GB/s"
    assert re.fullmatch(re.escape(figures) + r" \(measured in \d+\.\d s\)", str(first))
    assert str(second) == f"{figures} (cached)"
    assert (second.inside, second.between) == (first.inside, first.between) == (INSIDE, BETWEEN)


def test_one_node_has_no_links_between(environ: dict[str, str]) -> None:
    for _ in range(2):
        links = machine_links(Rank(), ["a", "a"], LIBRARY, Probe(None), environ)
        assert str(links) == f"links: inside 0.6 us, 9.1 GB/s ({links.origin})"
    assert (links.between, links.origin) == (None, "cached")


def test_one_rank_a_node_assumes_what_is_inside(environ: dict[str, str]) -> None:
    links = machine_links(Rank(), ["a", "b"], LIBRARY, Probe(), environ)
    assert links.origin.endswith(" s; inside assumed: no node has two ranks")


def test_one_rank_remembers_nothing(environ: dict[str, str]) -> None:
    assert machine_links(Rank(), ["a"], LIBRARY, Probe(None), environ).origin == "assumed: one rank sends nothing"
    assert not Path(environ["XDG_CACHE_HOME"]).exists()


def test_only_rank_0_touches_files(environ: dict[str, str]) -> None:
    probe, coordinator = Probe(), Rank()
    machine_links(Rank(1), TWO_NODES, LIBRARY, probe, environ)
    assert probe.calls == 1
    assert not Path(environ["XDG_CACHE_HOME"]).exists()
    machine_links(coordinator, TWO_NODES, LIBRARY, probe, environ)
    machine_links(coordinator, TWO_NODES, LIBRARY, probe, environ)
    other = machine_links(Rank(1, coordinator.said), TWO_NODES, LIBRARY, probe, environ)
    assert (other.inside, other.between, probe.calls) == (INSIDE, BETWEEN, 2)


def test_files_are_private(environ: dict[str, str]) -> None:
    machine_links(Rank(), TWO_NODES, LIBRARY, Probe(), environ)
    directory = Path(environ["XDG_CACHE_HOME"], "mpinfer")
    [file] = directory.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (directory, file)] == [0o700, 0o600]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"inside": null, "between": null}',
        '{"inside": [0, 1], "between": null}',
        '{"inside": [1], "between": null}',
        '{"inside": [1, Infinity], "between": null}',
        '{"inside": [1, 1], "between": "x"}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_damaged_cache_is_measured_again(environ: dict[str, str], text: str) -> None:
    probe = Probe()
    machine_links(Rank(), TWO_NODES, LIBRARY, probe, environ)
    path = cache(environ).path
    path.write_bytes(text.encode(errors="surrogateescape"))
    links = machine_links(Rank(), TWO_NODES, LIBRARY, probe, environ)
    assert links.origin.endswith(f" s; {path} was damaged")
    assert machine_links(Rank(), TWO_NODES, LIBRARY, probe, environ).origin == "cached"


def test_a_cache_that_cannot_be_used_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environ = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    links = machine_links(Rank(), TWO_NODES, LIBRARY, Probe(), environ)
    assert links.inside == INSIDE
    assert f"not remembered in {tmp_path}/file/mpinfer: Not a directory" in links.origin


def test_a_relative_cache_directory_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache({"XDG_CACHE_HOME": "here"}).path.parent == tmp_path / ".cache" / "mpinfer"
    monkeypatch.setenv("HOME", "nowhere")
    links = machine_links(Rank(), TWO_NODES, LIBRARY, Probe(), {})
    assert links.origin.endswith("not remembered: this user has no home directory")


def test_a_failed_write_leaves_nothing(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    links = machine_links(Rank(), TWO_NODES, LIBRARY, Probe(), environ)
    assert links.origin.endswith("No space left on device")
    assert not list(cache(environ).path.parent.iterdir())


def test_old_figures_are_measured_again(environ: dict[str, str]) -> None:
    probe = Probe()
    machine_links(Rank(), TWO_NODES, LIBRARY, probe, environ)
    yesterday = time.time() - 25 * 3600
    os.utime(cache(environ).path, (yesterday, yesterday))
    for _ in range(2):
        machine_links(Rank(), TWO_NODES, LIBRARY, probe, environ)
    assert probe.calls == 2


def test_the_newest_allocations_are_kept(environ: dict[str, str]) -> None:
    for number in range(40):
        entry = LinkCache(str(number), environ)
        entry.write((INSIDE, None))
        os.utime(entry.path, (number, number))
    LinkCache("last", environ).write((INSIDE, None))
    left = {path.name for path in LinkCache("last", environ).path.parent.iterdir()}
    assert left == {f"links-{name}.json" for name in [*range(9, 40), "last"]}


def test_what_names_an_allocation(tmp_path: Path) -> None:
    boot = tmp_path / "proc/sys/kernel/random/boot_id"
    boot.parent.mkdir(parents=True)
    boot.write_text("first\n")

    def key(names: list[str] = TWO_NODES, library: str = LIBRARY, environ: Mapping[str, str] | None = None) -> str:
        return allocation_key(names, library, environ or {}, tmp_path)

    base, job = key(), key(environ={"SLURM_JOB_ID": "1"})
    assert key(["b", "a", "b", "a"], environ={"HOME": "/x"}) == base
    others = [
        key(["a", "a", "b"]),
        key(["a", "a", "c", "c"]),
        key(library="MPICH"),
        key(environ={"OMPI_MCA_btl": "tcp,self"}),
        job,
        key(environ={"SLURM_JOB_ID": "2"}),
        key(environ={"PBS_JOBID": "1"}),
        key(environ={"LSB_JOBID": "1"}),
    ]
    boot.write_text("second\n")
    assert key(environ={"SLURM_JOB_ID": "1"}) == job
    assert len({base, *others, key()}) == len(others) + 2


def test_without_a_boot_id_there_is_a_name_still(tmp_path: Path) -> None:
    assert allocation_key(TWO_NODES, LIBRARY, {}, tmp_path) == allocation_key(TWO_NODES, LIBRARY, {}, tmp_path)


def cache(environ: Mapping[str, str]) -> LinkCache:
    return LinkCache(allocation_key(TWO_NODES, LIBRARY, environ), environ)
