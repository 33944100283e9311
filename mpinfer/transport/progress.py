"""Who moves messages while a stage computes: MPI does so only when somebody calls it.

The stage itself calls `Endpoint.progress` before each layer, whatever else is chosen. Of sending 16 MB over 1 Gbit/s of
TCP (Open MPI, `mpinfer bench transport`) computing as long hid nothing without any call, 87 % with these points, and
80 % with a thread besides, which needs Python's lock. The library's own thread hid all that it could, but made every
small message three times slower. So points are the default.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mpi4py import MPI

from mpinfer.errors import SpecError
from mpinfer.transport.endpoint import Endpoint

_PERIOD_S = 200e-6
_NO_TAG = 0  # that nobody sends with to itself

_LIBRARY_VARIABLES = {"Open MPI": "OMPI_MCA_btl_tcp_progress_thread", "MPICH": "MPIR_CVAR_ASYNC_PROGRESS"}


def check_progress(how: str) -> None:
    """Raises `SpecError` when this process cannot have the progress that `transport.progress` asks for."""
    if how == "thread" and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise SpecError("transport.progress='thread': this MPI serves one thread at a time; use 'points'")
    if how == "library":
        library = MPI.Get_library_version()
        name = next((name for start, name in _LIBRARY_VARIABLES.items() if library.startswith(start)), None)
        if name is None:
            raise SpecError("transport.progress='library': known of Open MPI and MPICH only; use 'points'")
        if os.environ.get(name, "0") == "0":
            raise SpecError(
                f"transport.progress='library': {name} is not set, and MPI has started; export {name}=1 on all ranks "
                "before the launch, or use 'points'"
            )


@contextmanager
def progressing(endpoint: Endpoint, how: str) -> Iterator[None]:
    """With `thread`, a thread of its own calls MPI every 0.2 ms for as long as this lasts."""
    if how != "thread":
        yield
        return
    over = threading.Event()

    def call() -> None:
        while not over.wait(_PERIOD_S):
            endpoint.data.Iprobe(endpoint.rank, _NO_TAG)

    thread = threading.Thread(target=call, name="mpinfer-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
