"""An interrupt that arrives while Python cleans up is not lost."""

import os
import random
import signal
import subprocess
import sys
import time
import weakref

import pytest

from extraction_dagster import step_progress
from extraction_dagster.interrupts import check_interrupts, redeliver_dropped_interrupts


class Thing:
    """Can be referred to weakly."""


def drop_an_interrupt():
    """Get SIGINT in the callback of a weak reference, whose exceptions Python drops."""
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    assert reference() is None


def test_python_drops_an_interrupt_that_arrives_in_a_callback(monkeypatch):
    dropped = []
    monkeypatch.setattr("sys.unraisablehook", lambda info: dropped.append(info.exc_type))
    drop_an_interrupt()
    assert dropped == [KeyboardInterrupt]


def test_a_dropped_interrupt_is_delivered_again():
    def work():
        drop_an_interrupt()
        time.sleep(30)

    with pytest.raises(KeyboardInterrupt, match=r"^$"), redeliver_dropped_interrupts(KeyboardInterrupt):
        work()


def test_what_interrupts_an_inner_part_is_told_by_its_own_name():
    class Terminated(BaseException):
        """What the handler raises inside."""

    def terminate(_number, _frame):
        raise Terminated

    def work():
        before = signal.signal(signal.SIGINT, terminate)
        try:
            with redeliver_dropped_interrupts(Terminated):
                drop_an_interrupt()
                time.sleep(30)
        finally:
            signal.signal(signal.SIGINT, before)

    with pytest.raises(Terminated, match=r"^$"), redeliver_dropped_interrupts(KeyboardInterrupt):
        work()


def test_other_exceptions_are_shown_as_ever(monkeypatch):
    shown = []
    monkeypatch.setattr("sys.unraisablehook", lambda info: shown.append(info.exc_type))

    def fail(_):
        raise ValueError

    with redeliver_dropped_interrupts(KeyboardInterrupt):
        thing = Thing()
        reference = weakref.ref(thing, fail)
        del thing
        until = time.monotonic() + 20
        while not shown and time.monotonic() < until:
            time.sleep(0.01)
    assert reference() is None
    assert shown == [ValueError]


class Deaf:
    """Swallows whatever is raised while it is asked, as parts of Python written in C do."""

    def __enter__(self):
        return self

    def __exit__(self, *_raised):
        return True


def swallow_an_interrupt():
    with Deaf():
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_somebody_swallowed_is_raised_at_the_next_record():
    reached = []

    def work():
        swallow_an_interrupt()
        reached.append("swallowed")
        step_progress.advance("videos")
        reached.append("went on")

    with pytest.raises(KeyboardInterrupt, match=r"^$"), redeliver_dropped_interrupts(KeyboardInterrupt):
        work()
    assert reached == ["swallowed"]


def test_an_interrupt_that_somebody_swallowed_ends_the_block_at_the_latest():
    with pytest.raises(KeyboardInterrupt, match=r"^$"), redeliver_dropped_interrupts(KeyboardInterrupt):
        swallow_an_interrupt()


def test_a_signal_of_before_the_block_or_of_a_forked_child_does_not_interrupt_it():
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with redeliver_dropped_interrupts(KeyboardInterrupt):
        check_interrupts()
        child = os.fork()
        if child == 0:
            with Deaf():
                signal.raise_signal(signal.SIGINT)
            os._exit(0)
        os.waitpid(child, 0)
        check_interrupts()
    check_interrupts()


# Forks a child for each burst, since starting an interpreter costs a hundred times as much. The child makes garbage
# whose callbacks and finalizers run Python, so that signals arrive where exceptions are dropped.
BURSTS = """
import gc, os, random, signal, sys, time, weakref
from extraction_dagster.interrupts import check_interrupts, ignore_more_interrupts, redeliver_dropped_interrupts

class Thing:
    def __del__(self):
        for _ in range(20):
            pass

def work(started):
    os.write(started, b"x")
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for _ in range(50):
            thing = Thing()
            kept = weakref.ref(thing, lambda _: sum(range(30)))
            thing.itself = thing
            hasattr(thing, "nothing")
        gc.collect(0)
        check_interrupts()
    os._exit(7)

def child(started):
    def stop(_number, _frame):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    code = 9
    try:
        with redeliver_dropped_interrupts(KeyboardInterrupt):
            try:
                work(started)
            except KeyboardInterrupt:
                ignore_more_interrupts()
                code = 130
                raise
    except KeyboardInterrupt:
        os._exit(code if code == 130 else 130)
    os._exit(8)

chance, codes = random.Random(int(sys.argv[2])), []
for _ in range(int(sys.argv[1])):
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        child(write)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    time.sleep(chance.uniform(0, 0.01))
    for _ in range(chance.randint(2, 6)):
        os.kill(process, signal.SIGTERM)
        time.sleep(chance.choice([0, 0, 0.0001, 0.001, 0.05]))
    _, status = os.waitpid(process, 0)
    codes.append(os.waitstatus_to_exitcode(status))
print(codes.count(130), [code for code in codes if code != 130])
"""


def bursts(number, seed):
    command = [sys.executable, "-c", BURSTS, str(number), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)
    assert done.stdout == f"{number} []\n", done.stderr[-2000:]


def test_bursts_of_signals_at_random_moments_end_the_work_each_time():
    bursts(40, random.Random().randint(0, 10**6))


@pytest.mark.soak
def test_a_thousand_bursts_of_signals_end_the_work_each_time():
    bursts(1000, 4)
