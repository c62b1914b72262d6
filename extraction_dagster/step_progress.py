"""Progress of long work: the steps report it, and listeners (a terminal's bars) show it; often there is none.

Where progress is reported, work may stop: an interrupt that was swallowed is raised there.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from extraction_dagster.interrupts import check_interrupts

if TYPE_CHECKING:
    from collections.abc import Iterator


class Listener(Protocol):
    """Somebody who shows progress."""

    def begin(self, step: str, total: int) -> None:
        """A step of `total` records begins."""

    def advance(self, step: str, number: int) -> None:
        """`number` more records of the step are finished."""


_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Hear of progress made in this process."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def begin(step: str, total: int) -> None:
    """Say that a step of `total` records begins."""
    check_interrupts()
    for listener in _listeners:
        listener.begin(step, total)


def advance(step: str, number: int = 1) -> None:
    """Say that `number` more records of a step are finished."""
    check_interrupts()
    for listener in _listeners:
        listener.advance(step, number)
