"""What the last stage of a replica does with what comes out of the model: results, for rank 0."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mpinfer.errors import RecordError
from mpinfer.forward.stage import failed
from mpinfer.forward.tasks import Output, Task
from mpinfer.observe.account import Account
from mpinfer.records.shards import ShardWriter
from mpinfer.transport.control import COMPUTED, COORDINATOR, RESULTS, Control
from mpinfer.transport.message import Message

_TOO_LARGE = RecordError(
    "the record needs more memory than its rank has, even alone in a batch; give each rank more, or cut the record"
)
_FLUSH_S = 2.0  # the longest that a result waits for its shard to fill


class ResultSink:
    """The outbox of a last stage. Not a channel: its messages end here."""

    def __init__(
        self,
        endpoint: Control,
        task: Task,
        output_names: Callable[[], Sequence[str]],
        arrays: Path | None,
        account: Account,
    ) -> None:
        """`arrays`: the output directory, if arrays go to files of their own and not into the results."""
        self._endpoint, self._task, self._output_names, self._account = endpoint, task, output_names, account
        self._shards = None if arrays is None else ShardWriter(arrays)
        self._plain: dict[int, dict[str, Any]] = {}  # of records whose arrays wait for their shard, the rest
        self._flushed = time.monotonic()

    def start(self, micro_batch: int, message: Message) -> None:
        if not message.is_end:
            header = message.header.tolist()
            indices = [index for index in header if index >= 0]
            outputs: Sequence[Output] = ()
            if indices:
                with self._account.phase("compute"):
                    batch = dict(zip(self._output_names(), message.values, strict=True))
                    outputs = self._task.outputs(_tensors(batch), len(indices))
            self._send([result for pair in zip(indices, outputs, strict=True) if (result := self._result(*pair))])
            self._send([_failed(failed(index), _TOO_LARGE) for index in header if index < 0])
            if computed := [index for index in indices if index in self._plain]:
                self._endpoint.send(COORDINATOR, COMPUTED, computed)  # lest another replica be asked for them
        if self._shards is not None and (
            message.is_end or self._shards.is_full or time.monotonic() - self._flushed > _FLUSH_S
        ):
            places = self._shards.flush()
            self._send([{"index": i, "output": {**self._plain.pop(i), **arrays}} for i, arrays in places])
            self._flushed = time.monotonic()

    def drain(self) -> None:
        """Results are control messages, which the endpoint completes."""

    def _result(self, index: int, output: Output) -> dict[str, Any] | None:
        """None when it has to wait for its arrays' shard."""
        if isinstance(output, RecordError):
            return _failed(index, output)
        arrays = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
        plain = {name: value for name, value in output.items() if name not in arrays}
        if arrays and self._shards is not None:
            self._plain[index] = plain
            self._shards.add(index, {name: array.numpy() for name, array in arrays.items()})
            return None
        if broken := [name for name, array in arrays.items() if not array.isfinite().all()]:
            return _failed(
                index,
                RecordError(f"{broken[0]}: has NaN or infinity, which JSON cannot hold; set output.arrays to npy"),
            )
        return {"index": index, "output": {**plain, **{name: array.tolist() for name, array in arrays.items()}}}

    def _send(self, results: list[dict[str, Any]]) -> None:
        if results:
            self._endpoint.send(COORDINATOR, RESULTS, results)


def _failed(index: int, error: RecordError) -> dict[str, Any]:
    return {"index": index, "error": {"type": "RecordError", "message": str(error)}}


def _tensors(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
