"""Shards on any fsspec path: Parquet files under the fingerprint they were made with, one store for both kinds.

    <root>/<fingerprint>/<partition key>/20260102T030405000006Z-0a1b2c3d4e5f.parquet      a shard
    <root>/<fingerprint>/<partition key>/.20260102T03….tmp                                being written; never read

A shard appears whole or not at all. Its footer says what it holds, so that a listing reads footers only; a file without
that footer (torn, foreign, of another range) is no shard. Its name says when it was written, here on 2 January 2026 at
03:04:05.000006 UTC, and ends in twelve digits: a later name holds what is newer. `compaction` merges small ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import secrets
import struct
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from extraction_dagster import files
from extraction_dagster.addresses import shown_address
from extraction_dagster.errors import PartitionKeyError
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.fetch.buckets import STORE_PACKAGES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import pyarrow as pa
    import pyarrow.parquet as pq

    from extraction_dagster.errors.decode import ShardStoreError

logger = logging.getLogger(__name__)
_SUFFIX = ".parquet"
_TIME, _TICK = "%Y%m%dT%H%M%S%f", timedelta(microseconds=1)
_MAGIC = b"PAR1"
_TAIL_BYTES = 64 * 1024
# Storing an object is atomic there, and a rename would be a copy and a deletion.
_ATOMIC_PUT = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"})
_TEMPORARY = (".*.tmp", ".tmp-*")  # the second: embedding shards of version 0.1.0 and before


def new_name() -> str:
    """The name of a shard that is written now."""
    return _name(datetime.now(UTC), secrets.token_hex(6))


def merged_name(names: Sequence[str]) -> str:
    """The name of the shard that takes the place of some: just after the last of them, the same in every process."""
    return _name(written_at(max(names)) + _TICK, hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:12])


def written_at(name: str) -> datetime:
    """When a shard was written.

    Raises:
        ValueError: It has no such name.
    """
    return datetime.strptime(name.partition("Z-")[0], _TIME).replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A record of a shard: of which version, and how many frames or vectors.

    Attributes:
        record_id: The row's id.
        content_version: Of what was decoded.
        num_frames: Frames or vectors.
        address: 16 hex digits of the file's resolved address; empty in shards of earlier releases.
        claim: The number under which the row was planned; a record's newest copy has the greatest.
    """

    record_id: int
    content_version: str
    num_frames: int
    address: str = field(default="", kw_only=True)
    claim: int = field(default=0, kw_only=True)


@dataclass(frozen=True, slots=True)
class Shard:
    """A file, as its footer describes it.

    Attributes:
        name: Its file name; later names hold what is newer.
        path: Where it lies, on the store's file system.
        size_bytes: Of what it holds: JPEGs, or vectors uncompressed.
        records: In the order in which they are stored.
    """

    name: str
    path: str
    size_bytes: int
    records: tuple[ShardRecord, ...]

    @property
    def num_frames(self) -> int:
        """Frames, or vectors, of all records."""
        return sum(record.num_frames for record in self.records)


S = TypeVar("S", bound=Shard)


