"""A root of shards on any fsspec path: whose it is, what lies in it, files that are whole or not there.

    <root>/source.json      {"v": 1, "source": "0a1b2c3d4e5f6071", "table": "public.videos"}

The root is one source table's: records are told apart by their ids alone, so that another table's would be taken for
its own. Its first user writes `source.json`, and everybody reads it before anything else of the root.

What a store can't do now (403, 503, EMFILE, ESTALE, a timeout) is the store's error. Only bytes that were read, and
that are not ours, are a file's fault; and only a folder that is not there is empty.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from extraction_dagster import files
from extraction_dagster.addresses import shown_address
from extraction_dagster.errors import one_line
from extraction_dagster.errors.decode import OtherSourceError, ShardStoreError
from extraction_dagster.stages.catalog.identity import source_identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extraction_dagster.settings import Settings

logger = logging.getLogger(__name__)
_SOURCE, _VERSION = "source.json", 1
# Storing an object is atomic there, and a rename would be a copy and a deletion.
_ATOMIC_PUT = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"})
_TEMPORARY = (".*.tmp", ".tmp-*")  # the second: embedding shards of version 0.1.0 and before
_ASIDE = ".damaged-"


@dataclass(frozen=True, slots=True)
class Source:
    """The source table whose data a root holds.

    Attributes:
        identity: `SourceTable.identity`.
        table: Its name, for people.
        claims: Whether a root that is nobody's yet becomes this table's; not for those who only read.
    """

    identity: str
    table: str
    claims: bool = True

    @classmethod
    def for_reading(cls, settings: Settings) -> Source | None:
        """The settings' table, asked of no database; None on a machine whose settings lead to none."""
        if settings.source_url is None and not (settings.home / "source.db").exists():
            return None
        table = ".".join(filter(None, (settings.source_schema, settings.source_table)))
        return cls(source_identity(settings), table, claims=False)


