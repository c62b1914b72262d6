"""Frames between decoding and embedding: JPEGs in Parquet, and a footer that lists their videos.

A shard is never changed: materializing a range again adds shards beside the old ones. How long they stay is said by
`EXTRACTION_KEEP_FRAMES`. A shard goes as a whole, once none of its records needs it: each is done or parked with the
settings of today, or a newer shard holds it, or the ledger has not known it for a day. Removing one too early costs a
decode, never a point: a row that is asked for again without its frames is decoded again.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import IO, TYPE_CHECKING, Any, ClassVar

import numpy as np

from extraction_dagster.errors.decode import FrameShardError, FrameStoreError
from extraction_dagster.records import EncodedFrames
from extraction_dagster.shards.store import Shard, ShardRecord, ShardStore, new_name, written_at

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    import pyarrow as pa

    from extraction_dagster.records import IdRange
    from extraction_dagster.stages.catalog.ledger import Fingerprints, LedgerEntry

logger = logging.getLogger(__name__)
FORMAT = 1
_ROWS_PER_GROUP = 300
# A record, or a version of it, that the ledger does not know: its run was killed just before it was marked; or the row
# was deleted, or changed since.
_UNKNOWN = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class FrameRecord(ShardRecord):
    """One video in a shard, as the shard's footer lists it."""

    width_px: int
    height_px: int
    duration_seconds: float | None
    partial: str | None


@dataclass(frozen=True, slots=True)
class FrameShard(Shard):
    """A shard of frames; its size is the file's."""

    records: tuple[FrameRecord, ...]


class FrameStore(ShardStore[FrameShard]):
    """The frame shards made under one fingerprint; see `frames_fingerprint`."""

    kind, footer_key = "frame", b"extraction_frames"
    store_error = FrameStoreError
    # Laid out for fast reading: JPEGs uncompressed, and statistics to find a record by.
    parquet_options: ClassVar = {
        "compression": "none",
        "use_dictionary": ["record_id"],
        "row_group_size": _ROWS_PER_GROUP,
        "write_statistics": ["record_id"],
    }

    def write_shard(
        self, partition: IdRange, videos: Sequence[EncodedFrames], *, name: str | None = None
    ) -> FrameShard:
        """Write videos as one shard: whole, or not at all.

        Args:
            partition: The range that the videos belong to.
            videos: At least one.
            name: Of a shard that takes the place of others; by default one that says now.
        """
        records = tuple(_listed(video) for video in videos)
        footer = {
            "format": FORMAT,
            "partition_key": partition.partition_key,
            "records": [asdict(record) for record in records],
        }
        name = name or new_name()
        path, size_bytes = self._write(partition, name, _table(videos), footer)
        return FrameShard(name, path, size_bytes, records)

    def read(self, shard: FrameShard) -> Iterator[EncodedFrames]:
        """Read a shard's videos one by one.

        Raises:
            FrameShardError: The shard is gone or damaged.
        """
        import pyarrow as pa  # noqa: PLC0415 - 0.3 s that importing the room need not pay

        try:
            with self.open(shard.path) as file:
                yield from _read_videos(file, shard.records)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise FrameShardError(shard.path, str(error)) from error

    def merge(self, partition: IdRange, parts: Sequence[tuple[FrameShard, Collection[int]]], name: str) -> None:
        """Write one shard with some videos of several."""
        videos = [video for shard, kept in parts for video in self.read(shard) if video.record_id in kept]
        self.write_shard(partition, videos, name=name)

    def _described(self, footer: dict[str, Any], path: str, partition: IdRange, size_bytes: int) -> FrameShard:
        if footer["format"] != FORMAT or footer["partition_key"] != partition.partition_key:
            raise ValueError(f"it has format {footer['format']} and range {footer['partition_key']}")
        records = tuple(FrameRecord(**record) for record in footer["records"])
        return FrameShard(path.rsplit("/", 1)[-1], path, size_bytes, records)


@functools.cache
def _schema() -> pa.Schema:
    import pyarrow as pa  # noqa: PLC0415 - as above

    return pa.schema(
        [
            ("record_id", pa.int64()),
            ("frame_number", pa.int64()),
            ("pts_seconds", pa.float64()),
            ("target_seconds", pa.float64()),
            ("jpeg", pa.large_binary()),
        ]
    )


def _listed(video: EncodedFrames) -> FrameRecord:
    """How a footer lists a video."""
    facts = (video.width_px, video.height_px, video.duration_seconds, video.partial)
    return FrameRecord(video.record_id, video.content_version, len(video), *facts)


