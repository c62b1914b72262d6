"""An interrupt that arrives while Python cleans up is not lost."""

import signal
import time
import weakref

import pytest

from extraction_dagster.interrupts import redeliver_dropped_interrupts


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
    assert reference() is None
    assert shown == [ValueError]
