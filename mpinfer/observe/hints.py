"""What a finished run could do better: a line each, with the setting that would help, from what `timing.json` holds."""

from collections.abc import Iterator
from typing import Any

from mpinfer.observe.account import PHASES

_SHORTEST_S = 10.0  # below, fill and drain decide, and no setting helps
_IDLE_SHARE = 0.01  # of the wall: who computed less did nothing
_BUBBLE = 0.2
_STRAGGLER = 1.5  # times the mean of its replica
_FAR_OFF = 1.5  # times the prediction, either way
_REMEDIES = {
    "send_wait": "try transport.wire: bf16, which sends half the bytes of float32 (and may change results)",
    "receive_wait": "try fewer parallel.stages, or a greater parallel.in_flight",
    "idle": "start fewer ranks, or try a smaller parallel.micro_batch",
}


def hints(timing: dict[str, Any]) -> list[str]:
    """None for a run in order. Where ranks have died, their peers' waits tell nothing of the layout."""
    if timing["wall_s"] < _SHORTEST_S or timing["lost_ranks"]:
        return [*_crowded(timing), *_halved(timing), *_uncompiled(timing)]
    return [
        *_crowded(timing),
        *_halved(timing),
        *_uncompiled(timing),
        *_useless(timing),
        *_bubble(timing),
        *_stragglers(timing),
        *_off(timing),
    ]


def _crowded(timing: dict[str, Any]) -> Iterator[str]:
    """Nodes whose threads must take turns."""
    for host in sorted({rank["host"] for rank in timing["ranks"]}):
        ranks = [rank for rank in timing["ranks"] if rank["host"] == host]
        cores = len({core for rank in ranks for core in rank["cores"]})
        threads = sum(rank["threads"] for rank in ranks)
        if threads > cores > 0:
            yield (
                f"{len(ranks)} ranks of {host} run {threads} threads on {cores} cores: start at most {cores} ranks "
                "there, or give each its own cores (the launcher's --bind-to or --cpus-per-task)"
            )


def _halved(timing: dict[str, Any]) -> Iterator[str]:
    """Ranks that had less memory than their batches needed."""
    for rank in timing["ranks"]:
        if rank["halved_batches"]:
            yield (
                f"rank {rank['rank']} on {rank['host']} ran out of memory {rank['halved_batches']} times and computed "
                "in halves what had failed: lower parallel.micro_batch, or start fewer ranks a node"
            )


def _uncompiled(timing: dict[str, Any]) -> Iterator[str]:
    """Why ranks made do with torch's kernels."""
    problems: dict[str, list[str]] = {}
    for rank in timing["ranks"]:
        if problem := rank.get("kernels_problem"):
            problems.setdefault(problem, []).append(str(rank["rank"]))
    for problem, ranks in problems.items():
        yield (
            f"rank {', '.join(ranks)} computed with torch's kernels, which are slower than mpinfer's own: {problem}, "
            "or set model.kernels: torch"
        )


def _useless(timing: dict[str, Any]) -> Iterator[str]:
    """Ranks that were paid for and computed nothing."""
    ranks = [rank["rank"] for rank in timing["ranks"] if rank["compute_s"] < _IDLE_SHARE * timing["wall_s"]]
    if ranks:
        yield (
            f"rank {', '.join(map(str, ranks))} computed next to nothing: start {len(ranks)} fewer (mpirun -n), or "
            "set parallel.replicas and parallel.stages so that all have work"
        )


def _bubble(timing: dict[str, Any]) -> Iterator[str]:
    if timing["bubble"] > _BUBBLE:
        waits = {phase: sum(rank[f"{phase}_s"] for rank in timing["ranks"]) for phase in PHASES if phase in _REMEDIES}
        most = max(waits, key=lambda phase: waits[phase])
        yield f"bubble of {timing['bubble']:.0%}, most of it {most.replace('_', ' ')}: {_REMEDIES[most]}"


def _stragglers(timing: dict[str, Any]) -> Iterator[str]:
    """Ranks whose part of their replica takes much longer than the others'."""
    for rank in timing["ranks"]:
        replica = rank["coordinates"]["replica"]
        peers = [r["compute_s"] for r in timing["ranks"] if r["coordinates"]["replica"] == replica]
        mean = sum(peers) / len(peers)
        if rank["compute_s"] > _STRAGGLER * mean:
            yield (
                f"rank {rank['rank']} on {rank['host']} (stage {rank['coordinates']['stage']}) computed for "
                f"{rank['compute_s']:.1f} s, its replica {mean:.1f} s on average: try fewer parallel.stages; if "
                f"{rank['host']} is slow in other runs, too, leave it out (--hosts)"
            )


def _off(timing: dict[str, Any]) -> Iterator[str]:
    wall, predicted = timing["wall_s"], timing["predicted_wall_s"]
    if predicted > 0 and not 1 / _FAR_OFF < wall / predicted < _FAR_OFF:
        yield (
            f"it took {wall:.1f} s where {predicted:.1f} s were predicted: nodes shared with others mislead the plan; "
            "ask for whole ones (#SBATCH --exclusive), or set parallel.replicas, stages and shards"
        )