class Place:
    """A root, and the calls to its file system.

    A store that can't be reached is an error in one sentence, `FrameStoreError` or `EmbeddingStoreError`, whatever is
    asked of it. Only a local disk that takes no file speaks for itself, by an OSError.

    Args:
        root_uri: Any fsspec path: a folder, `s3://bucket/frames`.
        folder: A folder under it, which holds the shards.
        source: Whose data it must hold; None for anybody's.

    Attributes:
        shown_root: The root, without what must not be shown.
    """

    store_error: ClassVar[type[ShardStoreError]]

    def __init__(self, root_uri: str, folder: str, *, source: Source | None = None) -> None:
        self._fs, root = fsspec.core.url_to_fs(root_uri)
        self._root, self._root_uri, self._source = root.rstrip("/"), root_uri, source
        self._folder = f"{self._root}/{folder}"
        self.shown_root = shown_address(root_uri.rstrip("/"))
        self._shown = f"{self.shown_root}/{folder}"
        self._is_allowed = source is None
        self._is_claimed = source is None

    def require_source(self) -> None:
        """See that the root is of the store's source, once; with shards and without an owner it becomes so.

        Raises:
            OtherSourceError: It is another's.
        """
        if self._is_allowed or self._source is None:
            return
        owner = self._owner()
        if owner is None and self._source.claims and self._holds_shards():
            logger.warning(
                "The %s in %s say nothing of their source: from now on they are those of table %r.",
                self.store_error.what,
                self.shown_root,
                self._source.table,
            )
            owner = self._claim(self._source)
        self._refuse_another(owner)
        self._is_allowed, self._is_claimed = True, owner is not None

    def take_over(self) -> None:
        """Let what a source that moved has stored under its earlier marks be of its present one; safe to repeat."""
        owner = self._owner()
        if owner is None or self._source is None or str(owner.identity) == str(self._source.identity):
            return
        self._refuse_another(owner)
        self._is_allowed = self._is_claimed = True
        self._write_whole(f"{self._root}/{_SOURCE}", _source_file(self._source))

    def _claim_before_writing(self) -> None:
        self.require_source()
        if not self._is_claimed and self._source is not None:
            self._refuse_another(self._claim(self._source))
            self._is_claimed = True

    def _refuse_another(self, owner: Source | None) -> None:
        if owner is not None and self._source is not None and owner.identity != self._source.identity:
            raise OtherSourceError(
                self.store_error.what,
                self.shown_root,
                whose=f"table {owner.table!r}{' of another database' if owner.table == self._source.table else ''}",
                mine=f"table {self._source.table!r}",
                setting=self.store_error.setting,
            )

    def _owner(self) -> Source | None:
        """Whose the root is; None when nobody has said so yet."""
        try:
            with self._reaching():
                content = self._fs.cat_file(f"{self._root}/{_SOURCE}")
        except FileNotFoundError:
            return None
        try:
            said = json.loads(content)
            return {_VERSION: Source(str(said["source"]), str(said["table"]))}[said["v"]]
        except (ValueError, KeyError, TypeError) as error:
            raise OtherSourceError(
                self.store_error.what,
                self.shown_root,
                whose=f"whoever wrote {_SOURCE} there, which this release can't read ({one_line(str(error))})",
                mine="a table that it names",
                setting=self.store_error.setting,
            ) from error

    def _claim(self, source: Source) -> Source | None:
        """Write whose the root is, unless somebody has; of several at once one is the first. Returns its owner."""
        path = f"{self._root}/{_SOURCE}"
        content = _source_file(source)
        if isinstance(self._fs, LocalFileSystem):
            Path(self._root).mkdir(parents=True, exist_ok=True)
            files.create_atomically(Path(path), content)
        else:
            with self._reaching(writing=True):
                self._create(path, content)
        return self._owner()

    def _create(self, path: str, content: bytes) -> None:
        if self._puts_atomically():
            try:
                self._fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return
            except Exception:  # noqa: BLE001 - a store that knows no such condition; one that is down says so below
                if not self._fs.exists(path):
                    self._fs.pipe_file(path, content)
        elif not self._fs.exists(path):
            self._write_beside(path, content)

    def _holds_shards(self) -> bool:
        return any(entry["type"] == "directory" for entry in self._entries(self._root))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[IO[bytes]]:
        """Open a shard's file, to read it or single columns of it; what is wrong with its bytes is the caller's.

        Raises:
            FileNotFoundError: It is gone.
        """
        self.require_source()
        with contextlib.ExitStack() as stack:
            with self._reaching():
                file = _Watched(stack.enter_context(self._fs.open(path, "rb")))
            try:
                yield cast("IO[bytes]", file)
            except Exception:
                if file.fault is not None:  # Arrow may have made another error of it
                    with self._reaching():
                        raise file.fault from None
                raise

    def _sweep(self, folder: str) -> None:
        if isinstance(self._fs, LocalFileSystem):
            for pattern in _TEMPORARY:
                files.sweep(Path(folder), pattern)
            files.sweep(Path(self._root), f".{_SOURCE}.*.tmp")
        elif not self._puts_atomically():
            for entry in self._entries(folder):
                if any(Path(entry["name"]).match(pattern) for pattern in _TEMPORARY):
                    self._remove_abandoned(entry["name"])

    def _write_whole(self, path: str, content: bytes) -> None:
        """Write a file so that it is seen whole or not at all, also after a crash."""
        self._claim_before_writing()
        self._sweep(path.rpartition("/")[0])
        if isinstance(self._fs, LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(Path(path), content, mode=None)
            return
        with self._reaching(writing=True):
            if self._puts_atomically():
                self._fs.pipe_file(path, content)
            else:
                self._write_beside(path, content)

    def _write_beside(self, path: str, content: bytes) -> None:
        folder, _, name = path.rpartition("/")
        beside = f"{folder}/{files.temporary_name(name)}"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            self._fs.pipe_file(beside, content)
            self._fs.mv(beside, path)
        except BaseException:
            if self._fs.exists(beside):
                self._fs.rm_file(beside)
            raise

    def _rename_aside(self, path: str) -> str:
        """Give a file a name that is never read as a shard. Returns the new path; "" when the file is gone."""
        folder, _, name = path.rpartition("/")
        aside = f"{folder}/{_ASIDE}{name}"
        with contextlib.suppress(FileNotFoundError), self._reaching():
            if isinstance(self._fs, LocalFileSystem):
                os.replace(path, aside)  # noqa: PTH105 - the paths are the store's, as texts
            else:
                self._fs.mv(path, aside)
            return aside
        return ""

    def _remove_empty(self, folder: str) -> None:
        """Remove a folder with nothing in it; only a disk has such."""
        if isinstance(self._fs, LocalFileSystem):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()

    def _puts_atomically(self) -> bool:
        protocol = self._fs.protocol
        return not _ATOMIC_PUT.isdisjoint({protocol} if isinstance(protocol, str) else protocol)

    def _entries(self, folder: str) -> list[dict[str, Any]]:
        """What lies in a folder now, whatever other processes did to it; nothing when there is none.

        Raises:
            ShardStoreError: The root, which is there by what its `source.json` said, is gone with it.
        """
        return self._listed(folder, detail=True)

    def _names(self, folder: str) -> list[str]:
        """The same by name alone: a disk with 100,000 ranges tells their names in a tenth of a second."""
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in self._listed(folder, detail=False)]

    def _listed(self, folder: str, *, detail: bool) -> list[Any]:
        self._fs.invalidate_cache(folder)
        try:
            with self._reaching():
                found: list[Any] = self._fs.ls(folder, detail=detail)
        except FileNotFoundError:
            # A disk that was unmounted meanwhile has no folders either.
            was_there = self._is_claimed and self._source is not None and isinstance(self._fs, LocalFileSystem)
            if was_there and not Path(self._root, _SOURCE).exists():
                raise self.store_error(self._shown, f"{_SOURCE}, which was there, is gone") from None
            return []
        return found

    @contextlib.contextmanager
    def _reaching(self, *, writing: bool = False) -> Iterator[None]:
        """Make the store's error of whatever a call to the file system raises, but for a file that is not there."""
        try:
            yield
        except Exception as error:
            code = _code(error)
            no_file = isinstance(error, FileNotFoundError | IsADirectoryError)
            is_missing = no_file and code != "NoSuchBucket" and not writing
            if is_missing or isinstance(error, ShardStoreError):
                raise
            # A store's own words may repeat the request, with what it was signed by: only their type is shown then.
            why = code or (error.strerror if isinstance(error, OSError) else None)
            raise self.store_error(self._shown, why or type(error).__name__) from None

    def _remove_abandoned(self, path: str) -> None:
        """Remove a temporary file whose writer, on whatever machine, has written nothing to it for an hour."""
        # Not every file system knows when a file changed; another process may sweep too.
        with contextlib.suppress(FileNotFoundError, NotImplementedError, RuntimeError):
            changed = self._fs.modified(path).timestamp()
            if time.time() - changed > files.ABANDONED_SECONDS:
                logger.warning("Removing %s, which a killed process left behind.", path)
                with self._reaching():
                    self._fs.rm_file(path)


def _source_file(source: Source) -> bytes:
    return json.dumps({"v": _VERSION, "source": str(source.identity), "table": source.table}).encode()


class _Watched:
    """A file whose first failing read is kept: what parses it may hide whether the store failed or the bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.fault: Exception | None = None

    def read(self, *size: int) -> bytes:
        try:
            return self._file.read(*size)
        except Exception as error:
            self.fault = self.fault or error
            raise

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the file has
        return getattr(self._file, name)


def _code(error: BaseException) -> str:
    """The store's own code for what is wrong: `SlowDown`, `NoSuchBucket`; empty when it gave none."""
    response = getattr(error.__cause__ or error, "response", None)
    said = response.get("Error") if isinstance(response, dict) else None
    return str(said.get("Code") or "") if isinstance(said, dict) else ""
