"""From rows to local files that may be read; downloads run ahead, so that decoding does not wait for the network.

A row's address comes from a table that others write, so it is never trusted. Links are followed first and judged by
where they end; servers and buckets must be on a list, and what they send goes through a bounded cache.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import ssl
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import tenacity

from extraction_dagster.errors.catalog import FetchSetupError, FileForbiddenError, FileUnavailableError, SchemeError
from extraction_dagster.stages.catalog.fetch.buckets import BucketDownload
from extraction_dagster.stages.catalog.fetch.cache import (
    OVERHEAD_BYTES,
    CacheEntry,
    Deadline,
    DownloadCache,
    PassingFaultError,
)
from extraction_dagster.stages.catalog.fetch.guard import NetworkGuard, resolve_host
from extraction_dagster.stages.catalog.fetch.https import HttpsDownload

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from extraction_dagster.records import VideoRow
    from extraction_dagster.settings import Settings

_REMOTE = frozenset({"https", "http", "s3", "gs"})
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}")
_LONGEST_WAIT_SECONDS = 30.0
_MAX_IDLE_SECONDS = 7 * 86_400.0
_POLL_SECONDS = 0.05
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FILE_TYPES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def fetch_local(row: VideoRow, roots: Sequence[Path]) -> Path:
    """The local file behind a row.

    Args:
        row: Its `uri` is a path or a `file://` URI; a relative path is taken from the first root.
        roots: Folders from which files may be read.

    Returns:
        Path: absolute, without links, inside one of the roots; a readable regular file with content.

    Raises:
        SchemeError: The address has another scheme.
        FileForbiddenError: The address leads out of the roots, or to what is no regular file.
        FileUnavailableError: The file is missing, empty or unreadable now.
    """
    allowed = ", ".join(str(root) for root in roots)
    resolved = _resolve(row.uri, roots, allowed)
    try:
        status = resolved.stat()
    except OSError as error:
        raise FileUnavailableError(row.uri, error.strerror or type(error).__name__) from error
    if not stat.S_ISREG(status.st_mode):
        found = _FILE_TYPES.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise FileForbiddenError(row.uri, f"it is {found}", roots=allowed)
    if status.st_size == 0:
        raise FileUnavailableError(row.uri, "it is empty")
    if not os.access(resolved, os.R_OK):
        raise FileUnavailableError(row.uri, "permission denied")
    return resolved


def _resolve(uri: str, roots: Sequence[Path], allowed: str) -> Path:
    if not uri:
        raise FileUnavailableError(uri, "the address is empty")
    path = _path_of(uri, allowed)
    if "\0" in path:
        raise FileForbiddenError(uri, "it holds a NUL byte", roots=allowed)
    if ".." in Path(path).parts:
        raise FileForbiddenError(uri, "it holds '..'", roots=allowed)
    try:
        resolved = (roots[0] / path).resolve()
        inside = any(resolved.is_relative_to(root.resolve()) for root in roots)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is too long or no text
        raise FileForbiddenError(uri, str(error), roots=allowed) from error
    if not inside:
        raise FileForbiddenError(uri, "it leads out of the folders that may be read", roots=allowed)
    return resolved


def _path_of(uri: str, allowed: str) -> str:
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return uri
    if scheme[1].lower() != "file":
        raise SchemeError(uri, scheme[1])
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise FileForbiddenError(uri, str(error), roots=allowed) from error
    if parts.netloc not in {"", "localhost"}:
        raise FileForbiddenError(uri, f"it names another machine ({parts.netloc!r})", roots=allowed)
    return unquote(parts.path)


class Fetcher:
    """Gives the local file of any row: at once where it is local, through the cache where it is not.

    Several threads may use it. A downloaded file stays until it is released; then the cache may remove it.

    Args:
        settings: Roots, hosts, buckets, limits.
        resolve: Gives the numeric addresses of a host; they are judged all the same.
        tls: Makes what certificates are checked with.
        attempts: Tries of one download before its record fails.
        stall_seconds: A connection that is silent for so long is given up and tried again.
        wait_seconds: Longest wait before the second try; doubles at each further one.

    Raises:
        FetchExtraMissingError: A bucket is on the list whose package is not installed.
    """

    def __init__(  # noqa: PLR0913 - what a test replaces, each by name
        self,
        settings: Settings,
        *,
        resolve: Callable[[str, int], Sequence[str]] = resolve_host,
        tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
        attempts: int = 4,
        stall_seconds: float = 30.0,
        wait_seconds: float = 0.5,
    ) -> None:
        self._roots = settings.resolved_allowed_roots
        self._timeout_seconds, self._attempts = settings.fetch_timeout_seconds, attempts
        self._wait_seconds = wait_seconds
        self._cache = DownloadCache(
            (settings.home / "cache" / "videos").resolve(),  # no link leads to a file that is decoded
            max_bytes=settings.cache_bytes,
            max_idle_seconds=_MAX_IDLE_SECONDS,
            patience_seconds=settings.fetch_timeout_seconds,
        )
        largest = min(settings.max_file_bytes, settings.cache_bytes - OVERHEAD_BYTES)
        guard = NetworkGuard(
            settings.allowed_hosts,
            networks=settings.allowed_networks,
            allow_http=settings.allow_http,
            resolve=resolve,
        )
        self._https = HttpsDownload(guard, max_file_bytes=largest, stall_seconds=stall_seconds, tls=tls)
        self._buckets = BucketDownload(settings.allowed_buckets, max_file_bytes=largest, stall_seconds=stall_seconds)
        self._entries: dict[int, CacheEntry] = {}
        self._changing = threading.Lock()
        self._stopped = threading.Event()

    @staticmethod
    def is_remote(row: VideoRow) -> bool:
        """Whether a row's file has to be downloaded."""
        scheme = _SCHEME.match(row.uri)
        return scheme is not None and scheme[1].lower() in _REMOTE

    def fetch(self, row: VideoRow) -> Path:
        """The local file of a row.

        Raises:
            FetchSetupError: Nothing can be fetched as things are set up here; no row is to blame.
            ExtractionError: The row's file can't be had; `permanent` says whether for good.
        """
        if not self.is_remote(row):
            return fetch_local(row, self._roots)
        deadline = Deadline(row.uri, self._timeout_seconds, self._stopped)
        deadline.remaining(0.0)
        key = hashlib.sha256(f"{row.record_id}\0{row.content_version}\0{row.uri}".encode("utf-8", "surrogatepass"))
        ending = Path(re.split(r"[?#]", row.uri, maxsplit=1)[0]).suffix
        suffix = ending if _SUFFIX.fullmatch(ending) else ""  # a hint for a person who looks into the cache
        entry = self._cache.entry(key.hexdigest()[:32], suffix=suffix, deadline=deadline)
        try:
            self._download(row.uri, entry, deadline)
            with self._changing:
                deadline.remaining(0.0)
                self._entries[row.record_id] = entry
        except BaseException:
            entry.release()
            raise
        return entry.path

    def release(self, record_id: int, *, keep: bool) -> None:
        """A row's file is not needed any more; it stays in the cache if `keep` says so, else it is removed."""
        with self._changing:
            entry = self._entries.pop(record_id, None)
        if entry is not None:
            if not keep:
                entry.discard()
            entry.release()

    def close(self) -> None:
        """Stop what is under way and release every file."""
        self._stopped.set()
        with self._changing:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            entry.release()

    def _download(self, uri: str, entry: CacheEntry, deadline: Deadline) -> None:
        try_once = (self._https if uri[:4].lower() == "http" else self._buckets).try_once
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=self._wait,
            retry=tenacity.retry_if_exception_type(PassingFaultError),
            sleep=deadline.sleep,
            reraise=True,
        )
        try:
            retrying(try_once, uri, entry, deadline)
        except PassingFaultError as error:
            raise FileUnavailableError(uri, f"{error}, in {self._attempts} tries") from None

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Full jitter, or longer where the server asks for it."""
        fault = state.outcome.exception() if state.outcome is not None else None
        asked = fault.wait_seconds if isinstance(fault, PassingFaultError) else 0.0
        jitter = tenacity.wait_random_exponential(multiplier=self._wait_seconds, max=_LONGEST_WAIT_SECONDS)
        return max(asked, jitter(state))


@dataclass(frozen=True, slots=True)
class Fetched:
    """A row with its local file, or with the reason why it has none."""

    row: VideoRow
    path: Path | None = None
    error: BaseException | None = None


def fetch_ahead(rows: Iterable[VideoRow], fetcher: Fetcher, *, threads: int) -> Generator[Fetched | None, None, None]:
    """Fetch rows: local ones as they come, the others several at a time, in the order in which they are ready.

    Args:
        rows: Drawn only as far as downloads are under way.
        fetcher: Fetches one row. Closed when this ends early; else by the caller, who still needs the last files.
        threads: Most downloads that are under way, or ready and not yet taken.

    Yields:
        Fetched: a row that is ready; or None, a moment after it was asked for, while none is.

    Raises:
        FetchSetupError: Nothing can be fetched as things are set up here.
    """
    downloads = _Downloads(fetcher)
    source = iter(rows)
    more = True
    try:
        while more or downloads.pending:
            if more and downloads.pending < threads:
                row = next(source, None)
                more = row is not None
                if row is not None and fetcher.is_remote(row):
                    downloads.start(row)
                elif row is not None:
                    yield _checked(_try(fetcher, row))
                continue
            yield downloads.take()
    except BaseException:
        fetcher.close()  # ends what is under way
        raise
    finally:
        downloads.stop()


class _Downloads:
    """The threads, what they are asked for and what they have done."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._todo: queue.SimpleQueue[VideoRow | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Fetched] = queue.SimpleQueue()
        self._threads = 0
        self.pending = 0

    def start(self, row: VideoRow) -> None:
        self.pending += 1
        self._todo.put(row)
        if self._threads < self.pending:
            self._threads += 1
            # A daemon: an interpreter that ends does not wait for a silent server.
            threading.Thread(target=self._serve, name=f"fetch-{self._threads}", daemon=True).start()

    def take(self) -> Fetched | None:
        try:
            done = self._done.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return None
        self.pending -= 1
        return _checked(done)

    def stop(self) -> None:
        for _ in range(self._threads):
            self._todo.put(None)

    def _serve(self) -> None:
        while (row := self._todo.get()) is not None:
            self._done.put(_try(self._fetcher, row))


def _try(fetcher: Fetcher, row: VideoRow) -> Fetched:
    try:
        return Fetched(row, fetcher.fetch(row))
    except BaseException as error:  # noqa: BLE001 - a thread can raise to nobody: `_checked` does, where rows are drawn
        return Fetched(row, error=error)


def _checked(fetched: Fetched) -> Fetched:
    """Raise what is no row's fault; any other error that a row's address provokes is that row's failure."""
    error = fetched.error
    if error is not None and (isinstance(error, FetchSetupError | MemoryError) or not isinstance(error, Exception)):
        raise error
    return fetched
