"""Shards on any fsspec path: Parquet files under the fingerprint they were made with, one store for both kinds.

    <root>/source.json                                                                    whose they are; see `place`
    <root>/<fingerprint>/<partition key>/20260102T030405000006Z-0a1b2c3d4e5f.parquet      a shard
    <root>/<fingerprint>/<partition key>/.20260102T03….tmp                                being written; never read
    <root>/<fingerprint>/<partition key>/.damaged-20260102T03….parquet                    set aside; never read

A shard appears whole or not at all. Its footer says what it holds, so that a listing reads footers only; a file without
that footer (torn, foreign, of another range, of a newer format) is no shard. Its name says when it was written, here on
2 January 2026 at 03:04:05.000006 UTC, and ends in twelve digits. `compaction` merges small ones.

Several shards may hold a record. What counts is its newest copy, by the claim under which the row was planned, then by
name: a writer that was frozen for hours writes late, under a claim that is older.

    A   record 7, claim 12      B   record 7, claim 15      C   record 7, claim 12, written last      B counts

Long because both kinds of shard, frames and vectors, are written, listed, read and judged by this one store.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import secrets
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from extraction_dagster.errors import PartitionKeyError, one_line
from extraction_dagster.errors.decode import ShardError
from extraction_dagster.records import MAX_INT, MIN_INT, IdRange
from extraction_dagster.shards.place import Place, Source

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    import pyarrow as pa
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)
_SUFFIX = ".parquet"
_TIME, _TICK = "%Y%m%dT%H%M%S%f", timedelta(microseconds=1)
_MAGIC = b"PAR1"
_TAIL_BYTES = 64 * 1024
_MOST_FOOTER_BYTES = 2**26
MOST_BYTES = 2**32  # of a file: a shard is written at 128 MiB, and a single video's frames take at most 2 GiB
_LONGEST_TEXT = 2**16
_MOST_FOOTERS = 256  # remembered; of 50 records each, a few MB
_STAMPS = ("ino", "mtime", "created", "ETag", "LastModified", "generation", "updated")  # of a listed file
_footers = dict[tuple[object, ...], Any]()
_MOST_LISTINGS = 3  # of a range that others merge while it is looked at


def new_name(after: str = "") -> str:
    """The name of a shard that is written now: later than another one's, whatever the clock of its writer says."""
    moment = datetime.now(UTC)
    with contextlib.suppress(ValueError, OverflowError):
        moment = max(moment, written_at(after) + _TICK)
    return _name(moment, secrets.token_hex(6))


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

    def is_sound(self) -> bool:
        """Whether its values are of the types that they should be: a footer may be anybody's."""
        numbers, texts = (self.record_id, self.num_frames, self.claim), (self.content_version, self.address)
        return (
            all(type(number) is int and MIN_INT <= number <= MAX_INT for number in numbers)
            and all(isinstance(text, str) and len(text) <= _LONGEST_TEXT for text in texts)
            and self.num_frames >= 0
        )


@dataclass(frozen=True, slots=True)
class Shard:
    """A file, as its footer describes it.

    Attributes:
        name: Its file name, which says when it was written.
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

    @property
    def partition(self) -> IdRange:
        """The range in whose folder it lies."""
        return IdRange.parse(self.path.rsplit("/", 2)[1])


S = TypeVar("S", bound=Shard)


@dataclass(frozen=True, slots=True)
class Copy(Generic[S]):
    """A record in a shard."""

    shard: S
    record: ShardRecord

    @property
    def order(self) -> tuple[int, str]:
        """Of a record's copies, the one with the greatest counts."""
        return self.record.claim, self.shard.name


def newest_copies(shards: Iterable[S]) -> dict[int, Copy[S]]:
    """By record, the copy that counts: that of the greatest claim; among equal ones, that of the latest name."""
    newest = dict[int, Copy[S]]()
    for shard in shards:
        for record in shard.records:
            copy, known = Copy(shard, record), newest.get(record.record_id)
            if known is None or copy.order > known.order:
                newest[record.record_id] = copy
    return newest


def by_shard(copies: Mapping[int, Copy[S]]) -> list[tuple[S, list[int]]]:
    """The shards of some copies, oldest first, each with the records that are taken from it."""
    found = dict[str, tuple[S, list[int]]]()
    for record_id, copy in copies.items():
        found.setdefault(copy.shard.path, (copy.shard, []))[1].append(record_id)
    return sorted(found.values(), key=lambda part: part[0].name)


