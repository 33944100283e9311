"""The watchdog: who moves, who is stuck, what it says. Without MPI."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import REPO, eventually

from mpinfer.errors import ExitCode
from mpinfer.observe.watchdog import Watchdog


class Idle:
    """A rank that waits, or computes without using the processor."""

    def __init__(self, waiting=True):
        self.waiting, self.moved_s = waiting, time.monotonic()

    def move(self):
        self.moved_s = time.monotonic()

    def __str__(self):
        return "waiting for rank 7"


class Sign:
    def __init__(self, heard_s, waiting, doing):
        self.heard_s, self.waiting, self.doing = heard_s, waiting, doing


class Alone:
    """What is heard where nobody else is."""

    def __init__(self, activity, **signs):
        self._activity, self.beats = activity, 0
        self.signs = {int(rank.removeprefix("rank")): sign for rank, sign in signs.items()}

    @property
    def moved_s(self):
        return self._activity.moved_s

    def beat(self):
        self.beats += 1

    def start_anew(self):
        self._activity.move()


def watch(activity, pulse, timeout_s):
    """A watchdog in its loop, and the codes that it ends the world with."""
    ended = []

    def end(code):
        ended.append(code)
        watchdog.close()

    watchdog = Watchdog(activity, pulse, timeout_s, lambda: "rank 3 node n1", end)
    watchdog.begin_loop(0.0)
    return watchdog, ended


def test_a_world_that_stands_still_explains_itself_and_ends(capfd):
    activity = Idle()
    pulse = Alone(activity)
    _, ended = watch(activity, pulse, timeout_s=0.6)
    assert eventually(lambda: pulse.beats > 1, 5), "the main thread is made to speak"
    assert not ended
    assert eventually(lambda: ended, 5)
    assert ended == [ExitCode.FAULT]
    said = capfd.readouterr().err
    assert "nothing has moved for 0." in said
    assert "rank 3 node n1: waiting for rank 7; --resume continues the run" in said
    assert "in test_a_world_that_stands_still_explains_itself_and_ends" in said, "the stack of the main thread"


@pytest.mark.parametrize("step_s", [0.0, 1.0])
def test_a_rank_that_computes_moves_and_one_that_sleeps_does_not(step_s):
    activity = Idle(waiting=False)
    watchdog, ended = watch(activity, Alone(activity), timeout_s=0.5)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        pass
    assert not ended, "one long computation"
    watchdog.begin_loop(step_s)
    time.sleep(3.0)
    watchdog.close()
    assert bool(ended) == (step_s == 0.0), "but a step may take ten times as long as the longest that was timed"


def test_reading_counts_as_computing(tmp_path):
    activity = Idle(waiting=False)
    watchdog = Watchdog(activity, Alone(activity), 0, str, print)
    watchdog.look(time.monotonic())
    activity.moved_s = 0.0
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    watchdog.look(time.monotonic() + 1000)  # beside which the time on the processor is nothing
    assert activity.moved_s > 0
    activity.moved_s = 0.0
    watchdog.look(time.monotonic() + 2000)
    assert activity.moved_s == 0


def test_who_waits_does_not_move_however_busily():
    activity = Idle(waiting=True)
    _, ended = watch(activity, Alone(activity), timeout_s=0.5)
    deadline = time.monotonic() + 5
    while not ended and time.monotonic() < deadline:
        pass
    assert ended


def test_the_start_is_given_more_time_and_none_is_for_ever():
    activity = Idle()
    early, never = (Watchdog(activity, Alone(activity), timeout_s, str, print) for timeout_s in (0.2, 0))
    assert early.limit_s == pytest.approx(2.0)
    early.close()
    assert never.limit_s == 0


def test_the_culprit_is_named():
    now = time.monotonic()
    silent, computing = Sign(now - 50, True, "waiting for rank 0"), Sign(now - 1, False, "computing for 58.0 s")
    waiting = Sign(now - 1, True, "waiting for rank 2 for 58.0 s")

    def suspects(**signs):
        return Watchdog(Idle(), Alone(Idle(), **signs), 60, str, print).suspects(now)

    (line,) = suspects(rank1=silent, rank2=computing, rank4=waiting)
    assert line == "rank 1 is silent for 50.0 s (stopped, hung or cut off); it was waiting for rank 0"
    assert suspects(rank2=computing, rank4=waiting) == ["rank 2 does not get on: computing for 58.0 s"]
    assert suspects(rank4=waiting) == ["rank 4 is waiting for rank 2 for 58.0 s"]


_STOPPED = f"""
import sys, time
sys.path[:0] = [{str(REPO / "tests/unit")!r}, {str(REPO / "tests")!r}]
from test_watchdog import Alone, Idle, watch
activity = Idle()
_, ended = watch(activity, Alone(activity), timeout_s=1.0)
print("up", flush=True)
sys.stdin.readline()
print(ended, flush=True)
while not ended:
    time.sleep(0.01)
print(ended, flush=True)
"""


def test_a_job_that_was_stopped_and_continued_is_not_stuck():
    with subprocess.Popen(
        [sys.executable, "-c", _STOPPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(REPO)
    ) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "[]\n"
        assert "FAULT" in process.stdout.readline(), "it is watched again"
