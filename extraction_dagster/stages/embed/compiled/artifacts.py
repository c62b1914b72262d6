"""Compiled networks on disk: what is loaded is what this user made, here, unaltered.

    <folder>                    of this user, and writable by nobody else
        <key>-<sha256>.onnx     a compiled network; its name says what its bytes hash to
        <key>.lock              held by the process that compiles it
        <key>.tmp               the folder in which that process works
        <key>.failed            why it could not be compiled, and with which packages

A process that is killed while it compiles leaves a `.tmp`, which the next one to compile removes, and no lock.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from extraction_dagster.errors.embed import ArtifactFolderError
from extraction_dagster.files import publish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_log = logging.getLogger(__name__)
_DAY_SECONDS = 86_400
_UNUSED_SECONDS = 30 * _DAY_SECONDS
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # neither a link nor a pipe to wait at
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class ArtifactFolder:
    """The folder of compiled networks; it is made when it is first looked into.

    Args:
        folder: Under the data folder, never a shared place such as the system's temporary folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: str) -> Path | None:
        """The compiled network of a key; a damaged one is removed first.

        Raises:
            ArtifactFolderError: The folder, or a file in it, could have been written by somebody else.
        """
        self._make()
        for path in sorted(self.folder.glob(f"{key}-*.*")):
            if path.stem == f"{key}-{self._sha256(path)}":
                with suppress(OSError):
                    os.utime(path)  # the time of the last use
                return path
            self.discard(path, "is damaged")
        return None

    def discard(self, path: Path, why: str) -> None:
        """Remove a compiled network that can't be used."""
        _log.warning("The compiled network %s %s; it is removed and made again", path, why)
        path.unlink(missing_ok=True)

    @contextmanager
    def building(self, key: str) -> Iterator[Path | None]:
        """An empty folder to compile in; None when another process is compiling the same."""
        lock = FileLock(self.folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield None
            return
        work = self.folder / f"{key}.tmp"
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(mode=0o700)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            lock.release()

    def keep(self, key: str, made: Path) -> Path:
        """Put a compiled network in its place, whole or not at all; those unused for a month go."""
        made.chmod(0o600)
        path = self.folder / f"{key}-{self._sha256(made)}{made.suffix}"
        publish(made, path)
        (self.folder / f"{key}.failed").unlink(missing_ok=True)
        for other in self.folder.glob("*-*.*"):
            with suppress(FileNotFoundError):
                if time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                    other.unlink()
        return path

    def remember_failure(self, key: str, compiler: str, why: str) -> None:
        """Keep the reason, so that the next process does not try the same."""
        (self.folder / f"{key}.failed").write_text(json.dumps({"compiler": compiler, "why": why}), "utf-8")

    def failure(self, key: str, compiler: str) -> str | None:
        """Why compiling failed within the last day, with this compiler."""
        path = self.folder / f"{key}.failed"
        try:
            old = time.time() - path.stat().st_mtime > _DAY_SECONDS
            noted = json.loads(path.read_text("utf-8"))
            return None if old or noted["compiler"] != compiler else str(noted["why"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _make(self) -> None:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ArtifactFolderError(str(self.folder), error.strerror or str(error)) from error
        self._check(self.folder, self.folder.lstat(), stat.S_ISDIR, "a folder")

    def _sha256(self, path: Path) -> str:
        try:
            with os.fdopen(os.open(path, _READ_FLAGS), "rb") as file:
                self._check(path, os.fstat(file.fileno()), stat.S_ISREG, "a file")
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ArtifactFolderError(str(path), error.strerror or str(error)) from error

    def _check(self, path: Path, found: os.stat_result, is_kind: Callable[[int], bool], kind: str) -> None:
        if not is_kind(found.st_mode):
            raise ArtifactFolderError(str(path), f"it is not {kind}")
        if found.st_uid != os.geteuid():
            raise ArtifactFolderError(str(path), f"it belongs to the user with number {found.st_uid}")
        if found.st_mode & _OTHERS_MAY_WRITE:
            raise ArtifactFolderError(str(path), f"others may write to it (mode {stat.S_IMODE(found.st_mode):o})")
