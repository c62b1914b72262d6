"""Frames between decoding and embedding: JPEGs in Parquet, and a footer that lists their videos.

A shard is never changed: materializing a range again adds shards beside the old ones. `retention` says how long they
stay.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any, ClassVar

import numpy as np

from extraction_dagster.errors import ExtractionError, RecordShapeError, one_line
from extraction_dagster.errors.decode import FrameShardError, FrameStoreError
from extraction_dagster.media import FRAMES_LAYOUT
from extraction_dagster.records import EncodedFrames
from extraction_dagster.shards.checked_parquet import CheckedParquet, Layout
from extraction_dagster.shards.store import Shard, ShardRecord, ShardStore

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import pyarrow as pa

    from extraction_dagster.records import IdRange

FORMAT = FRAMES_LAYOUT
_ROWS_PER_GROUP = 300
_LONGEST_SIDE = 65_500  # JPEG has no longer one
_LONGEST_TEXT = 10_000
_MOST_MOVES = 8  # how often the shards that are read may be merged meanwhile


@dataclass(frozen=True, slots=True)
class FrameRecord(ShardRecord):
    """One video in a shard, as the shard's footer lists it."""

    width_px: int
    height_px: int
    duration_seconds: float | None
    partial: str | None

    def is_sound(self) -> bool:
        """Whether its values are of the types and sizes that they should be."""
        sides, seconds, partial = (self.width_px, self.height_px), self.duration_seconds, self.partial
        return (
            super(FrameRecord, self).is_sound()  # a dataclass with slots is made anew: super() alone means the old one
            and self.num_frames >= 1
            and all(type(side) is int and 1 <= side <= _LONGEST_SIDE for side in sides)
            and (seconds is None or (type(seconds) in {int, float} and math.isfinite(seconds)))
            and (partial is None or (isinstance(partial, str) and len(partial) <= _LONGEST_TEXT))
        )


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
            "records": [_as_footer(record) for record in records],
        }
        name = name or self.next_name()
        path, size_bytes = self._write(partition, name, _table(videos), footer)
        return FrameShard(name, path, size_bytes, records)

    def read(self, shard: FrameShard, *, only: Collection[int] | None = None) -> Iterator[EncodedFrames]:
        """Read a shard's videos one by one; those of a shard that was merged away come from where they are now.

        Args:
            shard: As it was listed, however long ago.
            only: The records that are wanted; all when None.

        Raises:
            FrameShardError: The shard is gone or damaged.
            FrameStoreError: The store failed.
        """
        left = {record.record_id for record in shard.records if only is None or record.record_id in only}
        parts = [(shard, left)]
        for _ in range(_MOST_MOVES):
            moved = list[tuple[FrameShard, set[int]]]()
            for part, wanted in parts:
                try:
                    for video in self._read_file(part, wanted):
                        left.discard(video.record_id)
                        yield video
                except FrameShardError as error:
                    again = self._moved(part, left & wanted) if error.gone else []
                    if {record_id for _, found in again for record_id in found} != left & wanted:
                        raise
                    moved += again
            parts = moved
        if left:
            raise FrameShardError(shard.path, "it is merged again and again", gone=True)

    def _read_file(self, shard: FrameShard, wanted: Collection[int]) -> Iterator[EncodedFrames]:
        try:
            with self.open(shard.path) as file:
                yield from _read_videos(file, shard.records, wanted)
        except FileNotFoundError as error:
            raise FrameShardError(shard.path, str(error), gone=True) from error
        except Exception as error:
            if isinstance(error, ExtractionError) and not isinstance(error, RecordShapeError):
                raise
            # Whatever comes of bytes that somebody else wrote.
            said = one_line(" ".join(str(error).split()) or type(error).__name__)
            raise FrameShardError(shard.path, said) from error

    def merge(self, partition: IdRange, parts: Sequence[tuple[FrameShard, Collection[int]]], name: str) -> None:
        """Write one shard with some videos of several."""
        self.write_shard(
            partition, [video for shard, kept in parts for video in self._read_file(shard, kept)], name=name
        )

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
    return FrameRecord(
        video.record_id,
        video.content_version,
        len(video),
        video.width_px,
        video.height_px,
        video.duration_seconds,
        video.partial,
        address=video.address,
        claim=video.claim,
    )


def _as_footer(record: FrameRecord) -> dict[str, Any]:
    """A record as the footer has it; without what is not known of it, as earlier releases wrote it."""
    return {key: value for key, value in asdict(record).items() if value or key not in {"address", "claim"}}


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


def _read_videos(file: IO[bytes], records: Sequence[FrameRecord], wanted: Collection[int]) -> Iterator[EncodedFrames]:
    """Some of a file's videos one by one; ValueError when its rows are not those of the listed ones.

    Row groups that hold none of them are not read: `first` is the row of the file that `rows` begin with.
    """
    import pyarrow as pa  # noqa: PLC0415 - as above

    layout = Layout(_schema(), "UNCOMPRESSED", dictionaries=("record_id",), max_group_rows=_ROWS_PER_GROUP)
    parquet, rows = CheckedParquet(file, layout), _schema().empty_table()
    first = begin = end = group = 0
    for record in records:
        begin, end = end, end + record.num_frames
        if record.record_id not in wanted:
            continue
        rows, first = rows.slice(min(begin - first, len(rows))), max(first, min(begin, first + len(rows)))
        while first + len(rows) < end:
            if group >= len(parquet.group_rows):
                raise ValueError(f"record {record.record_id} is cut short")
            if len(rows) == 0 and first + parquet.group_rows[group] <= begin:
                first += parquet.group_rows[group]
            else:
                rows = pa.concat_tables([rows, parquet.read(group)])
            group += 1
        yield _video(rows.slice(begin - first, record.num_frames), record)


def _video(rows: pa.Table, record: FrameRecord) -> EncodedFrames:
    if any(record_id != record.record_id for record_id in rows["record_id"].unique().to_pylist()):
        raise ValueError(f"its rows are not those of record {record.record_id}")
    if not np.all(np.isfinite(rows["target_seconds"].to_numpy())) or rows["frame_number"][0].as_py() < 0:
        raise ValueError(f"record {record.record_id} has times or frame numbers that no video has")
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
        record.address,
        record.claim,
    )
