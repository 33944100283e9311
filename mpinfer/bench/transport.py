"""`mpinfer bench transport`: how fast messages go between two ranks, and how much of sending computing hides."""

import json
import sys
from typing import Any

from mpinfer.errors import ExitCode, LaunchError
from mpinfer.transport.endpoint import Agreed, agree, library_version
from mpinfer.world import World, join_world

_SIZES = tuple(2**power for power in (3, 6, 10, 13, 15, 18, 20, 21, 24, 26))  # bytes
_OVERLAP_BYTES = 2**24


def bench_transport(largest: int, rounds: int, as_json: bool) -> ExitCode:
    """Measure between the two ranks of this world, with messages of up to `largest` bytes; rank 0 prints.

    A world of another size, or a figure that makes no sense, is reported by rank 0, in one line. Raises `LaunchError`
    when there is no world to run in.
    """
    try:
        return _bench(join_world(), largest, rounds, as_json)
    except Agreed as error:
        if error.rank == 0:
            print(f"mpinfer: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _bench(world: World, largest: int, rounds: int, as_json: bool) -> ExitCode:
    endpoint = world.endpoint
    agree(endpoint, lambda: _check(endpoint.size, largest, rounds))
    from mpinfer.bench.overlap import overlap  # with torch: threads are bound now
    from mpinfer.bench.speed import compare
    from mpinfer.bench.ways import all_ways

    ways = all_ways(endpoint, world.nodes, largest)
    found = {
        "mpi": library_version(),
        "nodes": world.nodes,
        "rounds": rounds,
        "sizes": [compare(endpoint, ways, size, rounds) for size in _SIZES if size <= largest],
        "overlap": overlap(endpoint, ways, min(_OVERLAP_BYTES, largest), rounds),
    }
    for way in ways.values():
        way.close()
    if world.is_coordinator:
        print(json.dumps(found, indent=2) if as_json else _tables(found), flush=True)
    return ExitCode.COMPLETE


def _check(ranks: int, largest: int, rounds: int) -> None:
    if ranks != 2:
        raise LaunchError(
            f"a world of {ranks} rank{'s' * (ranks > 1)}: messages go between two; start it with `mpirun -n 2 mpinfer "
            "bench transport`, on two hosts to measure the network"
        )
    if largest < _SIZES[0]:
        raise LaunchError(f"--largest={largest}: messages have at least {_SIZES[0]} bytes; give more")
    if rounds < 1:
        raise LaunchError(f"--rounds={rounds}: medians are over rounds; give at least 1")


def _tables(found: dict[str, Any]) -> str:
    sizes, overlap = found["sizes"], found["overlap"]
    ways = list(sizes[0]["latency_s"])
    nodes = "one node" if found["nodes"] == 1 else "two nodes"
    lines = [f"{found['mpi']}, 2 ranks on {nodes}, medians of {found['rounds']} rounds"]
    head = f"{'bytes':>9} " + " ".join(f"{way:>17}" for way in ways)
    lines += ["", "latency, us (times raw's)", head]
    for size in sizes:
        figures = (f"{size['latency_s'][way] * 1e6:9.1f} ({size['latency_of_raw'][way]:5.2f})" for way in ways)
        lines.append(f"{size['bytes']:>9} " + " ".join(f"{figure:>17}" for figure in figures))
    lines += ["", "bandwidth, MB/s (of raw's)", head]
    for size in sizes:
        figures = (f"{size['bytes_per_s'][way] / 1e6:9.1f} ({size['bytes_per_s_of_raw'][way]:5.2f})" for way in ways)
        lines.append(f"{size['bytes']:>9} " + " ".join(f"{figure:>17}" for figure in figures))
    lines += [
        "",
        f"sending {overlap['bytes']} bytes while the sender computes for {overlap['compute_s'] * 1e3:.1f} ms in "
        f"{overlap['pieces']} pieces; MPI's own progress thread: {'on' if overlap['library_progress'] else 'off'}",
        f"{'':<30} {'sending alone':>14} {'hidden':>7}",
    ]
    for case, hidden in overlap["hidden"].items():
        lines.append(f"{case:<30} {overlap['send_s'][case] * 1e3:>11.1f} ms {hidden:>7.0%}")
    return "\n".join(lines)
