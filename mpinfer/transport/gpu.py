"""Bodies of messages from and to a GPU.

A CUDA-aware MPI reads and writes memory of the GPU. Of any other, bodies pass through page-locked memory of the host,
from and to which the GPU copies by itself. Either way this process does not wait for the GPU: it goes on, and events
tell when bytes have come where they belong.
"""

import ctypes
from typing import Protocol

import torch
from mpi4py import MPI


class Event(Protocol):
    """Something that a GPU will have done."""

    def query(self) -> bool:
        """Whether it has."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Gpu(Protocol):
    """What channels must know of the device of a stage, where that is not the CPU."""

    def empty(self, size_bytes: int) -> torch.Tensor:
        """Memory that both MPI and the GPU can use, uint8."""

    def mark(self) -> Event:
        """All that the GPU was asked for until now."""

    def fetch(self, received: torch.Tensor) -> tuple[torch.Tensor, Event]:
        """A copy in the GPU's own memory, which what it is asked for from now on can read; and that it is made."""


class CudaGpu:
    """A GPU that torch calls CUDA."""

    def __init__(self, device: str, mpi_takes_its_memory: bool) -> None:
        self._device = torch.device(device)
        self._place = {"device": self._device} if mpi_takes_its_memory else {"pin_memory": True}
        self._arrivals = torch.cuda.Stream(self._device)  # beside computing, so that a copy need not wait for it

    def empty(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, **self._place)

    def mark(self) -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def fetch(self, received: torch.Tensor) -> tuple[torch.Tensor, Event]:
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._arrivals):
            copy = torch.empty_like(received, device=self._device).copy_(received, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._arrivals)
        computing.wait_event(event)
        copy.record_stream(computing)  # its memory is not given to others before what reads it is done
        return copy, event


def find_gpu(device: str) -> Gpu | None:
    """The GPU of that name; None for the CPU."""
    return None if device == "cpu" else CudaGpu(device, takes_gpu_memory())


def takes_gpu_memory() -> bool:
    """Whether this MPI library says that it is CUDA-aware (`MPIX_Query_cuda_support` of Open MPI and MPICH)."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())
