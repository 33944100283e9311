"""The links of an allocation: measured by its first run, remembered for the next ones."""

import hashlib
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

from mpinfer.directories import cache_directory
from mpinfer.plan.machine import Link

_KEPT = 32  # allocations
_LONGEST_AGE_S = 24 * 3600  # a bad moment is not remembered for as long as a machine is up
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
# By these a user sends messages another way in the same allocation.
_TRANSPORT_VARIABLES = (
    "OMPI_MCA_pml",
    "OMPI_MCA_btl",
    "OMPI_MCA_mtl",
    "UCX_TLS",
    "UCX_NET_DEVICES",
    "FI_PROVIDER",
    "I_MPI_FABRICS",
    "MPIR_CVAR_CH4_NETMOD",
)

Measured = tuple[Link, Link | None]  # inside a node, and between nodes where there are several


class World(Protocol):
    """What is asked of a rank's end of the world."""

    @property
    def rank(self) -> int: ...

    def broadcast(self, body: Any, /) -> Any: ...


@dataclass(frozen=True)
class Links:
    """What messages cost in this world."""

    inside: Link
    between: Link | None  # None on one node
    origin: str  # how that is known, for rank 0's log

    def __str__(self) -> str:
        """A line for the log."""
        between = f"; between nodes {_figures(self.between)}" if self.between else ""
        return f"links: inside {_figures(self.inside)}{between} ({self.origin})"


def machine_links(
    world: World,
    node_names: Sequence[str],
    mpi_library: str,
    measure: Callable[[], Measured],
    environ: Mapping[str, str] = os.environ,
) -> Links:
    """The links between ranks: as this allocation remembers them, or else as `measure`, a collective, finds them.

    Collective; every rank gets the same figures. `node_names` holds the node of every rank. Files are rank 0's, and
    nothing that happens to them is an error: `origin` tells of it.
    """
    if len(node_names) == 1:
        return Links(*measure(), "assumed: one rank sends nothing")
    cache = LinkCache(allocation_key(node_names, mpi_library, environ), environ) if world.rank == 0 else None
    remembered = world.broadcast(_to_json(cache.read()) if cache else None)
    if remembered is not None:
        return Links(*_from_json(remembered), "cached")
    started = time.perf_counter()
    measured = measure()
    told = [f"measured in {time.perf_counter() - started:.1f} s"]
    if len(set(node_names)) == len(node_names):
        told.append("inside assumed: no node has two ranks")
    if cache:
        cache.write(measured)
        told += cache.problems
    return Links(*measured, "; ".join(told))


def allocation_key(
    node_names: Sequence[str], mpi_library: str, environ: Mapping[str, str] = os.environ, root: Path = Path("/")
) -> str:
    """A file name for all that decides the links: the batch job, or else since when the machine is up; the ranks of
    each node; the MPI library and what it was told to use."""
    facts = {
        "allocation": [[name, environ[name]] for name in _JOB_VARIABLES if environ.get(name)] or _boot_id(root),
        "ranks": sorted(Counter(node_names).items()),
        "mpi": mpi_library,
        "transport": [[name, environ[name]] for name in _TRANSPORT_VARIABLES if name in environ],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


class LinkCache:
    """The file that remembers the links of one allocation. Nothing here raises: `problems` says what went wrong."""

    def __init__(self, key: str, environ: Mapping[str, str] = os.environ) -> None:
        self.path = cache_directory(environ) / f"links-{key}.json"
        self.problems: list[str] = []

    def read(self) -> Measured | None:
        """What is remembered; None where nothing is, or nothing that can be used."""
        try:
            if time.time() - self.path.stat().st_mtime > _LONGEST_AGE_S:
                return None
            return _from_json(json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            return None
        except OSError as error:
            self.problems.append(f"{self.path} cannot be read: {error.strerror}")
        except (ValueError, TypeError, LookupError, RecursionError):
            self.problems.append(f"{self.path} was damaged")
        return None

    def write(self, measured: Measured) -> None:
        """Remember it, readable for this user alone, and forget the oldest allocations."""
        directory = self.path.parent
        if not directory.is_absolute():
            self.problems.append("not remembered: this user has no home directory")
            return
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix="links-", dir=directory)  # runs may start at the same time
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    json.dump(_to_json(measured), file)
                os.replace(temporary, self.path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            self.problems.append(f"not remembered in {directory}: {error.strerror}")
            return
        with suppress(OSError):  # another run may prune, too
            for old in sorted(directory.glob("links-*"), key=lambda file: file.stat().st_mtime)[:-_KEPT]:
                old.unlink(missing_ok=True)


def _to_json(measured: Measured | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    inside, between = measured
    return {"inside": astuple(inside), "between": between and astuple(between)}


def _from_json(tree: Any) -> Measured:
    """Raises `ValueError`, `TypeError` or `LookupError` for anything that `_to_json` did not make."""
    between = tree["between"]
    return _link(tree["inside"]), None if between is None else _link(between)


def _link(figures: Any) -> Link:
    latency_s, bytes_per_s = map(float, figures)
    if not (0 < latency_s < math.inf and 0 < bytes_per_s < math.inf):
        raise ValueError(figures)
    return Link(latency_s, bytes_per_s)


def _boot_id(root: Path) -> str:
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # some containers hide it; entries end with their age, too
        return ""


def _figures(link: Link) -> str:
    return f"{link.latency_s * 1e6:.3g} us, {link.bytes_per_s / 1e9:.2g} GB/s"
