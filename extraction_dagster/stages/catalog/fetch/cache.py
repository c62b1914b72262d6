"""A bounded folder of downloads that several processes share.

    <key>.lock        held by the process that downloads or uses it; its time is that of the last use
    <key>.json        which version of the file the other two hold
    <key>.part        what has arrived so far
    <key>.video.mp4   all of it

A download reserves its room before its first byte, so that the folder never exceeds its limit. Room is made by removing
the entries that were unused for longest; an entry in use is locked and stays. A process that dies here leaves nothing
worse than a part to go on from, and its locks end with it.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from extraction_dagster.errors.catalog import DownloadCacheError, FileUnavailableError
from extraction_dagster.files import write_atomically
from extraction_dagster.stages.catalog.fetch.download import FileVersion, PassingFaultError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from extraction_dagster.stages.catalog.fetch.download import Deadline

_LOCK, _RESERVED = "cache.lock", "reserved.json"
_WAIT_SECONDS = 0.1
_TURN_SECONDS = 0.005
_PART_SECONDS = 10.0  # for which a part may wait for room: several could wait for each other's room for ever
_FLAGS = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
# What an entry needs beside the file itself, and the file of reservations.
OVERHEAD_BYTES = 16_384


@dataclass(slots=True)
class _Held:
    """What the folder holds of one key."""

    num_bytes: int = 0
    used_at: float = 0.0


class DownloadCache:
    """The folder, its limit and its reservations; the folder is made when the first entry is.

    Args:
        folder: Where the entries lie.
        max_bytes: What it never exceeds.
        max_idle_seconds: An entry that was unused for longer is removed.
        patience_seconds: How long to wait for room, or for an entry that another process has.
    """

    def __init__(self, folder: Path, *, max_bytes: int, max_idle_seconds: float, patience_seconds: float) -> None:
        self.folder = folder
        self._max_bytes, self._max_idle_seconds, self._patience = max_bytes, max_idle_seconds, patience_seconds

    def entry(self, key: str, *, suffix: str, deadline: Deadline) -> CacheEntry:
        """Take an entry; no other process has it until it is released.

        Raises:
            FileUnavailableError: Another process has it for too long.
            DownloadCacheError: The folder can't be used.
        """
        end = time.monotonic() + self._patience
        with self.faults():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            while (lock := _try_lock(self.folder / f"{key}.lock")) is None:
                if time.monotonic() >= end:
                    raise FileUnavailableError(deadline.uri, "another process has been using it all the time")
                deadline.pause(_WAIT_SECONDS)
            os.utime(lock)
        return CacheEntry(self, key, suffix, lock)

    def reserve(self, key: str, num_bytes: int, deadline: Deadline, *, has_part: bool = False) -> None:
        """Wait until there is room for a file of that size in place of what the entry holds.

        Raises:
            PassingFaultError: It has a part, which takes the room that others wait for, as theirs may take its own.
            DownloadCacheError: Everything in the folder has been in use for too long.
        """
        began = time.monotonic()
        end, give_way = began + self._patience, began + min(_PART_SECONDS, self._patience / 2)
        while not self._try_reserve(key, num_bytes):
            if has_part and time.monotonic() >= give_way:
                raise PassingFaultError("what had arrived of it made room for others")
            if time.monotonic() >= end:
                why = f"{num_bytes} bytes more do not fit into {self._max_bytes} while all that it holds is in use"
                raise DownloadCacheError(str(self.folder), why)
            deadline.pause(_WAIT_SECONDS)

    def unreserve(self, key: str) -> None:
        """Give up the room that was reserved and not used."""
        with self._alone() as reserved:
            reserved.pop(key, None)

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Have the disk's faults blamed on the cache, never on a record."""
        try:
            yield
        except OSError as error:
            raise DownloadCacheError(str(self.folder), error.strerror or type(error).__name__) from error

    def _try_reserve(self, key: str, num_bytes: int) -> bool:
        with self._alone() as reserved:
            held = self._held()
            for other in reserved.keys() - {key}:
                if self._is_unused(other):
                    del reserved[other]
            sizes = {name: max(entry.num_bytes, reserved.get(name, 0)) for name, entry in held.items()}
            sizes[key] = num_bytes
            total = sum(sizes.values()) + OVERHEAD_BYTES
            for name in sorted(held.keys() - {key}, key=lambda name: held[name].used_at):
                fresh = held[name].used_at >= time.time() - self._max_idle_seconds
                if fresh and total <= self._max_bytes:
                    break
                if self._remove_unused(name):
                    total -= sizes[name]
            if total <= self._max_bytes:
                reserved[key] = num_bytes
            return total <= self._max_bytes

    def _held(self) -> dict[str, _Held]:
        held: dict[str, _Held] = {}
        with os.scandir(self.folder) as found:
            for item in found:
                if item.name in {_LOCK, _RESERVED} or item.name.startswith("."):  # a note that is being written
                    continue
                entry = held.setdefault(item.name.partition(".")[0], _Held())
                with suppress(FileNotFoundError):
                    status = item.stat(follow_symlinks=False)
                    entry.num_bytes += status.st_size
                    entry.used_at = max(entry.used_at, status.st_mtime)
        return held

    def _is_unused(self, key: str) -> bool:
        lock = _try_lock(self.folder / f"{key}.lock")
        if lock is not None:
            os.close(lock)
        return lock is not None

    def _remove_unused(self, key: str) -> bool:
        lock = _try_lock(self.folder / f"{key}.lock")
        if lock is None:
            return False
        for path in (*self.folder.glob(f"{key}.[!l]*"), *self.folder.glob(f".{key}.*"), self.folder / f"{key}.lock"):
            path.unlink(missing_ok=True)
        os.close(lock)
        return True

    @contextmanager
    def _alone(self) -> Iterator[dict[str, int]]:
        """The reservations, for one process at a time; what is left of them is kept."""
        with self.faults():
            lock = os.open(self.folder / _LOCK, os.O_RDWR | _FLAGS, 0o600)
            try:
                self._wait_for(lock)
                path = self.folder / _RESERVED
                reserved = _read_json(path)
                before = dict(reserved)
                yield reserved
                if reserved != before:
                    _write_json(path, reserved)
            finally:
                os.close(lock)

    def _wait_for(self, lock: int) -> None:
        """Wait for a lock that is held for moments, but not for ever: its holder may have been stopped meanwhile."""
        end = time.monotonic() + self._patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    why = "another process has been holding its list all the time"
                    raise DownloadCacheError(str(self.folder), why) from None
                time.sleep(_TURN_SECONDS)
            else:
                return


