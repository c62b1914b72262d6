"""The folder of the embedded store: who holds it, which collection is in use, what each holds.

Under `qdrant/video_frames/`:

- `lock`: locked by one process, which is named in it.
- `pointer.json`: `{"v": 1, "current": "3f2a…"}`.
- `3f2a…/collection.json`: `{"v": 1, "name": "video_frames", "dim": 1280, "fingerprint": "3f2a…", "source": …}`.
- `3f2a…/shard/`: the engine's files.
- `building-3f2a…/`, `dropped-3f2a…/`: left by a killed process; removed when a collection is created.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any

from extraction_dagster.errors.index import CollectionInUseError, StoreBusyError, StoreEngineError, StoreUnreadableError
from extraction_dagster.files import sync_folder, write_atomically
from extraction_dagster.permissions import make_private_folder
from extraction_dagster.stages.index.protocol import CollectionSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_FORMAT = 1
_POLL_SECONDS = 0.05


@dataclass(slots=True)
class EdgeFiles:
    """The folder of one collection name."""

    folder: Path
    _lock: IO[str] | None = field(default=None, init=False)

    def acquire(self, *, wait_seconds: float = 0.0) -> None:
        """Lock the folder until `release`, or until this process ends, also by kill -9.

        Args:
            wait_seconds: How long to wait while another process has the lock.

        Raises:
            StoreBusyError: Another process, or another store in this one, holds it.
            StoreEngineError: It can't be created or written.
        """
        if self._lock is not None:
            return
        try:
            make_private_folder(self.folder)
            lock = (self.folder / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise StoreEngineError("hold the points", str(self.folder), error.strerror or repr(error)) from error
        give_up = time.monotonic() + wait_seconds
        while not _try_lock(lock):
            if time.monotonic() >= give_up:
                with lock:
                    raise StoreBusyError(str(self.folder), _holder(lock))
            time.sleep(_POLL_SECONDS)
        lock.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        lock.flush()
        self._lock = lock

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    @property
    def current(self) -> str | None:
        """The fingerprint in use, or None."""
        path = self.folder / "pointer.json"
        return str(_read(path, "current")["current"]) if path.exists() else None

    def publish(self, fingerprint: str) -> None:
        """Put a fingerprint in use."""
        _write(self.folder / "pointer.json", {"v": _FORMAT, "current": fingerprint})

    def shard(self, fingerprint: str) -> Path:
        """Where the engine keeps a fingerprint's files."""
        return self.folder / fingerprint / "shard"

    def spec(self, fingerprint: str) -> CollectionSpec:
        """What a fingerprint's collection holds."""
        found = _read(self.folder / fingerprint / "collection.json", "name", "dim", "fingerprint", "vector_dtype")
        known = {item.name for item in fields(CollectionSpec)}
        return CollectionSpec(**{key: value for key, value in found.items() if key in known})

    def exists(self, fingerprint: str) -> bool:
        """Whether a fingerprint's collection was created completely."""
        return fingerprint in self.fingerprints()

    def fingerprints(self) -> list[str]:
        """Every fingerprint that was created; a folder that somebody copied under another name is none."""
        return sorted(path.parent.name for path in self.folder.glob("*/collection.json") if self._is_own(path.parent))

    def _is_own(self, folder: Path) -> bool:
        if folder.name.startswith(("building-", "dropped-")):
            return False
        try:
            return self.spec(folder.name).fingerprint == folder.name
        except StoreUnreadableError:  # said when it is opened
            return True

    def claim(self, fingerprint: str, source: str) -> None:
        """Write down whose points a collection holds."""
        _write(
            self.folder / fingerprint / "collection.json",
            {"v": _FORMAT, **asdict(replace(self.spec(fingerprint), source=source))},
        )

    def create(self, spec: CollectionSpec, build: Callable[[Path], None]) -> None:
        """Create a collection in one step: a process killed meanwhile leaves nothing that looks finished."""
        for leftover in [*self.folder.glob("building-*"), *self.folder.glob("dropped-*")]:
            shutil.rmtree(leftover)
        building = self.folder / f"building-{spec.fingerprint}"
        (building / "shard").mkdir(parents=True)
        build(building / "shard")
        _write(building / "collection.json", {"v": _FORMAT, **asdict(spec)})
        building.rename(self.folder / spec.fingerprint)
        sync_folder(self.folder)

    def drop(self, fingerprint: str) -> None:
        """Remove a collection's files.

        Raises:
            CollectionInUseError: It is the one in use.
        """
        if fingerprint == self.current:
            raise CollectionInUseError(name=f"{self.folder.name}-{fingerprint}", where=str(self.folder))
        dropped = self.folder / f"dropped-{fingerprint}"
        (self.folder / fingerprint).rename(dropped)
        shutil.rmtree(dropped)


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    try:
        found = json.loads(lock.read())
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _read(path: Path, *keys: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreUnreadableError(str(path), str(error)) from error
    if not isinstance(found, dict) or found.get("v") != _FORMAT or not set(keys) <= set(found):
        raise StoreUnreadableError(str(path), f"expected format {_FORMAT} with {', '.join(keys)}, got {found!r:.200}")
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content).encode(), mode=None)
