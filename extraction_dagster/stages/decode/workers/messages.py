"""Messages between a worker process and its parent: 8 bytes of length, then a pickle.

The parent depends on nobody's good will: it takes what has arrived and comes back for the rest, so that a worker which
stops, or is stopped, in the middle of a message costs no more than its video's time.
"""

from __future__ import annotations

import pickle
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

_LENGTH = struct.Struct("!Q")
_CHUNK_BYTES = 2**20
_ANY = 2**64


def send(wire: socket.socket, message: object) -> None:
    """Send a message, all of it.

    Raises:
        OSError: The other side is gone, or takes nothing for longer than the socket's timeout.
    """
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    wire.sendall(_LENGTH.pack(len(content)))
    wire.sendall(content)


def wait_for(wire: socket.socket) -> bytes:
    """Wait for the next message, as a worker may: its parent's end is its own.

    Raises:
        EOFError: The other side is gone.
    """
    message = Inbox(most_bytes=_ANY).take(wire)
    if message is None:
        raise EOFError  # only a socket that does not wait comes here
    return message


class Inbox:
    """What has arrived of the other side's next message."""

    def __init__(self, *, most_bytes: int) -> None:
        """Believe no message that says it is longer."""
        self._most_bytes, self._arrived = most_bytes, bytearray()

    def take(self, wire: socket.socket) -> bytes | None:
        """The next message, or None where a part of it is missing and the socket does not wait.

        Raises:
            EOFError: The other side is gone.
            ValueError: The message says that it is too long.
        """
        while missing := self._missing():
            try:
                part = wire.recv(min(missing, _CHUNK_BYTES))
            except BlockingIOError:
                return None
            if not part:
                raise EOFError
            self._arrived += part
        message = bytes(memoryview(self._arrived)[_LENGTH.size :])
        self._arrived = bytearray()
        return message

    def _missing(self) -> int:
        if len(self._arrived) < _LENGTH.size:
            return _LENGTH.size - len(self._arrived)
        (length,) = _LENGTH.unpack_from(self._arrived)
        if length > self._most_bytes:
            reason = f"a message of {length} bytes, expected at most {self._most_bytes}"
            raise ValueError(reason)
        return int(_LENGTH.size + length - len(self._arrived))
