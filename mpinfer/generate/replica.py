"""One rank of a replica that decodes: builds its stage and channels, runs the loop, closes its books."""

import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from mpinfer.generate.cache import KVCache
from mpinfer.generate.feed import RecordFeed
from mpinfer.generate.prompts import Prompts, stop_token_ids
from mpinfer.generate.ring import DecodeRing
from mpinfer.generate.scheduler import Scheduler, Segment, Step
from mpinfer.generate.stage import DecodeStage, encode_step, header_words
from mpinfer.models.decoder import DecoderSkeleton
from mpinfer.observe.account import Account
from mpinfer.pipeline.worker import Worker
from mpinfer.plan.planner import Plan
from mpinfer.plan.predict import StepTimes
from mpinfer.plan.schedule import stream
from mpinfer.spec import AUTO, JobSpec
from mpinfer.transport.channel import MpiInbox, MpiOutbox
from mpinfer.transport.endpoint import Endpoint
from mpinfer.transport.local import LocalChannel
from mpinfer.transport.message import ChannelPlan, Inbox, Message

_ACTIVATIONS_TAG, _TOKENS_TAG = 1, 2
_TYPICAL_LENGTH = 128  # tokens of context of the decode step that is timed


class DecodeRank:
    """A rank between its neighbours: records or activations in, activations or tokens out.

    Loads this rank's partition. Raises `ModelError`.
    """

    def __init__(self, endpoint: Endpoint, spec: JobSpec, plan: Plan, skeleton: DecoderSkeleton, device: str) -> None:
        self.coordinates = plan.grid.coordinates(endpoint.rank)
        self._endpoint, self._spec, self._plan = endpoint, spec, plan
        self._account = Account()
        self._hidden_size, self._dtype = skeleton.hidden_size, skeleton.dtype
        self._inboxes: list[MpiInbox] = []
        self._outboxes: list[MpiOutbox] = []
        self._feed: RecordFeed | None = None
        self._step_tokens = max(spec.generate.step_tokens, plan.micro_batch)  # one of every sequence must fit
        length = skeleton.max_length if spec.generate.max_length == AUTO else spec.generate.max_length
        self._max_length = min(length, skeleton.max_length)

        started = time.perf_counter()
        blocks = plan.blocks_of(self.coordinates.stage)
        self._part = skeleton.load_part(*blocks, device, rows=plan.micro_batch, on_layer=endpoint.progress)
        self._load_s = time.perf_counter() - started
        cache = KVCache(plan.in_flight * plan.micro_batch, self._max_length, device)
        outbox = self._outbox()
        self._inbox: Inbox = (
            self._ring(skeleton, outbox) if self._part.first else self._inbox_from(self.coordinates.stage - 1)
        )
        self._stage = DecodeStage(self._part, cache)
        self._worker = Worker(self._inbox, self._stage, outbox, self._account)

    def step_times(self) -> StepTimes:
        """Time a full prefill step and a decode step of this stage. Also its warm-up; leaves no trace."""
        plan = self._plan
        prefill_tokens = min(self._step_tokens, self._max_length)
        prefill = Step((Segment(0, 0, prefill_tokens, True),), (0,) * prefill_tokens)
        position = min(_TYPICAL_LENGTH, self._max_length) - 1
        decode = Step(
            tuple(Segment(slot, position, 1, True) for slot in range(plan.micro_batch)), (0,) * plan.micro_batch
        )
        return StepTimes(self._time(prefill), self._time(decode))

    def _time(self, step: Step) -> float:
        message = encode_step(step)
        if not self._part.first:
            message = Message(message.header, torch.zeros(len(step.tokens), self._hidden_size, dtype=self._dtype))
        self._stage.forward(message)
        started = time.perf_counter()
        self._stage.forward(message)
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
            "in_flight_s": sum(outbox.in_flight_s for outbox in self._outboxes),
            "bytes_sent": sum(outbox.bytes_sent for outbox in self._outboxes) + self._endpoint.control_bytes_sent,
            "bytes_received": sum(inbox.bytes_received for inbox in self._inboxes)
            + self._endpoint.control_bytes_received,
            "weight_bytes": self._part.weight_bytes,
            "linear_kernels": self._part.kernels,
            "read_bytes": self._part.read_bytes,
            "read_s": self._load_s,
        }

    def _ring(self, skeleton: DecoderSkeleton, outbox: Any) -> DecodeRing:
        """The inbox of a first stage: the scheduler, fed by the coordinator and by the tokens that come back."""
        generate, plan = self._spec.generate, self._plan
        directory = Path(self._spec.model.path)
        scheduler = Scheduler(
            plan.in_flight,
            plan.micro_batch,
            self._step_tokens,
            generate.max_new_tokens,
            self._max_length,
            stop_token_ids(directory, skeleton.config),
        )
        prompts = Prompts(directory, skeleton.vocabulary, self._max_length)
        self._feed = RecordFeed(self._endpoint, prompts, ahead=plan.micro_batch, account=self._account)
        tokens = outbox if self._part.last else self._inbox_from(plan.stages - 1)
        return DecodeRing(scheduler, plan.in_flight, self._feed, tokens)

    def _outbox(self) -> Any:
        """To the next stage, or from the last one back to the first."""
        if self._plan.stages == 1:
            return LocalChannel()
        source = self.coordinates.stage
        plan = self._channel(source, (source + 1) % self._plan.stages)
        outbox = MpiOutbox(self._endpoint, plan, self._waiting, self._spec.transport.blocking)
        self._outboxes.append(outbox)
        return outbox

    def _inbox_from(self, stage: int) -> MpiInbox:
        inbox = MpiInbox(self._endpoint, self._channel(stage, self.coordinates.stage), self._waiting)
        self._inboxes.append(inbox)
        return inbox

    def _channel(self, source: int, destination: int) -> ChannelPlan:
        """The link between two stages of this replica, from the last to the first for tokens. Same on both ends."""
        plan = self._plan
        tokens = destination == 0
        return ChannelPlan(
            source=plan.grid.rank(self.coordinates.replica, source),
            destination=plan.grid.rank(self.coordinates.replica, destination),
            tag=_TOKENS_TAG if tokens else _ACTIVATIONS_TAG,
            header_words=header_words(plan.micro_batch),
            rows=plan.micro_batch if tokens else self._step_tokens,
            width=1 if tokens else self._hidden_size,
            dtype=torch.int64 if tokens else self._dtype,
            depth=plan.in_flight + 1,  # every group, and the end of the stream
        )

    def _waiting(self, phase: Any) -> AbstractContextManager[None]:
        return self._account.phase(phase)
