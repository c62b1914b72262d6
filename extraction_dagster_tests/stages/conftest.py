"""What the tests of the rooms share."""

import threading

import pytest


@pytest.fixture
def no_longer_than_minutes():
    """Kills a process that is still there after two minutes, so that whatever waits for it ends."""
    timers = []

    def limit(process):
        timers.append(threading.Timer(120, process.kill))
        timers[-1].daemon = True
        timers[-1].start()

    yield limit
    for timer in timers:
        timer.cancel()
