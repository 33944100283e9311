"""Plain torch and torch.distributed.pipelining, for encoders.py. The last line of the output is JSON.

    OMP_NUM_THREADS=1 python -m benchmarks.pipelining_run pieces MODEL
    OMP_NUM_THREADS=2 python -m benchmarks.pipelining_run whole MODEL RECORDS OUT.npy
    OMP_NUM_THREADS=1 python -m benchmarks.pipelining_run stage MODEL RECORDS OUT.npy CUT RENDEZVOUS RANK

pieces  seconds that each piece of the model takes for a micro-batch on one core, by name
whole   all of the model in this process, micro-batch after micro-batch
stage   one of two processes, with the pieces before or from CUT on, a GPipe schedule and gloo; each on its own core

Loading and a warm-up are not timed. OUT.npy gets the outputs of the last micro-batch.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from benchmarks.models import BATCH, MODELS, STEP

_STAGES = 2
_REPEATS = 5
_PATIENCE = timedelta(seconds=60)  # that gloo has with a peer


@torch.inference_mode()
def pieces(name: str) -> dict[str, float]:
    bind(0)
    build, make_batch = MODELS[name]
    model, batch = build(), make_batch()
    seconds: dict[str, list[float]] = {piece: [] for piece, _ in model.named_children()}
    for _ in range(1 + _REPEATS):
        x = batch
        for piece, module in model.named_children():
            started = time.perf_counter()
            x = module(x)
            seconds[piece].append(time.perf_counter() - started)
    return {piece: statistics.median(each[1:]) for piece, each in seconds.items()}


@torch.inference_mode()
def whole(name: str, records: str, out: str) -> dict[str, float]:
    build, make_batch = MODELS[name]
    model, batch = build(), make_batch()
    for _ in range(2):
        outputs = model(batch)
    started = time.perf_counter()
    for _ in range(int(records) // BATCH):
        outputs = model(batch)
    wall_s = time.perf_counter() - started
    np.save(out, outputs.numpy())
    return {"wall_s": wall_s}


@torch.inference_mode()
def stage(name: str, records: str, out: str, cut: str, rendezvous: str, rank: str) -> dict[str, float]:
    index = int(rank)
    bind(index)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=index, world_size=_STAGES, timeout=_PATIENCE
    )
    build, make_batch = MODELS[name]
    model = build()
    part = model[: int(cut)] if index == 0 else model[int(cut) :]
    schedule = ScheduleGPipe(PipelineStage(part, index, _STAGES, torch.device("cpu")), STEP)
    batch = make_batch()
    inputs = (batch.repeat(STEP, *[1] * (batch.dim() - 1)),) if index == 0 else ()
    schedule.step(*inputs)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(int(records) // (STEP * BATCH)):
        outputs = schedule.step(*inputs)
    dist.barrier()
    wall_s = time.perf_counter() - started
    if outputs is not None:
        np.save(out, outputs[-BATCH:].numpy())
    dist.destroy_process_group()
    return {"wall_s": wall_s}


def bind(core: int) -> None:
    """To one of the cores that this process may use."""
    os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[core]])


COMMANDS: dict[str, Callable[..., dict[str, float]]] = {"pieces": pieces, "whole": whole, "stage": stage}

if __name__ == "__main__":
    print(json.dumps(COMMANDS[sys.argv[1]](*sys.argv[2:])))
