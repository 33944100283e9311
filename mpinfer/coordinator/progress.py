"""How far the run is: a bar on a terminal, one plain line every 30 s in a log."""

import sys
import time

from tqdm import tqdm

LOG_EVERY_S = 30.0


class Progress:
    def __init__(self, total: int, done: int) -> None:
        self._total, self._done, self._at_start = total, done, done
        self._started = self._logged = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit="record", dynamic_ncols=True) if terminal else None

    def advance(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif (now := time.monotonic()) - self._logged >= LOG_EVERY_S:
            self._logged = now
            rate = (self._done - self._at_start) / (now - self._started)
            left_s = (self._total - self._done) / rate
            line = f"mpinfer: {self._done}/{self._total} records, {rate:.2f} records/s, about {left_s:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
