"""Run mpinfer as on a processor of a share of this one's speed.

    python paced.py SHARE ARGUMENTS_OF_MPINFER...

Whenever the program looks at the clock, it first sleeps until its computing since the last look would be done on the
slower processor: so all that it times takes so much longer, and all that comes after. Waiting takes as long as ever.
The time that it has computed for, too, is that of the slower processor.
Where programs share a core, that one of them waits for the other is hidden in its sleep, as long as their shares are
less than a core together. A tool of uneven.py.
"""

import runpy
import sys
import threading
import time

_LEAST_S = 0.2e-3  # of sleep: a shorter one takes longer than asked
_now, _worked = time.perf_counter, time.process_time  # which the rest of the program finds replaced


class _Pace:
    def __init__(self, share: float) -> None:
        self._share = share
        self._since_s, self._worked_s = _now(), _worked()

    def process_time(self) -> float:
        return _worked() / self._share

    def perf_counter(self) -> float:
        if threading.current_thread() is threading.main_thread():
            self._keep()
        return _now()

    def _keep(self) -> None:
        worked_s, now_s = _worked(), _now()
        due_s = self._since_s + (worked_s - self._worked_s) / self._share
        if 0 < due_s - now_s < _LEAST_S:
            return  # to be slept along with what comes
        if due_s > now_s:
            time.sleep(due_s - now_s)
        self._since_s, self._worked_s = max(due_s, now_s), worked_s


def main() -> None:
    pace = _Pace(float(sys.argv[1]))
    time.perf_counter, time.process_time = pace.perf_counter, pace.process_time
    sys.argv = ["mpinfer", *sys.argv[2:]]
    runpy.run_module("mpinfer", run_name="__main__")


if __name__ == "__main__":
    main()
