"""Which engine runs a job: decoders have their own, all other models share one."""

from typing import TYPE_CHECKING, TypeAlias

from mpinfer.forward.engine import ForwardEngine
from mpinfer.generate.engine import DecodeEngine
from mpinfer.models.checkpoint import Kind

if TYPE_CHECKING:  # torch loads only once the cheap checks have passed; planning needs no MPI
    from mpinfer.forward.replica import ForwardRank
    from mpinfer.generate.replica import DecodeRank

    Rank: TypeAlias = DecodeRank | ForwardRank

Engine: TypeAlias = DecodeEngine | ForwardEngine
"""A job's model without weights, and how it is laid out and run."""

ENGINES: dict[Kind, type[DecodeEngine] | type[ForwardEngine]] = {"decoder": DecodeEngine, "graph": ForwardEngine}
