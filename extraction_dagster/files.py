"""Write a small file so that a reader sees the old one or the new one, never a torn one, whatever is killed when."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path

_SUFFIX = ".tmp"


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace a file: temporary file beside it, everything on disk, rename, folder on disk.

    Args:
        path: Target; its folder exists. A symbolic link is replaced, never followed.
        data: The whole new content.
        mode: Who may read the file; by default nobody else.

    Raises:
        OSError: It can't be written; the old file is untouched.
    """
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def read_small(path: Path, *, max_bytes: int) -> bytes | None:
    """The content of a regular file; None when there is none.

    Raises:
        OSError: It can't be read, or it is a link, a folder or a device.
        ValueError: It is larger than a file of its kind can be.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            data = file.read(max_bytes + 1)
    finally:
        os.close(handle)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return data


def _sweep(path: Path) -> None:
    """Remove temporary files that a killed process left behind."""
    for stale in path.parent.glob(f".{path.name}.*{_SUFFIX}"):
        owner = stale.name.removeprefix(f".{path.name}.").split(".")[0]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            stale.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