def _table(videos: Sequence[EncodedFrames]) -> pa.Table:
    import pyarrow as pa  # noqa: PLC0415 - as above

    columns: list[Any] = [
        np.repeat([video.record_id for video in videos], [len(video) for video in videos]),
        np.concatenate([video.frame_number for video in videos]),
        np.concatenate([video.pts_seconds for video in videos]),
        np.concatenate([video.target_seconds for video in videos]),
        [jpeg for video in videos for jpeg in video.jpegs],
    ]
    schema = _schema()
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)


def _read_videos(file: IO[bytes], records: Sequence[FrameRecord]) -> Iterator[EncodedFrames]:
    """A file's videos one by one; ValueError when its rows are not those of the listed ones."""
    import pyarrow as pa  # noqa: PLC0415 - as above
    import pyarrow.parquet as pq  # noqa: PLC0415 - as above

    batches = pq.ParquetFile(file).iter_batches(_ROWS_PER_GROUP)
    rows = _schema().empty_table()
    for record in records:
        while len(rows) < record.num_frames:
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"record {record.record_id} is cut short")
            rows = pa.concat_tables([rows, pa.Table.from_batches([batch]).replace_schema_metadata()])
        yield _video(rows.slice(0, record.num_frames), record)
        rows = rows.slice(record.num_frames)


def _video(rows: pa.Table, record: FrameRecord) -> EncodedFrames:
    if any(record_id != record.record_id for record_id in rows["record_id"].unique().to_pylist()):
        raise ValueError(f"its rows are not those of record {record.record_id}")
    return EncodedFrames(
        record.record_id,
        record.content_version,
        rows["jpeg"].to_pylist(),
        rows["pts_seconds"].to_numpy(),
        rows["target_seconds"].to_numpy(),
        rows["frame_number"].to_numpy(),
        record.width_px,
        record.height_px,
        record.duration_seconds,
        record.partial,
    )


@dataclass(frozen=True, slots=True)
class Removed:
    """What went: shards, records in them, bytes."""

    shards: int = 0
    records: int = 0
    num_bytes: int = 0


def keep_time(keep_frames: str) -> timedelta | None:
    """The time that a finished shard stays after it was written; None for ever."""
    return None if keep_frames == "all" else timedelta(0 if keep_frames == "none" else int(keep_frames))


def prune_frames(  # noqa: PLR0913 - each is a different part of the question
    store: FrameStore,
    partition: IdRange,
    entries: dict[int, LedgerEntry],
    made_with: Fingerprints,
    *,
    keep: timedelta,
    now: datetime | None = None,
) -> Removed:
    """Remove the shards of a range that nobody needs any more.

    Args:
        store: The frames made with the settings of today.
        partition: The range whose shards are looked at.
        entries: The ledger's entries of the range.
        made_with: The settings of today.
        keep: How long a finished shard stays after it was written.
        now: The time to go by; the present by default.
    """
    moment = now or datetime.now(UTC)
    finished = _finished(store.shards(partition), entries, made_with, now=moment)
    old = [shard for shard in finished if moment - written_at(shard.name) >= keep]
    for shard in old:
        store.remove(shard)
    removed = Removed(len(old), sum(len(shard.records) for shard in old), sum(shard.size_bytes for shard in old))
    if old:
        logger.info("Removed %d frame shards (%d bytes): their records are done", removed.shards, removed.num_bytes)
    return removed


def _finished(
    shards: Iterable[FrameShard], entries: dict[int, LedgerEntry], made_with: Fingerprints, *, now: datetime
) -> list[FrameShard]:
    """Those that no record needs."""
    newer: set[int] = set()
    finished = []
    for shard in sorted(shards, key=lambda shard: shard.name, reverse=True):
        unknown_goes = now - written_at(shard.name) >= _UNKNOWN
        needed = [
            record
            for record in shard.records
            if record.record_id not in newer
            and _is_needed(record, entries.get(record.record_id), made_with, unknown_goes=unknown_goes)
        ]
        if not needed:
            finished.append(shard)
        newer.update(record.record_id for record in shard.records)
    return finished


def _is_needed(record: ShardRecord, entry: LedgerEntry | None, made_with: Fingerprints, *, unknown_goes: bool) -> bool:
    if entry is None or entry.content_version != record.content_version:
        return not unknown_goes
    today = (entry.frames_fingerprint, entry.embedding_fingerprint) == (made_with.frames, made_with.embedding)
    return not (entry.state == "parked" or (entry.state == "done" and today))