class ShardStore(Place, ABC, Generic[S]):
    """The shards of one kind that were made under one fingerprint; nothing is created before the first is written.

    Args:
        root_uri: Any fsspec path: a folder, `s3://bucket/frames`.
        fingerprint: Names everything that the shards' content depends on.
        source: Whose data they must be; None for anybody's.
    """

    kind: ClassVar[str]
    footer_key: ClassVar[bytes]
    parquet_options: ClassVar[Mapping[str, object]]

    def __init__(self, root_uri: str, fingerprint: str, *, source: Source | None = None) -> None:
        super().__init__(root_uri, fingerprint, source=source)
        self.fingerprint = fingerprint
        self._latest = ""  # of the names seen: what is written next is later

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
        """The shard that a footer describes; any error when it describes none of this store."""

    def shards(self, partition: IdRange) -> list[S]:
        """The range's shards by name, oldest first; a file that is no whole shard is warned about and left out.

        Where one vanishes while they are looked at, they are listed again: it was merged, into one not listed yet.
        """
        self.require_source()
        for _ in range(_MOST_LISTINGS):
            found, vanished = list[S](), False
            for entry in self._entries(self._of(partition)):
                if entry["type"] == "directory" or _file_name(entry["name"]).startswith("."):
                    continue
                try:
                    shard = self._known(entry, partition)
                except FileNotFoundError:
                    vanished = True
                    continue
                found += [shard] if shard is not None else []
            if not vanished:
                break
        self._latest = max([self._latest, *(shard.name for shard in found)])
        return sorted(found, key=lambda shard: shard.name)

    def partitions(self) -> list[IdRange]:
        """The ranges that have a folder, in ascending order; a folder of another name is left out."""
        self.require_source()
        found = []
        for name in self._names(self._folder):
            with contextlib.suppress(PartitionKeyError):
                found.append(IdRange.parse(name))
        return sorted(found)

    def fingerprints(self) -> list[str]:
        """The fingerprints that have a folder under the root, this store's own among them."""
        self.require_source()
        return sorted(_file_name(entry["name"]) for entry in self._entries(self._root) if entry["type"] == "directory")

    def every_partition(self) -> set[IdRange]:
        """The ranges that have a folder under any fingerprint."""
        return {partition for name in self.fingerprints() for partition in self.sibling(name).partitions()}

    def sibling(self, fingerprint: str) -> ShardStore[S]:
        """The shards that were made under another fingerprint, in the same root."""
        return type(self)(self._root_uri, fingerprint, source=self._source)

    def remove(self, shard: S) -> None:
        """Remove a shard; nothing happens when it is gone already."""
        self.require_source()
        with contextlib.suppress(FileNotFoundError), self._reaching():
            self._fs.rm_file(shard.path)

    def remove_empty(self, partition: IdRange) -> None:
        """Remove a range's folder, and the fingerprint's own, when nothing is left in them; a disk alone has such."""
        for folder in (self._of(partition), self._folder):
            self._remove_empty(folder)

    def set_aside(self, shard: S, why: str, *, records: Collection[int] | None = None) -> None:
        """Have some records of a shard made again, by default all: its file gets a name that is never read.

        What the other records have is kept, in a shard that takes its place.

        Args:
            shard: With a damaged picture, or damaged as a whole.
            why: What is wrong with it.
            records: Whose data is damaged.
        """
        self.require_source()
        held = {record.record_id for record in shard.records}
        kept = set() if records is None else held.difference(records)
        if kept:
            try:
                self.merge(shard.partition, [(shard, kept)], self._name_after(shard))
            except ShardError as error:
                if error.gone:  # merged by somebody: who reads what is damaged there sets that aside
                    return
                kept = set()
        aside = self._rename_aside(shard.path)
        if not aside:
            return
        logger.warning(
            "Set aside %s as %s: %s. What it held of %d records is made again; keep the file to find out why, or "
            "delete it.",
            shard.path,
            _file_name(aside),
            why,
            len(shard.records) - len(kept),
        )

    def sweep(self, partition: IdRange) -> None:
        """Remove temporary files that killed writers left in a range's folder, and none that is being written."""
        self.require_source()
        self._sweep(self._of(partition))

    def next_name(self) -> str:
        """The name of a shard that is written now: later than that of every shard that this store has seen."""
        return new_name(self._latest)

    def _of(self, partition: IdRange) -> str:
        return f"{self._folder}/{partition.partition_key}"

    def _moved(self, shard: S, record_ids: Collection[int]) -> list[tuple[S, set[int]]]:
        """Where records of a shard that is gone lie now: it was merged, by somebody who took its readers for gone.

        Records that are nowhere any more, of the same version and file, are left out.
        """
        known = {record.record_id: record for record in shard.records}
        found = dict[str, tuple[S, set[int]]]()
        for record_id, copy in newest_copies(self.shards(shard.partition)).items():
            was = known.get(record_id)
            same = was is not None and (was.content_version, was.address) == (
                copy.record.content_version,
                copy.record.address,
            )
            if same and record_id in record_ids and copy.shard.path != shard.path:
                found.setdefault(copy.shard.path, (copy.shard, set()))[1].add(record_id)
        return list(found.values())

    def _name_after(self, shard: S) -> str:
        try:
            return merged_name([shard.name])
        except (ValueError, OverflowError):  # a name that does not say when, or the last moment that there is
            return self.next_name()

    def _write(self, partition: IdRange, name: str, table: pa.Table, footer: Mapping[str, object]) -> tuple[str, int]:
        """Write a shard so that it is seen whole or not at all, also after a crash; returns its path and its size."""
        import pyarrow.parquet as pq  # noqa: PLC0415 - 0.3 s that importing the room need not pay

        buffer = io.BytesIO()
        with_footer = table.replace_schema_metadata({self.footer_key: json.dumps(footer)})
        pq.write_table(with_footer, buffer, **self.parquet_options)
        content = buffer.getvalue()
        path = f"{self._of(partition)}/{name.removesuffix(_SUFFIX)}{_SUFFIX}"
        self._write_whole(path, content)
        self._latest = max(self._latest, name)
        return path, len(content)

    def _known(self, entry: Mapping[str, Any], partition: IdRange) -> S | None:
        """The shard of a listed file; one that is still the file whose footer this process has read, from memory.

        A run lists its range in each of its steps, and few of the shards are new.
        """
        path, size_bytes = entry["name"], entry.get("size") or 0
        stamps = [str(entry[name]) for name in _STAMPS if entry.get(name) is not None]
        key = (type(self), self._root_uri, path, partition, size_bytes, *stamps)
        found: S | None = _footers.get(key) or self._look_at(path, partition, size_bytes)
        if found is not None and stamps:
            _footers.pop(key, None)  # the first are the ones that were not asked for longest
            _footers[key] = found
            if len(_footers) > _MOST_FOOTERS:
                _footers.pop(next(iter(_footers)), None)
        return found

    def _look_at(self, path: str, partition: IdRange, size_bytes: int) -> S | None:
        try:
            tail = self._tail(path)
        except IsADirectoryError:  # a link to one
            tail = b""
        try:
            if size_bytes > MOST_BYTES:
                raise ValueError(f"it has {size_bytes} bytes, expected at most {MOST_BYTES}")  # noqa: TRY301 - as below
            return self._read_footer(tail, path, partition, size_bytes)
        except Exception as error:  # noqa: BLE001 - whatever comes of bytes that somebody else wrote
            which, why = f"{self.kind} shard of range {partition}", one_line(str(error))
            logger.warning("Ignoring %s: it is no whole %s (%s).", one_line(path), which, why)
            return None

    def _read_footer(self, tail: bytes, path: str, partition: IdRange, size_bytes: int) -> S:
        import pyarrow.parquet as pq  # noqa: PLC0415 - as above

        if len(tail) < len(_MAGIC) + 4 or not tail.endswith(_MAGIC):
            raise ValueError("it does not end as a Parquet file does")
        (length,) = struct.unpack("<I", tail[-8:-4])
        if length > _MOST_FOOTER_BYTES:
            raise ValueError(f"its footer has {length} bytes, expected at most {_MOST_FOOTER_BYTES}")
        footer: pq.FileMetaData = pq.read_metadata(io.BytesIO(tail))
        text = (footer.metadata or {}).get(self.footer_key)
        if text is None:
            raise ValueError("its footer describes none")
        shard = self._described(json.loads(text), path, partition, size_bytes)
        if not all(record.is_sound() for record in shard.records):
            raise ValueError("its records are not of this format")
        if len({record.record_id for record in shard.records}) != len(shard.records):
            raise ValueError("it lists a record twice")
        if shard.num_frames != footer.num_rows:
            raise ValueError(f"it has {footer.num_rows} frames, not those that it lists")
        return shard

    def _tail(self, path: str) -> bytes:
        """A file's end with its whole footer, for one short read: `… | footer | its length, 4 bytes | PAR1`."""
        with self._reaching():
            tail: bytes = self._fs.tail(path, _TAIL_BYTES)
            if len(tail) < len(_MAGIC) + 4 or not tail.endswith(_MAGIC):
                return tail
            (length,) = struct.unpack("<I", tail[-8:-4])
            if length + 8 <= len(tail) or length > _MOST_FOOTER_BYTES:
                return tail
            return bytes(self._fs.tail(path, length + 8))


def _file_name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _name(moment: datetime, digits: str) -> str:
    return f"{moment:{_TIME}}Z-{digits}{_SUFFIX}"
