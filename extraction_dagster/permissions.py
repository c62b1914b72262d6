"""Who else may read or change what must be ours alone: the data folder and the file `.env`.

Folders that this project makes for itself are readable by nobody else. Wider ones that are there are used as they are,
and warned of once in a process.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_OTHERS_MAY_READ = stat.S_IRGRP | stat.S_IROTH
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_private_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, for this user alone; those that are there stay as they are.

    Raises:
        OSError: It can't be made.
    """
    missing = [folder, *folder.parents]
    missing = missing[: next((number for number, path in enumerate(missing) if path.exists()), len(missing))]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        folder.mkdir()


def home_warning(home: Path) -> str | None:
    """What is wrong with who may look into the data folder; None for nothing, or where there is none yet."""
    found = _status(home)
    if found is None or not stat.S_ISDIR(found.st_mode):
        return None
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid not in {os.geteuid(), 0}:
        return f"The data folder {str(home)!r} belongs to the user with number {found.st_uid}, who can change all of it"
    if mode & _OTHERS:
        may = "change" if mode & _OTHERS_MAY_WRITE else "read"
        return f"Others may {may} the data folder {str(home)!r} (mode {mode:o}): run chmod 700 on it"
    return None


def dotenv_warning(path: Path, *, holds_secrets: bool) -> str | None:
    """What is wrong with who may read or change a file of settings; None for nothing, or where there is none."""
    found = _status(path)
    if found is None:
        return None
    mode, shown = stat.S_IMODE(found.st_mode), str(path.absolute())
    if found.st_uid not in {os.geteuid(), 0}:
        return f"The file {shown!r} belongs to the user with number {found.st_uid}, who can change every setting"
    if mode & _OTHERS_MAY_WRITE:
        return f"Others may change the file {shown!r}, and so every setting (mode {mode:o}): run chmod 600 on it"
    if holds_secrets and mode & _OTHERS_MAY_READ:
        return f"Others may read the file {shown!r}, which holds a password or key (mode {mode:o}): run chmod 600 on it"
    return None


def parents_fault(folder: Path) -> str | None:
    """Why somebody else could put another folder in a folder's place: by a parent that others may write to."""
    for parent in folder.resolve().parents:
        found = parent.stat()
        if found.st_uid not in {os.geteuid(), 0}:
            return f"{str(parent)!r} above it belongs to the user with number {found.st_uid}"
        if found.st_mode & _OTHERS_MAY_WRITE and not found.st_mode & stat.S_ISVTX:
            return f"others may write to {str(parent)!r} above it (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
