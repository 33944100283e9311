"""How far the run is: a bar on a terminal, one plain line every 30 s in a log, and figures for others."""

import sys
import time
from typing import Any

from tqdm import tqdm

from mpinfer.observe.bins import Bins

LOG_EVERY_S = 30.0
_BINS = 512


class Progress:
    def __init__(self, total: int, done: int, failed: int = 0) -> None:
        self.total, self.done, self.failed, self.at_start = total, done, failed, done
        self.new_tokens = 0
        self.started_s = time.perf_counter()
        self.over_time = Bins(1, _BINS)  # results
        self._logged = self.started_s
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit="record", dynamic_ncols=True) if terminal else None

    def advance(self, result: dict[str, Any]) -> None:
        now = time.perf_counter()
        self.done += 1
        self.failed += "error" in result
        self.new_tokens += _new_tokens(result)
        self.over_time.count(0, now - self.started_s)
        if self._bar is not None:
            self._bar.update()
        elif now - self._logged >= LOG_EVERY_S:
            self._logged = now
            rate = (self.done - self.at_start) / (now - self.started_s)
            left_s = (self.total - self.done) / rate
            line = f"mpinfer: {self.done}/{self.total} records, {rate:.2f} records/s, about {left_s:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _new_tokens(result: dict[str, Any]) -> int:
    """Of a record that text was generated for."""
    output = result.get("output")
    samples = output.get("samples", [output]) if isinstance(output, dict) else []
    tokens = [sample.get("token_ids") for sample in samples if isinstance(sample, dict)]
    return sum(len(own) for own in tokens if isinstance(own, list))
