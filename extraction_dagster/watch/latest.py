"""The newest of something that takes time: taken by one thread, however many ask, and never waited for too long."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_Value = TypeVar("_Value")
_log = logging.getLogger(__name__)


class Latest(Generic[_Value]):
    """Takes a value anew when it is asked for and old enough.

    A taking that hangs, on a database that does not answer say, keeps its thread and nobody else: those who ask wait
    for as long as they said, and get what there is.
    """

    def __init__(self, take: Callable[[], _Value], *, fresh_seconds: Callable[[_Value], float]) -> None:
        """Nothing is taken before the first question.

        Args:
            take: Takes a value; an exception is logged, and the value before stays.
            fresh_seconds: For how long a value need not be taken anew.
        """
        self._take, self._fresh_seconds = take, fresh_seconds
        self._lock = threading.Lock()
        self._taking: threading.Thread | None = None
        self._value: _Value | None = None
        self._taken_at = float("-inf")

    def get(self, *, wait_seconds: float) -> tuple[_Value | None, bool]:
        """The newest value, None before there is one; and whether it is as fresh as it should be."""
        with self._lock:
            if self._is_fresh():
                return self._value, True
            if self._taking is None:
                self._taking = threading.Thread(target=self._work, daemon=True)
                self._taking.start()
            taking = self._taking
        taking.join(wait_seconds)
        with self._lock:
            return self._value, self._is_fresh()

    def _is_fresh(self) -> bool:
        value = self._value
        return value is not None and time.monotonic() - self._taken_at < self._fresh_seconds(value)

    def _work(self) -> None:
        try:
            value = self._take()
            with self._lock:
                self._value, self._taken_at = value, time.monotonic()
        except Exception as error:  # noqa: BLE001 - whatever it is, those who ask get what there was before
            _log.warning("No figures could be taken: %s", error)
        finally:
            with self._lock:
                self._taking = None
