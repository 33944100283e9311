"""Where am I: launchers, nodes, cores and memory. No torch, no MPI: this is read before either is loaded."""
