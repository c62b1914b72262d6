"""A connection on which nobody waits longer than agreed, whatever the other side does."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

    from extraction_dagster.stages.catalog.fetch.download import Deadline

_SLICE_SECONDS = 0.5  # after which a silent connection looks whether anybody still waits


class TimedSocket:
    """What http.client needs of a socket; each wait ends with the stall limit, the deadline or a stop."""

    def __init__(self, wire: socket.socket, deadline: Deadline, stall_seconds: float) -> None:
        """Wrap a connection."""
        self._wire, self._deadline, self._stall_seconds = wire, deadline, stall_seconds

    def sendall(self, data: bytes) -> None:
        """Send all of it."""
        self._wire.settimeout(self._deadline.remaining(self._stall_seconds))
        self._wire.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What an answer is read from."""
        return io.BufferedReader(_TimedReader(self._wire, self._deadline, self._stall_seconds))

    def close(self) -> None:
        """Whoever made the connection closes it."""


class _TimedReader(io.RawIOBase):
    def __init__(self, wire: socket.socket, deadline: Deadline, stall_seconds: float) -> None:
        super().__init__()
        self._wire, self._deadline, self._stall_seconds = wire, deadline, stall_seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer has no type in Python 3.11
        silent = 0.0
        while True:
            seconds = self._deadline.remaining(min(_SLICE_SECONDS, max(self._stall_seconds - silent, 0.001)))
            self._wire.settimeout(seconds)
            try:
                return self._wire.recv_into(buffer)
            except TimeoutError:
                silent += seconds
                if silent >= self._stall_seconds:
                    raise
