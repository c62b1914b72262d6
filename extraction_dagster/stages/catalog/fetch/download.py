"""What every way of downloading has in common: its time, its faults that pass, its version of the file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extraction_dagster.errors import ExtractionError
from extraction_dagster.errors.catalog import DownloadTimeoutError

if TYPE_CHECKING:
    import threading


class PassingFaultError(Exception):
    """One try failed in a way that may pass; the next may succeed.

    Args:
        why: The reason, without anything that the address holds.
        wait_seconds: How long the server asks to be left alone.
    """

    def __init__(self, why: str, *, wait_seconds: float = 0.0) -> None:
        super().__init__(why)
        self.wait_seconds = wait_seconds


class FetchStoppedError(ExtractionError):
    """The download was stopped."""

    def __init__(self) -> None:
        super().__init__("The download was stopped.")


@dataclass(frozen=True, slots=True)
class FileVersion:
    """What tells one content of an address from another.

    Attributes:
        num_bytes: The size; None when the server does not say.
        etag: The server's own name of the content; empty when it gives none.
        modified: The time of the last change in the server's words; empty when it does not say.
        joins: Whether parts of this content may be put together: a weak name does not promise equal bytes.
    """

    num_bytes: int | None = None
    etag: str = ""
    modified: str = ""
    joins: bool = False


class Deadline:
    """The time that one file may take, all tries together; also where a download learns that it should stop."""

    def __init__(self, uri: str, seconds: float, stopped: threading.Event) -> None:
        self.uri, self._seconds, self._stopped = uri, seconds, stopped
        self._end = time.monotonic() + seconds

    def remaining(self, at_most: float) -> float:
        """Seconds left, `at_most` at most.

        Raises:
            DownloadTimeoutError: None are left.
            FetchStoppedError: The fetcher was closed.
        """
        if self._stopped.is_set():
            raise FetchStoppedError
        left = self._end - time.monotonic()
        if left <= 0:
            raise DownloadTimeoutError(self.uri, seconds=self._seconds)
        return min(left, at_most)

    def sleep(self, seconds: float) -> None:
        """Wait, but no longer than there is time."""
        self._stopped.wait(self.remaining(seconds))
        self.remaining(seconds)

    def pause(self, seconds: float) -> None:
        """Wait for what is not the server's fault: the clock stands still meanwhile.

        Raises:
            FetchStoppedError: The fetcher was closed.
        """
        began = time.monotonic()
        if self._stopped.wait(seconds):
            raise FetchStoppedError
        self._end += time.monotonic() - began
