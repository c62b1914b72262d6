"""A bounded folder of downloads that several processes share, and what every way of downloading into it has in common.

    <key>.lock        held by the process that downloads or uses it; its time is that of the last use
    <key>.json        which version of the file the other two hold
    <key>.….part      what has arrived so far; nobody can foresee its name, which the note above says
    <key>.video.mp4   all of it

A download reserves its room before its first byte, so that the folder never exceeds its limit; where nobody says how
much will come, some, and twice as much each time that this is full. Room is made by removing the entries that were
unused for longest; an entry in use is locked and stays. What a killed process leaves is a part to go on from.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from extraction_dagster.errors import ExtractionError
from extraction_dagster.errors.catalog import DownloadCacheError, DownloadTimeoutError, FileUnavailableError
from extraction_dagster.files import write_atomically
from extraction_dagster.permissions import make_private_folder

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from pathlib import Path


_LOCK, _RESERVED = "cache.lock", "reserved.json"
_WAIT_SECONDS = 0.1
_TURN_SECONDS = 0.005
_PART_SECONDS = 10.0  # for which a part may wait for room: several could wait for each other's room for ever
_FLAGS = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_FIRST_ROOM_BYTES = 2**26  # of a download whose size nobody says
_PART = re.compile(r"[^/]+\.[0-9a-f]{16}\.part")
# What an entry needs beside the file itself, and the file of reservations.
OVERHEAD_BYTES = 16_384


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


class DownloadCache:
    """The folder, its limit and its reservations; the folder is made when the first entry is.

    Args:
        folder: Where the entries lie.
        max_bytes: What it never exceeds.
        max_idle_seconds: An entry that was unused for longer is removed.
        patience_seconds: How long to wait for room, or for an entry that another process has.
        max_entries: The most entries that are kept: each is looked at when room is made.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        max_idle_seconds: float,
        patience_seconds: float,
        max_entries: int = 10_000,
    ) -> None:
        self.folder, self._max_entries = folder, max_entries
        self._max_bytes, self._max_idle_seconds, self._patience = max_bytes, max_idle_seconds, patience_seconds

    def entry(self, key: str, *, suffix: str, deadline: Deadline) -> CacheEntry:
        """Take an entry; no other process has it until it is released.

        Raises:
            FileUnavailableError: Another process has it for too long.
            DownloadCacheError: The folder can't be used.
        """
        end = time.monotonic() + self._patience
        with self.faults():
            make_private_folder(self.folder)
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
                if (lock := _try_lock(self.folder / f"{other}.lock")) is not None:  # nobody uses it
                    os.close(lock)
                    del reserved[other]
            sizes = {name: max(num_bytes, reserved.get(name, 0)) for name, (num_bytes, _) in held.items()}
            sizes[key] = num_bytes
            total, entries = sum(sizes.values()) + OVERHEAD_BYTES, len(sizes)
            for name in sorted(held.keys() - {key}, key=lambda name: held[name][1]):
                fresh = held[name][1] >= time.time() - self._max_idle_seconds
                if fresh and total <= self._max_bytes and entries <= self._max_entries:
                    break
                if self._remove_unused(name):
                    total, entries = total - sizes[name], entries - 1
            if total <= self._max_bytes:
                reserved[key] = num_bytes
            return total <= self._max_bytes

    def _held(self) -> dict[str, tuple[int, float]]:
        """The bytes that each key holds, and when it was last used."""
        held: dict[str, tuple[int, float]] = {}
        with os.scandir(self.folder) as found:
            for item in found:
                if item.name in {_LOCK, _RESERVED} or item.name.startswith("."):  # a note that is being written
                    continue
                key = item.name.partition(".")[0]
                num_bytes, used_at = held.setdefault(key, (0, 0.0))
                with suppress(FileNotFoundError):
                    status = item.stat(follow_symlinks=False)
                    held[key] = num_bytes + status.st_size, max(used_at, status.st_mtime)
        return held

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
            lock = FileLock(self.folder / _LOCK, mode=0o600)
            try:  # it is held for moments, but its holder may have been stopped meanwhile
                lock.acquire(self._patience, poll_interval=_TURN_SECONDS)
            except Timeout:
                why = "another process has been holding its list all the time"
                raise DownloadCacheError(str(self.folder), why) from None
            try:
                path = self.folder / _RESERVED
                reserved = _read_json(path)
                before = dict(reserved)
                yield reserved
                if reserved != before:
                    _write_json(path, reserved)
            finally:
                lock.release()


class CacheEntry:
    """One file of the cache, locked by this process until `release`.

    Attributes:
        path: Where the whole file lies once it is complete.
        version: Which version the entry holds, all of it or a part; None when it holds nothing.
    """

    def __init__(self, cache: DownloadCache, key: str, suffix: str, lock: int) -> None:
        self._cache, self._key, self._lock = cache, key, lock
        self.path = cache.folder / f"{key}.video{suffix}"
        self._note = cache.folder / f"{key}.json"
        self.version, part = _read_note(self._note)
        self._part = cache.folder / (part or _part_name(key))
        if self.version is None or (part is None and not self.is_complete):
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
        self._part = self._cache.folder / _part_name(self._key)
        with self._cache.faults():
            _write_json(self._note, {**asdict(version), "part": self._part.name})
        self.version = version

    @contextmanager
    def receiving(self, num_bytes: int, deadline: Deadline, *, is_known: bool = True) -> Iterator[_Receiver]:
        """Take what arrives, behind what is there; room is reserved first.

        Args:
            num_bytes: How much there will be in all, or at most.
            deadline: The file's.
            is_known: Whether there will be so much; else room for it is reserved step by step.

        Raises:
            PassingFaultError: There was none for so long that what is there made room for others.
        """

        def reserve(room: int) -> int:
            room = min(room, num_bytes)
            try:
                self._cache.reserve(self._key, room, deadline, has_part=self.num_bytes > 0)
            except PassingFaultError:
                self.discard()
                raise
            return room

        room = reserve(num_bytes if is_known else max(_FIRST_ROOM_BYTES, 2 * self.num_bytes))
        try:
            with self._cache.faults():
                part = os.open(self._part, os.O_WRONLY | os.O_APPEND | _FLAGS, 0o600)
            try:
                yield _Receiver(self._cache, part, self.num_bytes, room, reserve)
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
            for path in (self.path, self._note, *self._cache.folder.glob(f"{self._key}.*part")):
                path.unlink(missing_ok=True)
        self.version = None

    def release(self) -> None:
        """Let others use or remove it."""
        os.close(self._lock)


class _Receiver:
    """An open part, and how much room it has."""

    def __init__(self, cache: DownloadCache, part: int, held: int, room: int, reserve: Callable[[int], int]) -> None:
        self._cache, self._part, self.num_bytes, self._room, self._reserve = cache, part, held, room, reserve

    def append(self, chunk: bytes) -> None:
        """Keep the next bytes."""
        if self.num_bytes + len(chunk) > self._room:
            self._room = self._reserve(2 * self._room)
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


def _read_note(path: Path) -> tuple[FileVersion | None, str | None]:
    """Which version the entry holds, and the name of its part."""
    with suppress(OSError, ValueError, TypeError):
        note = json.loads(path.read_bytes())
        part = note.pop("part", None)
        return FileVersion(**note), part if isinstance(part, str) and _PART.fullmatch(part) else None
    return None, None


def _part_name(key: str) -> str:
    return f"{key}.{secrets.token_hex(8)}.part"


def _write_json(path: Path, content: object) -> None:
    write_atomically(path, json.dumps(content).encode(), durable=False)
