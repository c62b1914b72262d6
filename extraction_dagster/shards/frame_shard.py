"""What a frame shard holds: some videos' JPEGs as Parquet, and a footer that lists the videos."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from extraction_dagster.records import EncodedFrames

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from extraction_dagster.records import IdRange

_FOOTER_KEY, FORMAT = b"extraction_frames", 1
_ROWS_PER_GROUP = 300
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


def read_videos(file: IO[bytes], records: Sequence[ShardRecord]) -> Iterator[EncodedFrames]:
    """Read a shard's videos one by one.

    Raises:
        ValueError: Its rows are not those of the listed videos; other errors are Arrow's.
    """
    batches = pq.ParquetFile(file).iter_batches(_ROWS_PER_GROUP)
    rows = _SCHEMA.empty_table()
    for record in records:
        while len(rows) < record.num_frames:
            rows = pa.concat_tables([rows, _table(next(batches, None), record)])
        yield _video(rows.slice(0, record.num_frames), record)
        rows = rows.slice(record.num_frames)


def listed_records(metadata: pq.FileMetaData, partition: IdRange) -> tuple[ShardRecord, ...]:
    """The videos that a footer lists; ValueError, KeyError or TypeError when it is not one of ours."""
    footer = json.loads((metadata.metadata or {})[_FOOTER_KEY])
    if footer["format"] != FORMAT or footer["partition_key"] != partition.partition_key:
        reason = f"it has format {footer['format']} and range {footer['partition_key']}"
        raise ValueError(reason)
    records = tuple(ShardRecord(**record) for record in footer["records"])
    if sum(record.num_frames for record in records) != metadata.num_rows:
        reason = f"it has {metadata.num_rows} frames, not those that it lists"
        raise ValueError(reason)
    return records


def record_of(video: EncodedFrames) -> ShardRecord:
    """A video as a footer lists it."""
    return ShardRecord(
        video.record_id,
        video.content_version,
        len(video),
        video.width_px,
        video.height_px,
        video.duration_seconds,
        video.partial,
    )


def to_parquet(partition: IdRange, videos: Sequence[EncodedFrames], records: Sequence[ShardRecord]) -> bytes:
    """A shard's file, laid out for fast reading."""
    footer = {
        "format": FORMAT,
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
