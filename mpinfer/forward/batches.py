"""What the first stage of a replica takes its batches from: records, prepared ahead in the background."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from mpinfer.errors import RecordError
from mpinfer.forward.prepare import Preparer, Sample
from mpinfer.observe.account import Account
from mpinfer.transport.control import COORDINATOR, DROP, FINISH, RECORDS, RESULTS, WANT, Control
from mpinfer.transport.message import END, Message

_WINDOW = 4  # batches to choose from where records differ in length: those that are alike waste little on padding

Prepared = tuple[int, Sample | RecordError]


class BatchSource:
    """The inbox of a first stage. Not a channel: it makes the messages that the stage receives.

    A message's header are the indices of its records; its tensors may have more rows than that, at their end.
    """

    def __init__(
        self,
        endpoint: Control,
        sample: Callable[[str], Sample],
        preparer: Preparer,
        check: Callable[[Sample], None],
        values: Callable[[Mapping[str, torch.Tensor]], Sequence[Any]],
        micro_batch: int,
        rows: Callable[[int], int],
        account: Account,
    ) -> None:
        """`sample` makes tensors of a record's line; `check` raises `RecordError` for what the model does not take.

        `values` are what enters the first block, of a batch; `rows` are what the model wants in a batch of so many
        records.
        """
        self._endpoint, self._sample, self._preparer, self._check = endpoint, sample, preparer, check
        self._values, self._micro_batch, self._rows, self._account = values, micro_batch, rows, account
        self._window = _WINDOW if preparer.longest else 1
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")
        self._preparing: deque[Future[list[Prepared]]] = deque()
        self._ready: dict[Hashable, list[tuple[int, Sample]]] = defaultdict(list)
        self._in_hand = 0  # records that were asked for and not yet passed on
        self._dropped: set[int] = set()  # records that another replica was first with
        self._asked, self._more = False, True
        self._stopped = False
        self._answers = 0  # so far
        self._put_off = False  # whether the answer is that one will come later
        endpoint.on(RECORDS, self._receive)
        endpoint.on(DROP, self._drop)
        endpoint.on(FINISH, self._stop)

    def take(self, micro_batch: int) -> Message:
        """The next batch; `END` when there is nothing left to do."""
        while not self._stopped:
            self._ask()
            self._gather()
            bucket = self._next_bucket()
            if bucket is not None:
                return self._batch(bucket)
            if not self._preparing and not self._asked and not self._more:
                return END
            self._wait()
        return END

    def close(self) -> None:
        self._background.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        """Until rank 0 has answered or records have been prepared."""
        answers = self._answers
        with self._account.phase("idle"):
            self._endpoint.wait_until(lambda: self._answers != answers or self._is_prepared() or self._stopped)

    def _ask(self) -> None:
        missing = self._micro_batch * (self._window + 2) - self._in_hand
        if self._more and not self._asked and missing >= self._micro_batch:
            self._endpoint.send(COORDINATOR, WANT, missing)
            self._asked = True

    def _receive(self, source: int, body: dict[str, Any]) -> None:
        records = body["records"]
        self._answers += 1
        self._more = body["more"]
        self._asked = self._put_off = self._more and not records
        self._in_hand += len(records)
        for start in range(0, len(records), self._micro_batch):
            self._preparing.append(self._background.submit(self._prepare, records[start : start + self._micro_batch]))

    def _drop(self, source: int, indices: list[int]) -> None:
        """Forget records that are not yet in a batch."""
        self._dropped.update(indices)
        for bucket in self._ready.values():
            kept = [entry for entry in bucket if entry[0] not in self._dropped]
            self._in_hand -= len(bucket) - len(kept)
            bucket[:] = kept

    def _stop(self, source: int, body: None) -> None:
        """Batches that are on their way are finished, and nothing else."""
        self._stopped = True

    def _prepare(self, records: list[tuple[int, str | int, str]]) -> list[Prepared]:
        """In the background: from records to tensors."""
        prepared: list[Prepared] = []
        for index, _, line in records:
            try:
                sample = self._sample(line)
                self._check(sample)
                prepared.append((index, sample))
            except RecordError as error:
                prepared.append((index, error))
        return prepared

    def _is_prepared(self) -> bool:
        return bool(self._preparing) and self._preparing[0].done()

    def _gather(self) -> None:
        """Sort what has been prepared into buckets; report what could not be."""
        errors = []
        while self._is_prepared():
            for index, sample in self._preparing.popleft().result():
                if index in self._dropped:
                    self._in_hand -= 1
                elif isinstance(sample, RecordError):
                    errors.append({"index": index, "error": {"type": "RecordError", "message": str(sample)}})
                    self._in_hand -= 1
                else:
                    self._ready[self._preparer.key(sample)].append((index, sample))
        if errors:
            self._endpoint.send(COORDINATOR, RESULTS, errors)

    def _next_bucket(self) -> list[tuple[int, Sample]] | None:
        """Records that may share a batch: enough to choose from, or the most that there are when no more is coming."""
        bucket = max(self._ready.values(), key=len, default=None)
        if not bucket:
            return None
        is_last = not self._preparing and (not self._asked or self._put_off)
        return bucket if is_last or len(bucket) >= self._micro_batch * self._window else None

    def _batch(self, bucket: list[tuple[int, Sample]]) -> Message:
        """The longest records of a bucket, as a message."""
        bucket.sort(key=lambda entry: self._preparer.size(entry[1]))
        chosen = bucket[-self._micro_batch :]
        del bucket[-self._micro_batch :]
        self._in_hand -= len(chosen)
        samples = [sample for _, sample in chosen]
        batch = self._preparer.collate(samples + samples[-1:] * (self._rows(len(samples)) - len(samples)))
        return Message(np.array([index for index, _ in chosen], dtype=np.int32), tuple(self._values(batch)))
