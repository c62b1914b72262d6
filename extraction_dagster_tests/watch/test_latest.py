"""The newest of something that takes time: one thread takes it, nobody waits too long."""

import threading

import pytest

from extraction_dagster.watch.latest import Latest


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("extraction_dagster.watch.latest.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def counting():
    taken = []

    def take():
        taken.append(None)
        return len(taken)

    return taken, take


def test_a_value_is_taken_at_the_first_question_and_again_once_it_is_old(clock):
    taken, take = counting()
    latest = Latest(take, fresh_seconds=lambda _: 5)
    assert taken == []
    assert latest.get(wait_seconds=10) == (1, True)
    clock.now += 4.9
    assert latest.get(wait_seconds=10) == (1, True)
    clock.now += 0.1
    assert latest.get(wait_seconds=10) == (2, True)


def test_how_long_a_value_is_fresh_may_depend_on_the_value(clock):
    _, take = counting()
    latest = Latest(take, fresh_seconds=lambda value: 10 * value)
    assert latest.get(wait_seconds=10) == (1, True)
    clock.now += 10
    assert latest.get(wait_seconds=10) == (2, True)
    clock.now += 19
    assert latest.get(wait_seconds=10) == (2, True)


def test_many_who_ask_at_once_share_one_taking():
    begun, go_on, taken = threading.Event(), threading.Event(), []

    def take():
        taken.append(None)
        begun.set()
        go_on.wait(30)
        return "value"

    latest, answers = Latest(take, fresh_seconds=lambda _: 1e9), []
    asking = [threading.Thread(target=lambda: answers.append(latest.get(wait_seconds=30))) for _ in range(8)]
    for thread in asking:
        thread.start()
    begun.wait(30)
    go_on.set()
    for thread in asking:
        thread.join(30)
    assert answers == [("value", True)] * 8
    assert len(taken) == 1


def test_a_taking_that_hangs_holds_up_nobody_and_its_value_is_there_later():
    go_on, over = threading.Event(), threading.Event()

    def take():
        go_on.wait(30)
        over.set()
        return "late"

    latest = Latest(take, fresh_seconds=lambda _: 1e9)
    assert latest.get(wait_seconds=0.01) == (None, False)
    assert latest.get(wait_seconds=0.0) == (None, False)
    go_on.set()
    over.wait(30)
    assert latest.get(wait_seconds=30) == ("late", True)


def test_a_taking_that_fails_leaves_the_value_before_and_is_tried_again(clock, caplog):
    outcomes = iter(["first", ValueError("the database is down"), "third"])

    def take():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    latest = Latest(take, fresh_seconds=lambda _: 5)
    assert latest.get(wait_seconds=10) == ("first", True)
    clock.now += 6
    assert latest.get(wait_seconds=10) == ("first", False)
    assert "No figures could be taken: the database is down" in caplog.text
    assert latest.get(wait_seconds=10) == ("third", True)
