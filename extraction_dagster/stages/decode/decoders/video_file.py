"""A file that is open: every reading sees the content that was there first, whatever becomes of its name.

A path was judged before it reached a decoder, and it is opened once, without following any link: whoever swaps a folder
or a file for a link in between gets an error, never another file's frames.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from extraction_dagster.errors.decode import VideoOpenError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Looking a folder up needs no right to list it, where the system can tell the two apart.
_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
# A pipe that took the file's place must not make the opening wait for somebody who writes to it.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_LINKS = frozenset({errno.ELOOP, errno.ENOTDIR})


class VideoFile:
    """An open regular file.

    Attributes:
        path: Where it was opened.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """Take an open descriptor; `open_file` makes one."""
        self.path, self._descriptor = path, descriptor

    def reading(self) -> Reading:
        """A reading from the beginning, independent of the others."""
        return Reading(self._descriptor, f"file:{self.path}")

    @property
    def alias(self) -> str:
        """A path of this very file for a library that takes nothing else; on Linux it outlives the name."""
        alias = f"/proc/self/fd/{self._descriptor}"
        return alias if os.path.exists(alias) else str(self.path)  # noqa: PTH110 - a string for a library


class Reading:
    """What a library that reads through Python needs of a file.

    Attributes:
        name: The file's name; its ending helps to tell containers apart.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        """Begin at the beginning."""
        self.name = name
        self._descriptor, self._at = descriptor, 0

    def read(self, size: int) -> bytes:
        """The next bytes, `size` at most; none at the end."""
        found = os.pread(self._descriptor, size, self._at)
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, and say where that is."""
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: os.fstat(self._descriptor).st_size}
        self._at = max(0, bases[whence] + offset)
        return self._at

    def tell(self) -> int:
        """Where the reading is."""
        return self._at


@contextmanager
def open_file(path: Path) -> Iterator[VideoFile]:
    """Open a regular file, without following links.

    Args:
        path: Resolved before: a link anywhere in it is refused.

    Raises:
        VideoOpenError: It is gone, no regular file, or a link leads to it.
    """
    path = path.absolute()
    try:
        descriptor = _open_without_links(path)
    except OSError as error:
        why = "a link leads to it, or it was replaced meanwhile" if error.errno in _LINKS else error.strerror
        raise VideoOpenError(str(path), why or type(error).__name__) from error
    except ValueError as error:  # a NUL byte
        raise VideoOpenError(str(path), str(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise VideoOpenError(str(path), "it is no regular file")
        yield VideoFile(path, descriptor)
    finally:
        os.close(descriptor)


def _open_without_links(path: Path) -> int:
    folder = os.open(path.anchor, _FOLDER)
    try:
        for part in path.parts[1:-1]:
            inner = os.open(part, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(path.name, _FILE, dir_fd=folder)
    finally:
        os.close(folder)
