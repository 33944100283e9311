"""What each operation of a program costs on this machine: timed alone, on numbers that mean nothing.

FLOPs say little where memory is what takes the time (depthwise convolutions, norms, activations).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from mpinfer.models.convolution import find_groups
from mpinfer.models.cut import concrete, size_bytes

_REPEATS = 2
_BUDGET_S = 2.0  # for all operations; what is not timed is estimated from the rate of the others
_PROBED = 5  # operations of a probe
_FLOPS_PER_BYTE = 8.0  # what a byte costs in the estimate


@torch.inference_mode()
def operation_seconds(graph: fx.Graph, operations: Sequence[fx.Node], symbols: Mapping[Any, int]) -> list[float]:
    """Of each operation of a graph when batches of this size enter.

    Operations that are alike are timed once; those computed along with a convolution take no time of their own.
    """
    free = {node for group in find_groups(graph) for node in (group.norm, group.activation) if node is not None}
    known: dict[str, float | None] = {}
    estimates = [estimated_cost(node, symbols) for node in operations]
    seconds: list[float | None] = []
    started = time.perf_counter()
    for node in operations:
        if node in free:
            seconds.append(0.0)
            continue
        arguments = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
        key = f"{node.target} {pytree.tree_map(lambda v: _signature(v, symbols), arguments)}"
        if key not in known and time.perf_counter() - started < _BUDGET_S:
            known[key], _ = _timed(node, symbols)
        seconds.append(known.get(key))
    timed = [(cost, s) for cost, s in zip(estimates, seconds, strict=True) if s is not None]
    rate = sum(s for _, s in timed) / max(1.0, sum(cost for cost, _ in timed))
    return [rate * cost if s is None else s for cost, s in zip(estimates, seconds, strict=True)]


@torch.inference_mode()
def probe(operations: Sequence[fx.Node], symbols: Mapping[Any, int], least_s: float) -> tuple[float, float]:
    """Seconds of the few costliest operations together: at best, and in the mean of steady work of `least_s`.

    The first tells ranks' speeds apart; the second also shows a rank that is made to pause.
    """
    costliest = sorted(operations, key=lambda node: estimated_cost(node, symbols), reverse=True)[:_PROBED]
    timed = [_timed(node, symbols) for node in costliest]
    best = {call: seconds for seconds, call in timed if seconds is not None and call is not None}
    started, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - started < least_s:
        for call in best:
            call()
        rounds += 1
    return sum(best.values()), (time.perf_counter() - started) / rounds


def estimated_cost(node: fx.Node, symbols: Mapping[Any, int]) -> float:
    """Of one operation, in FLOPs and a weighed count of bytes. The same on every machine."""
    value = node.meta["val"]
    result = value[0] if isinstance(value, tuple | list) else value
    if not isinstance(result, torch.Tensor):
        return 0.0
    numbers = size_bytes(result, symbols) / result.element_size()
    flops = 0.0
    for source in node.all_input_nodes:
        weight = source.meta["val"]
        if source.op == "placeholder" and weight.dim() > 1 and isinstance(weight.shape[0], int):
            flops += 2.0 * numbers * size_bytes(weight, symbols) / weight.element_size() / weight.shape[0]
    is_lookup = "embedding" in str(node.target)
    return _FLOPS_PER_BYTE * size_bytes(result, symbols) + (0.0 if is_lookup else flops)


def _timed(node: fx.Node, symbols: Mapping[Any, int]) -> tuple[float, Callable[[], object]] | tuple[None, None]:
    """Seconds of an operation, by the fastest of a few calls, and the call; None for what cannot be computed from such
    numbers, or in this memory."""
    best_s = float("inf")
    try:
        call = _call_of(node, symbols)
        for _ in range(_REPEATS):
            started, worked = time.perf_counter(), time.process_time()
            call()
            # Without the pauses that this rank is made to take: they would be counted for whatever runs just then.
            best_s = min(best_s, time.perf_counter() - started, time.process_time() - worked)
    except (RuntimeError, IndexError, ValueError, TypeError, MemoryError):
        return None, None
    return best_s, call


def _call_of(node: fx.Node, symbols: Mapping[Any, int]) -> Callable[[], object]:
    """An operation on stand-ins for its arguments."""
    arguments = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    args, kwargs = pytree.tree_map(lambda value: _stand_in(value, symbols), arguments)
    target: Any = node.target
    return partial(target, *args, **kwargs)


def _stand_in(value: Any, symbols: Mapping[Any, int]) -> Any:
    if isinstance(value, torch.Tensor):
        shape = [concrete(size, symbols) for size in value.shape]
        if value.is_floating_point():
            images = torch.channels_last if len(shape) == 4 else torch.contiguous_format  # as packed convolutions want
            return torch.full(shape, 0.5, dtype=value.dtype).contiguous(memory_format=images)
        return (
            torch.zeros(shape, dtype=value.dtype) if value.dtype != torch.bool else torch.ones(shape, dtype=value.dtype)
        )
    return concrete(value, symbols) if isinstance(value, torch.SymInt) else value


def _signature(value: Any, symbols: Mapping[Any, int]) -> Any:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{[concrete(size, symbols) for size in value.shape]}"
    return concrete(value, symbols) if isinstance(value, torch.SymInt) else value
