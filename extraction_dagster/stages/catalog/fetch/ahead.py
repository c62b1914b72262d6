"""Downloads run ahead in a few threads, so that the decoding processes do not wait for the network."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extraction_dagster.errors.fetch import FetchSetupError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from pathlib import Path

    from extraction_dagster.records import VideoRow
    from extraction_dagster.stages.catalog.fetch.fetching import Fetcher

_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Fetched:
    """A row with its local file, or with the reason why it has none."""

    row: VideoRow
    path: Path | None = None
    error: Exception | None = None


def fetch_ahead(rows: Iterable[VideoRow], fetcher: Fetcher, *, threads: int) -> Generator[Fetched | None, None, None]:
    """Fetch rows: local ones as they come, the others several at a time, in the order in which they are ready.

    Args:
        rows: Drawn only as far as downloads are under way.
        fetcher: Fetches one row. Closed when this ends early; else by the caller, who still needs the last files.
        threads: Most downloads that are under way, or ready and not yet taken.

    Yields:
        Fetched: a row that is ready; or None, a moment after it was asked for, while none is.

    Raises:
        FetchSetupError: Nothing can be fetched as things are set up here.
    """
    downloads = _Downloads(fetcher)
    source = iter(rows)
    more = True
    try:
        while more or downloads.pending:
            if more and downloads.pending < threads:
                row = next(source, None)
                more = row is not None
                if row is not None and fetcher.is_remote(row):
                    downloads.start(row)
                elif row is not None:
                    yield _settled(_try(fetcher, row))
                continue
            yield downloads.take()
    except BaseException:
        fetcher.close()  # ends what is under way
        raise
    finally:
        downloads.stop()


class _Downloads:
    """The threads, what they are asked for and what they have done."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._todo: queue.SimpleQueue[VideoRow | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Fetched | tuple[VideoRow, BaseException]] = queue.SimpleQueue()
        self._threads = 0
        self.pending = 0

    def start(self, row: VideoRow) -> None:
        self.pending += 1
        self._todo.put(row)
        if self._threads < self.pending:
            self._threads += 1
            # A daemon: an interpreter that ends does not wait for a silent server.
            threading.Thread(target=self._serve, name=f"fetch-{self._threads}", daemon=True).start()

    def take(self) -> Fetched | None:
        try:
            done = self._done.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return None
        self.pending -= 1
        return _settled(done)

    def stop(self) -> None:
        for _ in range(self._threads):
            self._todo.put(None)

    def _serve(self) -> None:
        while (row := self._todo.get()) is not None:
            self._done.put(_try(self._fetcher, row))


def _try(fetcher: Fetcher, row: VideoRow) -> Fetched | tuple[VideoRow, BaseException]:
    try:
        return Fetched(row, fetcher.fetch(row))
    except (FetchSetupError, MemoryError) as error:
        return row, error
    except Exception as error:  # noqa: BLE001 - whatever a row's address provokes is that row's failure
        return Fetched(row, error=error)
    except BaseException as error:  # noqa: BLE001 - raised where the rows are drawn
        return row, error


def _settled(done: Fetched | tuple[VideoRow, BaseException]) -> Fetched:
    """What was fetched, or the exception that is no row's fault."""
    if isinstance(done, Fetched):
        return done
    raise done[1]
