"""Frames between decoding and embedding: Parquet shards on any fsspec path, footers that list their records.

    root/<fingerprint>/<partition key>/<time>-<random>.parquet      a shard: some videos of a range, whole
    root/<fingerprint>/<partition key>/.<name>-<random>.tmp         being written; never read

A shard appears whole or not at all, and is never changed: materializing a range again adds shards beside the old ones,
and a later name holds the newer frames. `compaction` merges small ones.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from extraction_dagster.errors import FrameShardError
from extraction_dagster.records import EncodedFrames, fingerprint
from extraction_dagster.stages.decode.jpeg import SUBSAMPLING
from extraction_dagster.stages.decode.quality import Quality
from extraction_dagster.stages.decode.sampling import Sampling
from extraction_dagster.stages.decode.shard_names import new_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from extraction_dagster.records import IdRange
    from extraction_dagster.settings import Settings

logger = logging.getLogger(__name__)

_FOOTER_KEY, _FORMAT = b"extraction_frames", 1
_ROWS_PER_GROUP = 300
_STALE = timedelta(hours=1)
_SCHEMA = pa.schema(
    [
        ("record_id", pa.int64()),
        ("frame_number", pa.int64()),
        ("pts_seconds", pa.float64()),
        ("target_seconds", pa.float64()),
        ("jpeg", pa.large_binary()),
    ]
)


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One video in a shard, as the shard's footer lists it."""

    record_id: int
    content_version: str
    num_frames: int
    width_px: int
    height_px: int
    duration_seconds: float | None
    partial: str | None


@dataclass(frozen=True, slots=True)
class FrameShard:
    """A shard and what it holds.

    Attributes:
        name: Its file name; later names hold newer frames.
        path: Where it lies, on the store's file system.
        partition_key: The range it belongs to.
        records: The videos, in the order in which they are stored.
        num_frames: Frames of all of them.
        size_bytes: The file's size.
    """

    name: str
    path: str
    partition_key: str
    records: tuple[ShardRecord, ...]
    num_frames: int
    size_bytes: int


def frames_fingerprint(settings: Settings) -> str:
    """What decides the stored frames: decoder, choice of frames, size, JPEG. Nothing else changes it."""
    quality = Quality.from_settings(settings).identity
    steps = {"quality": quality} if quality else {}  # without a step, nothing that could differ
    return fingerprint(
        layout=_FORMAT,
        decoder=settings.decoder,
        sampling=Sampling.from_settings(settings).identity,
        short_side_px=settings.short_side_px,
        jpeg_quality=settings.jpeg_quality,
        jpeg_subsampling=SUBSAMPLING,
        **steps,
    )