class CacheEntry:
    """One file of the cache, locked by this process until `release`.

    Attributes:
        path: Where the whole file lies once it is complete.
        version: Which version the entry holds, all of it or a part; None when it holds nothing.
    """

    def __init__(self, cache: DownloadCache, key: str, suffix: str, lock: int) -> None:
        self._cache, self._key, self._lock = cache, key, lock
        self.path = cache.folder / f"{key}.video{suffix}"
        self._part = cache.folder / f"{key}.part"
        self._note = cache.folder / f"{key}.json"
        self.version = _read_version(self._note)
        if self.version is None:
            self.discard()

    @property
    def is_complete(self) -> bool:
        """Whether all of the file is there."""
        return self.path.exists()

    @property
    def num_bytes(self) -> int:
        """How much has arrived."""
        with suppress(FileNotFoundError):
            return (self.path if self.is_complete else self._part).stat().st_size
        return 0

    def begin(self, version: FileVersion) -> None:
        """Forget what is there and start with a version of the file."""
        self.discard()
        with self._cache.faults():
            _write_json(self._note, asdict(version))
        self.version = version

    @contextmanager
    def receiving(self, num_bytes: int, deadline: Deadline) -> Iterator[_Receiver]:
        """Take what arrives, behind what is there; room for `num_bytes` in all is reserved first.

        Raises:
            PassingFaultError: There was none for so long that what is there made room for others.
        """
        try:
            self._cache.reserve(self._key, num_bytes, deadline, has_part=self.num_bytes > 0)
        except PassingFaultError:
            self.discard()
            raise
        try:
            with self._cache.faults():
                part = os.open(self._part, os.O_WRONLY | os.O_APPEND | _FLAGS, 0o600)
            try:
                yield _Receiver(self._cache, part, self.num_bytes)
            finally:
                os.close(part)
        finally:
            self._cache.unreserve(self._key)

    def complete(self) -> None:
        """All has arrived: the part becomes the file in one step."""
        with self._cache.faults():
            self._part.replace(self.path)

    def discard(self) -> None:
        """Remove what is there."""
        with self._cache.faults():
            for path in (self.path, self._part, self._note):
                path.unlink(missing_ok=True)
        self.version = None

    def release(self) -> None:
        """Let others use or remove it."""
        os.close(self._lock)


class _Receiver:
    """An open part."""

    def __init__(self, cache: DownloadCache, part: int, num_bytes: int) -> None:
        self._cache, self._part, self.num_bytes = cache, part, num_bytes

    def append(self, chunk: bytes) -> None:
        """Keep the next bytes."""
        left = memoryview(chunk)
        with self._cache.faults():
            while left:
                left = left[os.write(self._part, left) :]
        self.num_bytes += len(chunk)


def _try_lock(path: Path) -> int | None:
    """An open, locked file; None while another has it. A file that was removed in between locks nothing."""
    while True:
        lock = os.open(path, os.O_RDWR | _FLAGS, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:
            pass
        os.close(lock)


def _read_json(path: Path) -> dict[str, int]:
    with suppress(FileNotFoundError, ValueError):
        read = json.loads(path.read_bytes())
        if isinstance(read, dict):
            return {key: size for key, size in read.items() if isinstance(size, int)}
    return {}


def _read_version(path: Path) -> FileVersion | None:
    with suppress(OSError, ValueError, TypeError):
        return FileVersion(**json.loads(path.read_bytes()))
    return None


def _write_json(path: Path, content: object) -> None:
    write_atomically(path, json.dumps(content).encode(), durable=False)
