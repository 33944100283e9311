"""How ranks talk."""

import os

# Open MPI asks even the components that cannot make a shared-memory window, the only kind here, and UCX complains on
# stderr where it finds no device. Set before MPI is imported.
os.environ.setdefault("OMPI_MCA_osc", "^ucx")