class ShardStore(ABC, Generic[S]):
    """The shards of one kind that were made under one fingerprint; nothing is created before the first is written.

    A store that can't be reached is an error in one sentence, `FrameStoreError` or `EmbeddingStoreError`, whatever is
    asked of it. A local disk speaks for itself, by an OSError.

    Args:
        root_uri: Any fsspec path: a folder, `s3://bucket/frames`.
        fingerprint: Names everything that the shards' content depends on.
    """

    kind: ClassVar[str]
    footer_key: ClassVar[bytes]
    parquet_options: ClassVar[Mapping[str, object]]
    store_error: ClassVar[type[ShardStoreError]]

    def __init__(self, root_uri: str, fingerprint: str) -> None:
        self._fs, root = fsspec.core.url_to_fs(root_uri)
        self._folder = f"{root.rstrip('/')}/{fingerprint}"
        self._shown = shown_address(f"{root_uri.rstrip('/')}/{fingerprint}")
        self.fingerprint = fingerprint

    @abstractmethod
    def merge(self, partition: IdRange, parts: Sequence[tuple[S, Collection[int]]], name: str) -> None:
        """Write one shard with some records of several.

        Args:
            partition: The range of all of them.
            parts: Each shard with the records that are taken from it.
            name: Of the new shard.

        Raises:
            ShardError: A shard is gone or damaged; nothing was written.
        """

    @abstractmethod
    def _described(self, footer: dict[str, Any], path: str, partition: IdRange, size_bytes: int) -> S:
        """The shard that a footer describes; ValueError, KeyError or TypeError when it describes none of this store."""

    def shards(self, partition: IdRange) -> list[S]:
        """The range's shards by name, oldest first; a file that is no whole shard is warned about and left out."""
        found = [
            self._look_at(entry["name"], partition, entry.get("size") or 0)
            for entry in self._entries(f"{self._folder}/{partition.partition_key}")
            if entry["type"] != "directory" and not _file_name(entry["name"]).startswith(".")
        ]
        return sorted((shard for shard in found if shard is not None), key=lambda shard: shard.name)

    def partitions(self) -> list[IdRange]:
        """The ranges that have a folder, in ascending order; a folder of another name is left out."""
        found = []
        for entry in self._entries(self._folder):
            with contextlib.suppress(PartitionKeyError):
                found.append(IdRange.parse(_file_name(entry["name"])))
        return sorted(found)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[IO[bytes]]:
        """Open a shard's file, to read it or single columns of it."""
        with self._reaching(), self._fs.open(path, "rb") as file:
            yield file

    def remove(self, shard: S) -> None:
        """Remove a shard; nothing happens when it is gone already."""
        with contextlib.suppress(FileNotFoundError), self._reaching():
            self._fs.rm_file(shard.path)

    def sweep(self, partition: IdRange) -> None:
        """Remove temporary files that killed writers left in a range's folder, and none that is being written."""
        folder = f"{self._folder}/{partition.partition_key}"
        if isinstance(self._fs, LocalFileSystem):
            for pattern in _TEMPORARY:
                files.sweep(Path(folder), pattern)
        elif not self._puts_atomically():
            for entry in self._entries(folder):
                if any(Path(entry["name"]).match(pattern) for pattern in _TEMPORARY):
                    self._remove_abandoned(entry["name"])

    def _write(self, partition: IdRange, name: str, table: pa.Table, footer: Mapping[str, object]) -> tuple[str, int]:
        """Write a shard so that it is seen whole or not at all, also after a crash; returns its path and its size."""
        import pyarrow.parquet as pq  # noqa: PLC0415 - 0.3 s that importing the room need not pay

        buffer = io.BytesIO()
        with_footer = table.replace_schema_metadata({self.footer_key: json.dumps(footer)})
        pq.write_table(with_footer, buffer, **self.parquet_options)
        content = buffer.getvalue()
        self.sweep(partition)
        path = f"{self._folder}/{partition.partition_key}/{name.removesuffix(_SUFFIX)}{_SUFFIX}"
        if isinstance(self._fs, LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(Path(path), content, mode=None)
            return path, len(content)
        with self._reaching(writing=True):
            if self._puts_atomically():
                self._fs.pipe_file(path, content)
            else:
                self._write_beside(path, content)
        return path, len(content)

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

    def _puts_atomically(self) -> bool:
        protocol = self._fs.protocol
        return not _ATOMIC_PUT.isdisjoint({protocol} if isinstance(protocol, str) else protocol)

    def _entries(self, folder: str) -> list[dict[str, Any]]:
        """What lies in a folder now, whatever other processes did to it; nothing when there is none."""
        self._fs.invalidate_cache(folder)
        try:
            with self._reaching():
                found: list[dict[str, Any]] = self._fs.ls(folder, detail=True)
        except FileNotFoundError:
            return []
        return found

    def _look_at(self, path: str, partition: IdRange, size_bytes: int) -> S | None:
        import pyarrow as pa  # noqa: PLC0415 - as above

        try:
            return self._read_footer(path, partition, size_bytes)
        except FileNotFoundError:  # removed since it was listed
            return None
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            # A disk that stumbles (EIO, ESTALE, EMFILE …) still holds its shards; Arrow's own OSErrors have no number.
            if isinstance(error, OSError) and error.errno and not isinstance(error, IsADirectoryError):
                raise self.store_error(self._shown, error.strerror or type(error).__name__) from error
            which = f"{self.kind} shard of range {partition}"
            logger.warning("Ignoring %s: it is no whole %s (%s).", path, which, error)
            return None

    def _read_footer(self, path: str, partition: IdRange, size_bytes: int) -> S:
        with self._reaching():
            footer = self._footer(path)
        text = (footer.metadata or {}).get(self.footer_key)
        if text is None:
            raise ValueError("its footer describes none")
        shard = self._described(json.loads(text), path, partition, size_bytes)
        if shard.num_frames != footer.num_rows:
            raise ValueError(f"it has {footer.num_rows} frames, not those that it lists")
        return shard

    def _footer(self, path: str) -> pq.FileMetaData:
        """A file's footer, for one short read: `… | footer | its length, 4 bytes | PAR1`."""
        import pyarrow.parquet as pq  # noqa: PLC0415 - as above

        tail = self._fs.tail(path, _TAIL_BYTES)
        if len(tail) < len(_MAGIC) + 4 or not tail.endswith(_MAGIC):
            raise ValueError("it does not end as a Parquet file does")
        (length,) = struct.unpack("<I", tail[-8:-4])
        whole = tail if length + 8 <= len(tail) else self._fs.tail(path, length + 8)
        return pq.read_metadata(io.BytesIO(whole))

    @contextlib.contextmanager
    def _reaching(self, *, writing: bool = False) -> Iterator[None]:
        """Tell a store that can't be reached from what is wrong with a shard; a disk speaks for itself."""
        try:
            yield
        except Exception as error:
            if isinstance(self._fs, LocalFileSystem) or not _is_of_the_store(error, writing=writing):
                raise
            # A store's own words may repeat the request, with what it was signed by: only their type is shown then.
            why = error.strerror if isinstance(error, OSError) else None
            raise self.store_error(self._shown, why or type(error).__name__) from None

    def _remove_abandoned(self, path: str) -> None:
        """Remove a temporary file whose writer, on whatever machine, has written nothing to it for an hour."""
        # Not every file system knows when a file changed; another process may sweep too.
        with contextlib.suppress(FileNotFoundError, NotImplementedError, RuntimeError), self._reaching():
            if time.time() - self._fs.modified(path).timestamp() > files.ABANDONED_SECONDS:
                logger.warning("Removing %s, which a killed process left behind.", path)
                self._fs.rm_file(path)


def _is_of_the_store(error: Exception, *, writing: bool) -> bool:
    """Whether the store failed, rather than a file: a missing one, or Arrow's OSError about what it parses."""
    if type(error).__module__.partition(".")[0] in STORE_PACKAGES:
        return True
    if isinstance(error, FileNotFoundError):
        return writing  # the bucket is missing
    return isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None)


def _file_name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _name(moment: datetime, digits: str) -> str:
    return f"{moment:{_TIME}}Z-{digits}{_SUFFIX}"
