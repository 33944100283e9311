"""One rank of a replica that decodes: builds its stage and channels, runs the loop, closes its books."""

import time
from typing import Any

import torch

from mpinfer.generate.cache import KVCache
from mpinfer.generate.feed import RecordFeed
from mpinfer.generate.readout import NoReadout
from mpinfer.generate.ring import DecodeRing, Finish
from mpinfer.generate.scheduler import Scheduler, Segment, Step
from mpinfer.generate.stage import DecodeStage, encode_step, header_words
from mpinfer.generate.tasks import make_task, readout_kind
from mpinfer.models.decoder import DecoderSkeleton
from mpinfer.observe.account import Account
from mpinfer.pipeline.links import Links
from mpinfer.pipeline.worker import Worker
from mpinfer.plan.block import vocabulary_share
from mpinfer.plan.planner import Plan
from mpinfer.plan.predict import StepTimes
from mpinfer.plan.schedule import stream
from mpinfer.spec import AUTO, JobSpec
from mpinfer.transport.channel import MpiInbox
from mpinfer.transport.endpoint import Endpoint
from mpinfer.transport.local import LocalChannel
from mpinfer.transport.message import ChannelPlan, Inbox, Message, padded

_ACTIVATIONS_TAG, _SAMPLES_TAG = 1, 2
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
        self.coordinates = plan.grid.coordinates(endpoint.rank)
        self._endpoint, self._spec, self._plan = endpoint, spec, plan
        self._account = Account()
        self._hidden_size, self._final_size, self._dtype = skeleton.hidden_size, skeleton.final_size, skeleton.dtype
        endpoint.serving = lambda: self._account.phase("overhead")
        self._links = Links(endpoint, self._account, spec.transport.blocking)
        self._feed: RecordFeed | None = None
        self._step_tokens = max(spec.generate.step_tokens, plan.micro_batch)  # one of every sequence must fit
        length = skeleton.max_length if spec.generate.max_length == AUTO else spec.generate.max_length
        self._max_length = min(length, skeleton.max_length, plan.kv_tokens)
        generates = spec.model.task == "generate"
        # A step samples one token of each generating sequence, or any of all its prompts' tokens.
        self._samples = plan.micro_batch if generates else self._step_tokens
        self._targets = self._samples if spec.model.task == "score" else 0

        started = time.perf_counter()
        stage = self.coordinates.stage
        kind = readout_kind(spec, needs_logits)
        vocabulary = range(0) if kind is NoReadout else vocabulary_share(skeleton.vocabulary, stage, plan.stages)
        self._part = skeleton.load_part(
            *plan.blocks_of(stage), device, plan.micro_batch, on_layer=endpoint.progress, vocabulary=vocabulary
        )
        self._load_s = time.perf_counter() - started
        self._readout = kind(self._part)
        last = vocabulary_share(skeleton.vocabulary, plan.stages - 1, plan.stages)
        self._samples_width = self._final_size + kind.width(len(last))
        cache = KVCache(plan.in_flight * plan.micro_batch, self._max_length, device)
        outbox = self._outbox()
        self._inbox: Inbox = (
            self._ring(skeleton, outbox, needs_logits)
            if self._part.first
            else self._inbox_from(self.coordinates.stage - 1)
        )
        self._stage = DecodeStage(self._part, cache, NoReadout(self._part) if self._part.first else self._readout)
        self._worker = Worker(self._inbox, self._stage, outbox, self._account)

    def step_times(self) -> StepTimes:
        """Time a full prefill step and a decode step of this stage. Also its warm-up; leaves no trace."""
        slots = range(self._plan.micro_batch)
        prefill_tokens = min(self._step_tokens, self._max_length)
        position = min(_TYPICAL_LENGTH, self._max_length) - 1
        return StepTimes(
            self._time([Segment(0, 0, prefill_tokens, 1)]),
            self._time([Segment(slot, position, 1, 1) for slot in slots]),
        )

    def _time(self, segments: list[Segment]) -> float:
        tokens, samples = (0,) * sum(s.length for s in segments), sum(s.samples for s in segments)
        message = encode_step(Step(tuple(segments), tokens, (0,) * min(samples, self._targets)))
        if not self._part.first:
            message = Message(message.header, (torch.zeros(len(tokens), self._hidden_size, dtype=self._dtype),))
        hidden = torch.zeros(samples, self._final_size)
        for _ in range(2):
            started = time.perf_counter()
            self._stage.forward(message)
            if self._part.first:
                self._readout.reduce(hidden, (0,) * samples)
        return time.perf_counter() - started

    def run(self) -> None:
        """The loop, until the stream of steps ends."""
        self._account.restart()
        self._worker.run(stream())
        self._inbox.close()

    def close_account(self) -> dict[str, Any]:
        """This rank's figures, all measured: seconds per phase, bytes over channels and in control messages."""
        feed_tokens = self._feed.tokens if self._feed else {"prompt_tokens": 0, "new_tokens": 0}
        return {
            **{f"{phase}_s": seconds for phase, seconds in self._account.close().items()},
            **feed_tokens,
            **self._links.figures(),
            "weight_bytes": self._part.weight_bytes,
            "linear_kernels": self._part.kernels,
            "read_bytes": self._part.read_bytes,
            "read_s": self._load_s,
        }

    def _ring(self, skeleton: DecoderSkeleton, outbox: Any, needs_logits: bool) -> DecodeRing:
        """The inbox of a first stage: the scheduler, fed by the coordinator and by the steps that come back."""
        plan = self._plan
        scheduler = Scheduler(plan.in_flight, plan.micro_batch, self._step_tokens, self._max_length, plan.kv_tokens)
        task = make_task(self._spec, skeleton, self._max_length, needs_logits)
        self._feed = RecordFeed(self._endpoint, task, ahead=plan.micro_batch, account=self._account)
        returned = outbox if self._part.last else self._inbox_from(plan.stages - 1)
        finish = Finish(task, self._readout, self._final_size, self._account)
        return DecodeRing(scheduler, plan.in_flight, self._feed, returned, finish)

    def _outbox(self) -> Any:
        """To the next stage, or from the last one back to the first."""
        if self._plan.stages == 1:
            return LocalChannel()
        source = self.coordinates.stage
        return self._links.outbox(self._channel(source, (source + 1) % self._plan.stages))

    def _inbox_from(self, stage: int) -> MpiInbox:
        return self._links.inbox(self._channel(stage, self.coordinates.stage))

    def _channel(self, source: int, destination: int) -> ChannelPlan:
        """The link between two stages of this replica, from the last to the first for samples. Same on both ends."""
        plan = self._plan
        back = destination == 0
        rows, width = (self._samples, self._samples_width) if back else (self._step_tokens, self._hidden_size)
        dtype = torch.float32 if back else self._dtype
        return ChannelPlan(
            source=plan.grid.rank(self.coordinates.replica, source),
            destination=plan.grid.rank(self.coordinates.replica, destination),
            tag=_SAMPLES_TAG if back else _ACTIVATIONS_TAG,
            header_words=header_words(plan.in_flight * plan.micro_batch, plan.micro_batch, self._targets),
            values=1,
            dimensions=2,
            payload_bytes=padded(rows * width * dtype.itemsize),
            depth=plan.in_flight + 1,  # every group, and the end of the stream
        )
