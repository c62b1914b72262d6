"""Frames between decoding and embedding: JPEGs in Parquet, and a footer that lists their videos.

A shard is never changed: materializing a range again adds shards beside the old ones.
"""

from __future__ import annotations

import functools
import io
import json
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from extraction_dagster.errors.decode import FrameShardError, FrameStoreError
from extraction_dagster.records import EncodedFrames
from extraction_dagster.shards.store import ShardStore, new_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import pyarrow as pa

    from extraction_dagster.records import IdRange

FORMAT = 1
_ROWS_PER_GROUP = 300


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

    @classmethod
    def of(cls, video: EncodedFrames) -> ShardRecord:
        """How a footer lists a video."""
        return cls(
            video.record_id,
            video.content_version,
            len(video),
            video.width_px,
            video.height_px,
            video.duration_seconds,
            video.partial,
        )


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


class FrameStore(ShardStore[FrameShard]):
    """The frame shards made under one fingerprint; see `frames_fingerprint`."""

    kind, footer_key = "frame", b"extraction_frames"
    store_error = FrameStoreError

    def write_shard(
        self, partition: IdRange, videos: Sequence[EncodedFrames], *, name: str | None = None
    ) -> FrameShard:
        """Write videos as one shard: whole, or not at all.

        Args:
            partition: The range that the videos belong to.
            videos: At least one.
            name: Of a shard that takes the place of others; by default one that says now.
        """
        records = tuple(ShardRecord.of(video) for video in videos)
        content = _to_parquet(partition, videos, records)
        name = name or new_name()
        path = self._write(partition, name, content)
        return FrameShard(name, path, partition.partition_key, records, sum(map(len, videos)), len(content))

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
        records = tuple(ShardRecord(**record) for record in footer["records"])
        name, num_frames = path.rsplit("/", 1)[-1], sum(record.num_frames for record in records)
        return FrameShard(name, path, partition.partition_key, records, num_frames, size_bytes)


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


def _to_parquet(partition: IdRange, videos: Sequence[EncodedFrames], records: Sequence[ShardRecord]) -> bytes:
    """A shard's file, laid out for fast reading: JPEGs uncompressed, and statistics to find a record by."""
    import pyarrow as pa  # noqa: PLC0415 - as above
    import pyarrow.parquet as pq  # noqa: PLC0415 - as above

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
    schema = _schema()
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=schema.with_metadata({FrameStore.footer_key: json.dumps(footer)}))
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


def _read_videos(file: IO[bytes], records: Sequence[ShardRecord]) -> Iterator[EncodedFrames]:
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


def _video(rows: pa.Table, record: ShardRecord) -> EncodedFrames:
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
