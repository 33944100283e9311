"""How ranks talk."""

import os
from collections.abc import Mapping


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What MPI libraries are to find in the environment, unless the user has said something else."""
    # Open MPI asks even the components that cannot make a shared-memory window, the only kind here, and UCX complains
    # on stderr where it finds no device.
    wanted = {"OMPI_MCA_osc": "^ucx"}
    # Its component for libfabric sleeps for a second when it is closed unused, as on a single node it always is. Only
    # mpirun says how many ranks are here; a process that nobody launched is alone.
    size = environ.get("OMPI_COMM_WORLD_SIZE", "unknown" if "PMIX_RANK" in environ else "1")
    if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") == size:
        wanted["OMPI_MCA_btl"] = "^ofi"
    return {name: value for name, value in wanted.items() if name not in environ}


os.environ.update(settings(os.environ))  # before MPI is imported
