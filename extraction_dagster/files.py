"""Write a file so that a reader sees the old one or the new one, never a torn one, whatever is killed when.

    state.json                                    what readers see
    .state.json.4711-1f2e3d4c.9a8b7c6d.tmp        process 4711 of this machine writes it; renamed once it is whole

A process that is killed leaves its temporary file behind; the next writer of `state.json` removes it.
"""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)
# Writers of other machines, and of older versions, can't be asked: after an hour without a change they are gone.
ABANDONED_SECONDS = 3600.0
_LONGEST_SECONDS = 86_400.0  # process ids are given again: a living one may be another's by then
_TEMPORARY = re.compile(r"\.(?P<pid>\d+)-(?P<place>[0-9a-f]{8})\.[0-9a-f]{8}\.tmp")
_MOST_CHARACTERS = 50  # of a name within a temporary one, so that no file system finds it too long


def write_atomically(path: Path, data: bytes, *, mode: int | None = 0o600, durable: bool = True) -> None:
    """Replace a file by some bytes; see `replacing`, whose arguments and errors these are."""
    with replacing(path, mode=mode, durable=durable) as beside:
        beside.write_bytes(data)


@contextmanager
def replacing(path: Path, *, mode: int | None = 0o600, durable: bool = True, folder: bool = False) -> Iterator[Path]:
    """Replace a file by what the block writes: under a temporary name beside it, renamed when the block ends.

    Args:
        path: Target; its folder exists. A symbolic link is replaced, never followed.
        mode: Who may read the file, by default nobody else; None leaves that to the umask.
        durable: Whether the disk has all of it before it is renamed: a power cut loses or empties no such file.
        folder: Make a folder instead, which takes the place of an empty one or of none.

    Raises:
        OSError: It can't be written; the old file is untouched, and nothing is left beside it.
    """
    # The folder may be anybody's: only names that this module gives go.
    sweep(path.parent, f"{glob.escape(_prefix(path.name))}*-????????.????????.tmp")
    beside = path.with_name(temporary_name(path.name))
    try:
        if folder:
            beside.mkdir()
        else:
            beside.touch(0o666 if mode is None else 0o600, exist_ok=False)
            if mode is not None:
                beside.chmod(mode)  # whatever the umask
        yield beside
        if durable:
            publish(beside, path)
        else:
            beside.replace(path)
    except BaseException:
        _remove(beside)
        raise


def create_atomically(path: Path, data: bytes) -> bool:
    """Make a file of some bytes unless there is one; of several processes at once, one does. Returns whether we did.

    Raises:
        OSError: It can't be written; nothing is left beside it.
    """
    sweep(path.parent, f"{glob.escape(_prefix(path.name))}*-????????.????????.tmp")
    beside = path.with_name(temporary_name(path.name))
    try:
        beside.write_bytes(data)
        with _opened(beside, os.O_NOFOLLOW) as handle:
            os.fsync(handle)
        try:
            path.hardlink_to(beside)
        except FileExistsError:
            return False
        except OSError:  # a disk without such links
            if path.exists():
                return False
            beside.replace(path)
        sync_folder(path.parent)
    finally:
        _remove(beside)
    return True


def publish(made: Path, path: Path) -> None:
    """Rename a finished file into place: first all of it is on disk, then the rename."""
    with _opened(made, os.O_NOFOLLOW) as handle:
        os.fsync(handle)
    made.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on disk: a file that was renamed into it stays there after a power cut."""
    with _opened(folder, os.O_DIRECTORY) as handle:
        os.fsync(handle)


def temporary_name(name: str) -> str:
    """A name that nobody can foresee, for a file of that name while it is written."""
    return f"{_prefix(name)}{os.getpid()}-{_place()}.{secrets.token_hex(4)}.tmp"


def sweep(folder: Path, pattern: str = ".*.tmp") -> None:
    """Remove temporary files that killed processes left behind, and no file that is being written.

    A file goes once its process is gone from this machine. Where that can't be told, since another machine wrote it, it
    goes once nothing was written to it for an hour. Only a folder of our own may be swept of all temporary files.
    """
    paths = list[Path]()
    with suppress(OSError):  # the folder was removed meanwhile
        paths += folder.glob(pattern)
    for path in paths:
        with suppress(OSError):  # its writer has renamed it, another process sweeps too, or it is another user's
            if _is_abandoned(path):
                logger.warning("Removing %s, which a killed process left behind.", path)
                _remove(path)


def read_small(path: Path, *, max_bytes: int) -> bytes | None:
    """The content of a regular file; None when there is none.

    Raises:
        OSError: It can't be read, or it is a link, a folder or a device.
        ValueError: It is larger than such a file can be.
    """
    try:
        with _opened(path, os.O_NOFOLLOW | os.O_NONBLOCK) as handle:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            with os.fdopen(handle, "rb", closefd=False) as file:
                data = file.read(max_bytes + 1)
    except FileNotFoundError:
        return None
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return data


def _prefix(name: str) -> str:
    return f".{name[:_MOST_CHARACTERS]}."


@functools.cache
def _place() -> str:
    """Where a process id means what it means here: this machine since it was started, and this container."""
    facts = [socket.gethostname()]
    with suppress(OSError):  # Linux has both
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        facts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _is_abandoned(path: Path) -> bool:
    writer = _TEMPORARY.search(path.name)
    unchanged_seconds = time.time() - path.lstat().st_mtime
    if writer is None or writer["place"] != _place() or unchanged_seconds > _LONGEST_SECONDS:
        return unchanged_seconds > ABANDONED_SECONDS
    try:
        with suppress(PermissionError):  # it is there, and another user's
            os.kill(int(writer["pid"]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY | flags)
    try:
        yield handle
    finally:
        os.close(handle)
