"""Run a program for a share of the time, as a control group's CPU quota would: stopped for the rest of each period.

    python quota.py OFFSET SHARE COMMAND...

It runs from OFFSET to OFFSET + SHARE of every period of the clock that all programs share, so that several can take
turns on a core without being in each other's way. A tool of uneven.py.
"""

import os
import signal
import subprocess
import sys
import time

PERIOD_S = 0.04


def main() -> None:
    offset_s, on_s = (float(text) * PERIOD_S for text in sys.argv[1:3])
    program = subprocess.Popen(sys.argv[3:])
    signal.signal(signal.SIGTERM, lambda *_: program.kill())
    while program.poll() is None:
        phase_s = (time.time() - offset_s) % PERIOD_S
        running = phase_s < on_s
        os.kill(program.pid, signal.SIGCONT if running else signal.SIGSTOP)
        time.sleep(on_s - phase_s if running else PERIOD_S - phase_s)
    sys.exit(program.returncode)


if __name__ == "__main__":
    main()
