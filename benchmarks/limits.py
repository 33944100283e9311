"""What this machine can do at best with a model's linear layers, for compare.py.

    python limits.py bandwidth                  GB/s of reading a large matrix, with OMP_NUM_THREADS threads
    python limits.py gemm MODEL_DIR ROWS CORE   seconds of one pass over all linear layers, on that core

`gemm` prints `ready`, and waits for a line of input, so that processes on several cores compute at the same time.
Each layer has a weight of its own, as in the model: none stays in a cache longer than it would there. Of a plain
float32 weight and one that oneDNN has packed the fastest counts for `libraries`, shape by shape; of those and mpinfer's
own kernel for `all`.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from mpinfer.models.kernels import find_kernels

_PASSES = 5
_MATRIX_SIDE = 12288  # 604 MB of float32


def meta_model(directory: str) -> Any:
    """The model without weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def linear_shapes(model: Any) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """The (outputs, inputs) of all linear layers but the head, and of the head."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return [(layer.out_features, layer.in_features) for layer in layers], tuple(head.weight.shape)


def bandwidth() -> dict[str, float]:
    matrix, vector = torch.ones(_MATRIX_SIDE, _MATRIX_SIDE), torch.ones(_MATRIX_SIDE)
    best_s = min(_seconds(call) for call in (lambda: torch.mv(matrix, vector), matrix.sum) for _ in range(_PASSES))
    return {"gb_per_s": matrix.nbytes / best_s / 1e9}


def gemm(directory: str, rows: int, core: int) -> dict[str, dict[str, float]]:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    layers, head = linear_shapes(meta_model(directory))
    shapes = [*layers, head]
    plain = [torch.randn(shape) for shape in shapes]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in plain]
    inputs = {shape: torch.randn(rows, shape[1]) for shape in shapes}
    print("ready", flush=True)
    sys.stdin.readline()
    slow = _pass_seconds(shapes, plain, inputs, lambda x, weight: torch.nn.functional.linear(x, weight))
    fast = _pass_seconds(
        shapes, packed, inputs, lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    )
    best = {"libraries": {shape: min(slow[shape], fast[shape]) for shape in inputs}}
    best["all"] = best["libraries"]
    kernels, _ = find_kernels("auto", "cpu", torch.float32)
    if kernels is not None:
        panels = [kernels.pack(weight, None) for weight in plain]
        own = _pass_seconds(shapes, panels, inputs, lambda x, w: kernels.linear(x, *w, outputs=w[1].numel()))
        best["all"] = {shape: min(best["libraries"][shape], own[shape]) for shape in inputs}
    return {
        name: {"layers_s": sum(seconds[shape] for shape in layers), "head_s": seconds[head]}
        for name, seconds in best.items()
    }


@torch.inference_mode()
def _pass_seconds(
    shapes: list[tuple[int, int]],
    weights: list[Any],
    inputs: dict[tuple[int, int], torch.Tensor],
    multiply: Callable[[torch.Tensor, Any], torch.Tensor],
) -> dict[tuple[int, int], float]:
    """Mean seconds of a multiplication of each shape in the best pass over all weights, after one to warm up."""
    best: dict[tuple[int, int], float] = {}
    for repeat in range(_PASSES + 1):
        calls: dict[tuple[int, int], list[float]] = {shape: [] for shape in inputs}
        for shape, weight in zip(shapes, weights, strict=True):
            started = time.perf_counter()
            multiply(inputs[shape], weight)
            calls[shape].append(time.perf_counter() - started)
        if repeat:
            best = {shape: min(best.get(shape, float("inf")), statistics.mean(calls[shape])) for shape in inputs}
    return best


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps(bandwidth() if sys.argv[1] == "bandwidth" else gemm(sys.argv[2], *map(int, sys.argv[3:]))))