class FrameStore:
    """The frame shards made under one fingerprint."""

    def __init__(self, root_uri: str, fingerprint: str) -> None:
        """Open the store; nothing is created before the first shard.

        Args:
            root_uri: Any fsspec path: a folder, `s3://bucket/frames`.
            fingerprint: See `frames_fingerprint`.
        """
        self._fs, root = fsspec.core.url_to_fs(root_uri)
        self._folder = f"{root.rstrip('/')}/{fingerprint}"
        self.fingerprint = fingerprint

    def write_shard(
        self, partition: IdRange, videos: Sequence[EncodedFrames], *, name: str | None = None
    ) -> FrameShard:
        """Write videos as one shard: whole, or not at all.

        Args:
            partition: The range that the videos belong to.
            videos: At least one.
            name: Of a shard that takes the place of others; by default one that says now.
        """
        records = tuple(_record(video) for video in videos)
        content = _to_parquet(partition, videos, records)
        name = name or new_name()
        folder = self._partition_folder(partition)
        path = f"{folder}/{name}"
        if isinstance(self._fs, LocalFileSystem):
            _sweep(Path(folder))
            _write_durably(Path(path), content)
        else:
            self._fs.pipe_file(path, content)  # an object store shows an object once it is whole
        return FrameShard(name, path, partition.partition_key, records, sum(map(len, videos)), len(content))

    def shards(self, partition: IdRange) -> list[FrameShard]:
        """The range's shards, oldest first, read off their footers; what is no whole shard is warned about."""
        folder = self._partition_folder(partition)
        self._fs.invalidate_cache(folder)
        try:
            entries = self._fs.ls(folder, detail=True)
        except FileNotFoundError:
            return []
        paths = sorted((entry["name"], entry.get("size") or 0) for entry in entries if entry["type"] == "file")
        found = [self._read_footer(path, partition, size) for path, size in paths if not _is_temporary(path)]
        return [shard for shard in found if shard is not None]

    def partition_keys(self) -> list[str]:
        """The names of the ranges that have a folder."""
        try:
            return sorted(path.rsplit("/", 1)[-1] for path in self._fs.ls(self._folder, detail=False))
        except FileNotFoundError:
            return []

    def open(self, path: str) -> IO[bytes]:
        """Open a shard's file to read single columns of it."""
        file: IO[bytes] = self._fs.open(path, "rb")
        return file

    def read(self, shard: FrameShard) -> Iterator[EncodedFrames]:
        """Read a shard's videos one by one.

        Raises:
            FrameShardError: The shard is gone or damaged.
        """
        try:
            with self._fs.open(shard.path, "rb") as file:
                batches = pq.ParquetFile(file).iter_batches(_ROWS_PER_GROUP)
                rows = _SCHEMA.empty_table()
                for record in shard.records:
                    while len(rows) < record.num_frames:
                        rows = pa.concat_tables([rows, _table(next(batches, None), record)])
                    yield _video(rows.slice(0, record.num_frames), record)
                    rows = rows.slice(record.num_frames)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise FrameShardError(shard.path, str(error)) from error

    def remove(self, shard: FrameShard) -> None:
        """Remove a shard; one that is gone already is no matter."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(shard.path)

    def _partition_folder(self, partition: IdRange) -> str:
        return f"{self._folder}/{partition.partition_key}"

    def _read_footer(self, path: str, partition: IdRange, size_bytes: int) -> FrameShard | None:
        try:
            with self._fs.open(path, "rb") as file:
                metadata = pq.read_metadata(file)
            records = _listed(metadata, partition)
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            logger.warning("Ignoring %s: it is no whole frame shard of range %s (%s).", path, partition, error)
            return None
        name = path.rsplit("/", 1)[-1]
        return FrameShard(name, path, partition.partition_key, records, metadata.num_rows, size_bytes)


def _listed(metadata: pq.FileMetaData, partition: IdRange) -> tuple[ShardRecord, ...]:
    """The videos that a footer lists; ValueError, KeyError or TypeError when it is not one of ours."""
    footer = json.loads((metadata.metadata or {})[_FOOTER_KEY])
    if footer["format"] != _FORMAT or footer["partition_key"] != partition.partition_key:
        reason = f"it has format {footer['format']} and range {footer['partition_key']}"
        raise ValueError(reason)
    records = tuple(ShardRecord(**record) for record in footer["records"])
    if sum(record.num_frames for record in records) != metadata.num_rows:
        reason = f"it has {metadata.num_rows} frames, not those that it lists"
        raise ValueError(reason)
    return records


def _record(video: EncodedFrames) -> ShardRecord:
    return ShardRecord(
        video.record_id,
        video.content_version,
        len(video),
        video.width_px,
        video.height_px,
        video.duration_seconds,
        video.partial,
    )


def _to_parquet(partition: IdRange, videos: Sequence[EncodedFrames], records: Sequence[ShardRecord]) -> bytes:
    footer = {
        "format": _FORMAT,
        "partition_key": partition.partition_key,
        "records": [asdict(record) for record in records],
    }
    columns: list[Any] = [
        np.repeat([video.record_id for video in videos], [len(video) for video in videos]),
        np.concatenate([video.frame_number for video in videos]),
        np.concatenate([video.pts_seconds for video in videos]),
        np.concatenate([video.target_seconds for video in videos]),
        [jpeg for video in videos for jpeg in video.jpegs],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=_SCHEMA.with_metadata({_FOOTER_KEY: json.dumps(footer)}))
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="none",
        use_dictionary=["record_id"],
        row_group_size=_ROWS_PER_GROUP,
        write_statistics=["record_id"],
    )
    return buffer.getvalue()


def _table(batch: pa.RecordBatch | None, record: ShardRecord) -> pa.Table:
    if batch is None:
        reason = f"record {record.record_id} is cut short"
        raise ValueError(reason)
    return pa.Table.from_batches([batch]).replace_schema_metadata()


def _video(rows: pa.Table, record: ShardRecord) -> EncodedFrames:
    if any(record_id != record.record_id for record_id in rows["record_id"].unique().to_pylist()):
        reason = f"its rows are not those of record {record.record_id}"
        raise ValueError(reason)
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


def _is_temporary(path: str) -> bool:
    return path.rsplit("/", 1)[-1].startswith(".")


def _write_durably(path: Path, content: bytes) -> None:
    """Write beside, then rename: a reader, a crash or a power cut never sees half a shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp")  # two may merge the same shards at once
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left behind: writing takes seconds, so an hour without a change is the end of it."""
    for beside in folder.glob(".*.tmp"):
        age = datetime.now(UTC) - datetime.fromtimestamp(beside.stat().st_mtime, UTC)
        if age > _STALE:
            logger.warning("Removing %s, which a killed process left behind %s ago.", beside, age)
            beside.unlink(missing_ok=True)
