"""How long a piece of a stage's work takes."""

import time
from collections.abc import Callable

_LEAST_CALLS = 2


def steady_s(run: Callable[[], object], least_s: float, agree: Callable[[bool], bool] = bool) -> float:
    """Seconds of a call in the mean over `least_s` of steady work, after one that warms up: a rank that is made to
    pause (by a quota, or by a neighbour on its core) is as slow as it will be. `agree`: whether ranks that run together
    go on, of whether this one would."""
    run()
    started, calls = time.perf_counter(), 0
    while agree(calls < _LEAST_CALLS or time.perf_counter() - started < least_s):
        run()
        calls += 1
    return (time.perf_counter() - started) / calls
