from __future__ import annotations

import threading
from itertools import count

import pytest

from extraction_dagster.stages.embed.prefetch import prefetch


def same(item):
    return item


def test_items_come_in_order_and_from_another_thread():
    def items():
        for n in range(50):
            yield n, threading.current_thread() is threading.main_thread()

    with prefetch(items(), same, depth=3) as drawn:
        assert list(drawn) == [(n, False) for n in range(50)]


def test_an_error_is_raised_at_its_place_in_the_order():
    def items():
        yield 1
        yield 2
        message = "third"
        raise OSError(message)

    seen = []
    with pytest.raises(OSError, match="third"), prefetch(items(), same, depth=5) as drawn:
        seen.extend(drawn)

    # extend takes nothing from an iterator that raises half-way but what it already took
    assert seen == [1, 2]


def test_the_reader_never_runs_further_ahead_than_the_depth():
    started = []
    waiting = threading.Semaphore(0)

    def items():
        for n in count():
            started.append(n)
            waiting.release()
            yield n

    with prefetch(items(), same, depth=2) as drawn:
        next(drawn)  # frees one place: items 0, 1, 2 may be drawn, a fourth may not
        for _ in range(3):
            assert waiting.acquire(timeout=10)
        assert not waiting.acquire(timeout=0.2)
        assert started == [0, 1, 2]


def test_leaving_early_ends_the_thread():
    before = threading.active_count()

    with prefetch(count(), same, depth=2) as drawn:
        assert next(drawn) == 0

    assert threading.active_count() == before


def test_leaving_by_an_interrupt_ends_the_thread():
    before = threading.active_count()

    def interrupted():
        with prefetch(count(), same, depth=2):
            message = "now"
            raise KeyboardInterrupt(message)

    with pytest.raises(KeyboardInterrupt, match="now"):
        interrupted()

    assert threading.active_count() == before


def test_items_are_worked_on_at_once_and_still_come_in_order():
    both = threading.Barrier(2)

    def work(n):
        both.wait(timeout=30)  # never passes unless another thread works too
        return n * 10

    with prefetch(range(8), work, depth=4, threads=2) as done:
        assert list(done) == [0, 10, 20, 30, 40, 50, 60, 70]


def test_an_error_of_the_work_is_raised_in_its_place():
    def work(n):
        if n == 2:
            message = "third"
            raise OSError(message)
        return n

    seen = []
    with pytest.raises(OSError, match="third"), prefetch(count(), work, depth=5, threads=3) as done:
        seen.extend(done)

    assert seen == [0, 1]
