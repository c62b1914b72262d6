"""Reading ahead in threads, in order and bounded."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

T = TypeVar("T")
R = TypeVar("R")


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
def prefetch(items: Iterable[T], work: Callable[[T], R], *, depth: int, threads: int = 1) -> Generator[Iterator[R]]:
    """Draw items in a thread, and work on each in one of several, while the caller uses earlier ones.

    Args:
        items: Drawn in that thread alone, in order; what it raises is raised where its place in the order is.
        work: What is done to each; what it raises is likewise raised in its place.
        depth: The most items that wait, worked on or not.
        threads: How many are worked on at once.

    Yields:
        What the work made of each item, in the items' order. At the end of the `with`, reached or not, the threads have
        ended.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="embed-prepare") as pool:
        reader = _Reader((pool.submit(work, item) for item in items), depth)
        try:
            with closing(iter(reader)) as drawn:
                yield (future.result() for future in drawn)
        finally:
            reader.stop()
            pool.shutdown(cancel_futures=True)
