"""Deep-learning inference over a whole cluster allocation with nothing but MPI."""

from typing import TYPE_CHECKING, Any

from mpinfer.version import VERSION as __version__

if TYPE_CHECKING:
    from mpinfer.api import Pipeline, run

__all__ = ["Pipeline", "__version__", "run"]


def __getattr__(name: str) -> Any:
    """`run` and `Pipeline` once they are asked for: they bring MPI along."""
    if name not in ("Pipeline", "run"):
        raise AttributeError(f"module 'mpinfer' has no attribute {name!r}")
    from mpinfer import api

    return getattr(api, name)
