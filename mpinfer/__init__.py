"""Deep-learning inference over a whole cluster allocation with nothing but MPI."""

from mpinfer.version import VERSION as __version__

__all__ = ["__version__"]
