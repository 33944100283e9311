"""One rank of a replica that decodes: builds its stage and channels, runs the loop, closes its books."""

import time
from typing import Any

import torch

from mpinfer.generate.cache import KVCache
from mpinfer.generate.estimate import demand
from mpinfer.generate.feed import RecordFeed
from mpinfer.generate.measure import decode_segments, prompt_segments
from mpinfer.generate.readout import NoReadout, Readout
from mpinfer.generate.ring import DecodeRing, Finish
from mpinfer.generate.scheduler import Scheduler, Segment, Step
from mpinfer.generate.stage import DecodeStage, encode_step, header_words
from mpinfer.generate.tasks import make_task, readout_kind
from mpinfer.models.decoder import DecoderSkeleton
from mpinfer.models.halving import Halving
from mpinfer.observe.account import Account
from mpinfer.observe.recorder import Recorder
from mpinfer.pipeline.links import Copied, Gathered, Links
from mpinfer.pipeline.timing import steady_s
from mpinfer.pipeline.worker import Worker
from mpinfer.plan.block import vocabulary_share
from mpinfer.plan.cost import Timed
from mpinfer.plan.layout import Plan
from mpinfer.plan.schedule import stream
from mpinfer.spec import AUTO, JobSpec, Wire
from mpinfer.transport.codec import padded
from mpinfer.transport.endpoint import Endpoint
from mpinfer.transport.local import LocalChannel
from mpinfer.transport.message import ChannelPlan, Inbox, Message

_ACTIVATIONS_TAG, _SAMPLES_TAG, _STEPS_TAG = 1, 2, 3
_TYPICAL_LENGTH = 128  # tokens of context of the decode step that is timed


