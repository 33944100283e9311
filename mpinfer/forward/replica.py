"""One rank of a replica that computes in one pass: builds its stage and channels, runs the loop, closes its books."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from mpinfer.forward.batches import BatchSource
from mpinfer.forward.first import make_sampler
from mpinfer.forward.prepare import make_preparer
from mpinfer.forward.results import ResultSink
from mpinfer.forward.stage import ForwardStage
from mpinfer.forward.tasks import make_task
from mpinfer.models.graph import GraphSkeleton
from mpinfer.models.halving import Halving
from mpinfer.observe.account import Account
from mpinfer.observe.recorder import Recorder
from mpinfer.pipeline.links import Copied, Links
from mpinfer.pipeline.timing import steady_s
from mpinfer.pipeline.worker import Worker
from mpinfer.plan.cost import Demand, Timed
from mpinfer.plan.layout import Plan
from mpinfer.plan.schedule import stream
from mpinfer.spec import JobSpec, Wire, arrays_in_files
from mpinfer.transport.codec import padded
from mpinfer.transport.endpoint import Endpoint
from mpinfer.transport.message import ChannelPlan, Inbox, Message, Outbox

_TAG, _COPIES_TAG = 1, 2


class ForwardRank:
    """A rank between its neighbours: records or values in, values or results out.

    Loads this rank's partition. Raises `ModelError`.
    """

    def __init__(self, endpoint: Endpoint, spec: JobSpec, plan: Plan, skeleton: GraphSkeleton, device: str) -> None:
        self.coordinates = plan.coordinates(endpoint.rank)
        self._layout = layout = plan.replica_of(endpoint.rank)
        self._endpoint, self._spec, self._skeleton = endpoint, spec, skeleton
        self.account = Account(Recorder.of_world(endpoint.size, spec.output.trace))
        endpoint.serving = lambda: self.account.phase("overhead")
        self._links = Links(endpoint, self.account, spec.transport, device)
        self._divided = layout.shards > 1
        shard, self._agree = self._links.join_shards(layout, self.coordinates)
        started = time.perf_counter()
        start, stop = layout.blocks_of(self.coordinates.stage)
        self._part = skeleton.load_part(start, stop, device, layout.micro_batch, endpoint.progress, shard)
        self._load_s = time.perf_counter() - started
        fixed = "" if self._part.can_halve else "its model takes batches of one size only"
        self._halving = Halving("its parts are on several shards" if self._divided else fixed)
        self._stage = ForwardStage(self._part, self._halving)
        self._inbox: Inbox = self._make_inbox()
        self._worker = Worker(self._inbox, self._stage, self._make_outbox(), self.account)

    def timed_steps(self, least_s: float) -> list[Timed]:
        """A full micro-batch, timed on this stage for so many seconds. Also its warm-up; leaves no trace."""
        start, _ = self._layout.blocks_of(self.coordinates.stage)
        rows = self._layout.micro_batch
        message = Message(np.zeros(1, dtype=np.int32), tuple(self._skeleton.example(start, rows, self._divided)))
        return [Timed(Demand(rows), steady_s(lambda: self._stage.forward(message), least_s, self._agree))]

    def run(self) -> None:
        """The loop, until the stream of batches ends."""
        self.account.restart()
        self._links.restart()
        self._halving.count = 0
        with self._links.progressing():
            self._worker.run(stream())
            self._inbox.close()
            self._links.close()

    def abandon(self) -> None:
        """A rank of this replica has died, and `run` has raised."""
        self._links.abandon()

    def close_account(self) -> dict[str, Any]:
        """This rank's figures, all measured: seconds per phase, bytes over channels and in control messages."""
        return {
            **{f"{phase}_s": seconds for phase, seconds in self.account.close().items()},
            "prompt_tokens": 0,
            "new_tokens": 0,
            **self._links.figures(),
            "weight_bytes": self._part.weight_bytes,
            "kernels": dict(self._part.kernels),
            "halved_batches": self._halving.count,
            "read_bytes": self._part.read_bytes,
            "read_s": self._load_s,
        }

    def _make_inbox(self) -> Inbox:
        """Of a first stage the records, which its first shard copies to the others; of another one the channel from the
        same shard of the one before."""
        stage, shard = self.coordinates.stage, self.coordinates.shard
        if stage > 0:
            return self._links.inbox(self._activations_into(stage, shard))
        if shard > 0:
            return self._links.inbox(self._batches_of(shard))
        copies = [self._links.outbox(self._batches_of(other)) for other in range(1, self._layout.shards)]
        return Copied(self._batches(), copies) if copies else self._batches()

    def _batches(self) -> BatchSource:
        program, fixed = self._skeleton.program, self._skeleton.fixed_batch
        preparer = make_preparer(self._spec)
        return BatchSource(
            self._endpoint,
            make_sampler(self._spec, preparer),
            preparer,
            check=(lambda sample: None) if program is None else program.check,
            values=self._skeleton.first_values,
            micro_batch=self._layout.micro_batch,
            # A program was traced for batches of two or more: for one record torch may have meant something else.
            rows=lambda records: fixed or (max(records, 2) if program is not None else records),
            account=self.account,
        )

    def _make_outbox(self) -> Outbox:
        """Of a last stage the results, which all its shards have and the first one sends; of another one the channel to
        the same shard of the next."""
        stage, shard = self.coordinates.stage, self.coordinates.shard
        if stage < self._layout.stages - 1:
            return self._links.outbox(self._activations_into(stage + 1, shard))
        if shard > 0:
            return _Nowhere()
        directory = Path(self._spec.output.path) if arrays_in_files(self._spec) else None
        return ResultSink(
            self._endpoint, make_task(self._spec), lambda: self._part.output_names, directory, self.account
        )

    def _activations_into(self, stage: int, shard: int) -> ChannelPlan:
        """From a shard of the stage before to the same one of a stage."""
        ends = self._layout.rank(stage - 1, shard), self._layout.rank(stage, shard)
        return self._channel(*ends, _TAG, stage, self._spec.transport.wire)

    def _batches_of(self, shard: int) -> ChannelPlan:
        """From the first shard of the first stage to another one, as they are: both must compute the same."""
        return self._channel(self._layout.leader, self._layout.rank(0, shard), _COPIES_TAG, 0, "none")

    def _channel(self, source: int, destination: int, tag: int, stage: int, wire: Wire) -> ChannelPlan:
        """A link between two ranks of this replica, for what enters a stage. Same on both ends."""
        layout = self._layout
        start, _ = layout.blocks_of(stage)
        dimensions, sizes = self._skeleton.capacity(start, max(2, layout.micro_batch), self._divided)
        return ChannelPlan(
            source=source,
            destination=destination,
            tag=tag,
            header_words=layout.micro_batch,
            values=len(sizes),
            dimensions=dimensions,
            payload_bytes=sum(map(padded, sizes)),
            depth=max(2, layout.in_flight // layout.stages),
            wire=wire,
        )


class _Nowhere:
    """The outbox of one that has no say."""

    def start(self, micro_batch: int, message: Message) -> None:
        """What the first shard sends is enough."""

    def drain(self) -> None:
        """Nothing was sent."""
