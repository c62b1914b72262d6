"""Reading ahead in a thread, in order and bounded."""

from __future__ import annotations

import queue
import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

T = TypeVar("T")


class _Reader(Generic[T]):
    """A thread that draws from an iterable, at most `depth` items ahead of whoever takes them."""

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._items = items
        self._room = threading.Semaphore(depth)
        # (True, item), or (False, None) at the end, or (False, error).
        self._ready: queue.SimpleQueue[tuple[bool, T | BaseException | None]] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="embed-reader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            iterator = iter(self._items)
            while self._room.acquire() and not self._stopped.is_set():
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                self._ready.put((True, item))
        except BaseException as caught:  # noqa: BLE001 - raised again where the items are taken
            error = caught
        self._ready.put((False, error))

    def __iter__(self) -> Generator[T]:
        while True:
            more, item = self._ready.get()
            if not more:
                if isinstance(item, BaseException):
                    raise item
                return
            self._room.release()
            yield item  # type: ignore[misc] # (True, item) holds a T

    def stop(self) -> None:
        """Let the thread finish the item in hand, then end it."""
        self._stopped.set()
        self._room.release()
        self._thread.join()


@contextmanager
def prefetch(items: Iterable[T], *, depth: int) -> Generator[Iterator[T]]:
    """Draw items in a thread while the caller works on earlier ones.

    Args:
        items: Drawn in that thread alone, in order; what it raises is raised where its place in the order is.
        depth: The most items that wait.

    Yields:
        The items. At the end of the `with`, reached or not, the thread has ended.
    """
    reader = _Reader(items, depth)
    try:
        with closing(iter(reader)) as drawn:
            yield drawn
    finally:
        reader.stop()