class DecodeRank:
    """A rank between its neighbours: records or activations in, activations or tokens out.

    Loads this rank's partition. Raises `ModelError`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        spec: JobSpec,
        plan: Plan,
        skeleton: DecoderSkeleton,
        device: str,
        needs_logits: bool,
    ) -> None:
        self.coordinates = plan.coordinates(endpoint.rank)
        self._layout = layout = plan.replica_of(endpoint.rank)
        self._endpoint, self._spec = endpoint, spec
        self.account = Account(Recorder.of_world(endpoint.size, spec.output.trace))
        self._hidden_size, self._final_size, self._dtype = skeleton.hidden_size, skeleton.final_size, skeleton.dtype
        endpoint.serving = lambda: self.account.phase("overhead")
        self._links = Links(endpoint, self.account, spec.transport, device)
        self._feed: RecordFeed | None = None
        self._step_tokens = max(spec.generate.step_tokens, layout.micro_batch)  # one of every sequence must fit
        length = skeleton.max_length if spec.generate.max_length == AUTO else spec.generate.max_length
        self._max_length = min(length, skeleton.max_length, layout.kv_tokens)
        generates = spec.model.task == "generate"
        # A step samples one token of each generating sequence, or any of all its prompts' tokens.
        self._samples = layout.micro_batch if generates else self._step_tokens
        self._targets = self._samples if spec.model.task == "score" else 0

        shard, self._agree = self._links.join_shards(layout, self.coordinates)
        started = time.perf_counter()
        stage, number = self.coordinates.stage, self.coordinates.shard
        self._kind = kind = readout_kind(spec, needs_logits)
        self._vocabulary = skeleton.vocabulary if kind is not NoReadout else 0
        self._part = skeleton.load_part(
            *layout.blocks_of(stage),
            device,
            layout.micro_batch,
            on_layer=endpoint.progress,
            vocabulary=self._share(stage, number),
            shard=shard,
        )
        self._load_s = time.perf_counter() - started
        # Samples come back to a first stage, which adds its share there; shards of a last one are all asked on the way.
        readout, none = kind(self._part), NoReadout(self._part)
        finishes = self._part.first and shard is None
        on_the_way: Readout = none if finishes else readout
        self._readout: Readout = readout if finishes else none
        slots = layout.in_flight * layout.micro_batch
        self._cache = cache = KVCache(slots, self._max_length, device, layout.kv_tokens)
        outbox = self._outbox()
        self._inbox = self._first_inbox(skeleton, outbox, needs_logits) if self._part.first else self._activations()
        self._halving = Halving("" if shard is None else "its parts are on several shards")
        self._stage = DecodeStage(self._part, cache, on_the_way, self._halving, with_hidden=number == 0)
        self._worker = Worker(self._inbox, self._stage, outbox, self.account)

    def timed_steps(self, least_s: float) -> list[Timed]:
        """A full prefill step and decode steps, timed on this stage for so many seconds each. Also its warm-up: slots
        have memory for typical sequences then, and shards have agreed on how they compute."""
        self._part.agree()
        slots, most = self._layout.micro_batch, self._max_length
        sizes = {-(-slots * quarters // 4) for quarters in range(1, 5)}
        decoding = [decode_segments(rows, _TYPICAL_LENGTH, most) for rows in sizes]
        begun = decode_segments(slots // 2, _TYPICAL_LENGTH, most)  # others are decoded in a step that takes prompts in
        prompts = prompt_segments(self._step_tokens - len(begun), range(len(begun), slots), min(_TYPICAL_LENGTH, most))
        timed = [self._timed(segments, least_s) for segments in (*decoding, [*begun, *prompts])]
        room = self._layout.kv_tokens // self._cache.slots
        everywhere = decode_segments(self._cache.slots, min(_TYPICAL_LENGTH, room), most)
        self._cache.fill(everywhere)
        for segment in everywhere:
            self._cache.release(segment.slot)
        return timed

    def _timed(self, segments: list[Segment], least_s: float) -> Timed:
        tokens, samples = (0,) * sum(s.length for s in segments), sum(s.samples for s in segments)
        step = Step(tuple(segments), tokens, (0,) * min(samples, self._targets))
        message = encode_step(step)
        if not self._part.first:
            message = Message(message.header, (torch.zeros(len(tokens), self._hidden_size, dtype=self._dtype),))
        hidden = torch.zeros(samples, self._final_size)

        def run() -> None:
            self._stage.forward(message)
            self._readout.reduce(hidden, (0,) * samples)

        run()
        self._cache.fill(segments)
        return Timed(demand(step), steady_s(run, least_s, self._agree))

    def run(self) -> None:
        """The loop, until the stream of steps ends."""
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
        feed_tokens = self._feed.tokens if self._feed else {"prompt_tokens": 0, "new_tokens": 0}
        return {
            **{f"{phase}_s": seconds for phase, seconds in self.account.close().items()},
            **feed_tokens,
            **self._links.figures(),
            "weight_bytes": self._part.weight_bytes,
            "kernels": self._part.used,
            "kernels_problem": self._part.kernels_problem,
            "halved_batches": self._halving.count,
            "read_bytes": self._part.read_bytes,
            "read_s": self._load_s,
        }

    def _share(self, stage: int, shard: int) -> range:
        """Of the vocabulary; empty where no logits are asked for."""
        if not self._vocabulary:
            return range(0)
        return vocabulary_share(self._vocabulary, stage, self._layout.stages, shard, self._layout.shards)

    def _first_inbox(self, skeleton: DecoderSkeleton, outbox: Any, needs_logits: bool) -> Inbox:
        """Of a first stage: the leader makes the steps, its other shards get a copy of each."""
        shards = range(1, self._layout.shards)
        if self.coordinates.shard > 0:
            return self._links.inbox(self._steps(self.coordinates.shard))
        ring = self._ring(skeleton, outbox, needs_logits)
        return Copied(ring, [self._links.outbox(self._steps(shard)) for shard in shards]) if shards else ring

    def _ring(self, skeleton: DecoderSkeleton, outbox: Any, needs_logits: bool) -> DecodeRing:
        """Where steps are made: the scheduler, fed by the coordinator and by the steps that come back."""
        layout = self._layout
        groups = layout.in_flight, layout.micro_batch
        scheduler = Scheduler(*groups, self._step_tokens, self._max_length, layout.kv_tokens)
        task = make_task(self._spec, skeleton, self._max_length, needs_logits)
        self._feed = RecordFeed(self._endpoint, task, layout.micro_batch, self._step_tokens, self.account)
        own = [outbox] if self._part.last else []
        others = [self._links.inbox(self._samples_of(shard)) for shard in range(len(own), layout.shards)]
        returned = [*own, *others]
        finish = Finish(task, self._readout, self._final_size, self.account)
        return DecodeRing(
            scheduler,
            layout.in_flight,
            self._feed,
            Gathered(returned) if len(returned) > 1 else returned[0],
            finish,
        )

    def _outbox(self) -> Any:
        """To the same shard of the next stage, or from the last stage back to the leader."""
        stage, shard = self.coordinates.stage, self.coordinates.shard
        if not self._part.last:
            return self._links.outbox(self._activations_from(stage, shard))
        if self._endpoint.rank == self._layout.leader:
            return LocalChannel()
        return self._links.outbox(self._samples_of(shard))

    def _activations(self) -> Inbox:
        return self._links.inbox(self._activations_from(self.coordinates.stage - 1, self.coordinates.shard))

    def _activations_from(self, stage: int, shard: int) -> ChannelPlan:
        """From a shard of a stage to that of the next: all shards have the same ones."""
        ends = self._layout.rank(stage, shard), self._layout.rank(stage + 1, shard)
        payload_bytes = self._step_tokens * self._hidden_size * self._dtype.itemsize
        return self._channel(*ends, _ACTIVATIONS_TAG, payload_bytes, self._spec.transport.wire)

    def _steps(self, shard: int) -> ChannelPlan:
        """From the leader to another shard of the first stage: token ids."""
        ends = self._layout.leader, self._layout.rank(0, shard)
        return self._channel(*ends, _STEPS_TAG, self._step_tokens * torch.int64.itemsize)

    def _samples_of(self, shard: int) -> ChannelPlan:
        """From a shard of the last stage back to the leader: its share, the first one's with hidden states."""
        last = self._layout.stages - 1
        width = self._kind.width(len(self._share(last, shard))) + (self._final_size if shard == 0 else 0)
        ends = self._layout.rank(last, shard), self._layout.leader
        return self._channel(*ends, _SAMPLES_TAG, self._samples * width * torch.float32.itemsize)

    def _channel(self, source: int, destination: int, tag: int, payload_bytes: int, wire: Wire = "none") -> ChannelPlan:
        """A link between two ranks of this replica. Same on both ends."""
        layout = self._layout
        return ChannelPlan(
            source=source,
            destination=destination,
            tag=tag,
            header_words=header_words(layout.in_flight * layout.micro_batch, layout.micro_batch, self._targets),
            values=1,
            dimensions=2,
            payload_bytes=padded(payload_bytes),
            depth=layout.in_flight + 1,  # every group, and the end of the stream
            wire=wire,
        )
