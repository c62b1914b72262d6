"""Frames between decoding and embedding: Parquet shards on any fsspec path, footers that list their records.

    root/<fingerprint>/<partition key>/<time>-<random>.parquet      a shard: some videos of a range, whole
    root/<fingerprint>/<partition key>/.<name>-<random>.tmp         being written; never read

A shard appears whole or not at all, and is never changed: materializing a range again adds shards beside the old ones,
and a later name holds the newer frames. `compaction` merges small ones.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from extraction_dagster.errors.shards import FrameShardError, FrameStoreError
from extraction_dagster.records import fingerprint
from extraction_dagster.shards.frame_shard import (
    FORMAT,
    FrameShard,
    listed_records,
    read_videos,
    record_of,
    to_parquet,
)
from extraction_dagster.shards.names import new_name
from extraction_dagster.stages.catalog.fetch.buckets import STORE_PACKAGES
from extraction_dagster.stages.decode.decoders.geometry import SCALING
from extraction_dagster.stages.decode.jpeg import SUBSAMPLING
from extraction_dagster.stages.decode.quality import Quality
from extraction_dagster.stages.decode.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from extraction_dagster.records import EncodedFrames, IdRange
    from extraction_dagster.settings import Settings

logger = logging.getLogger(__name__)

_STALE = timedelta(hours=1)


def frames_fingerprint(settings: Settings, *, sampling: Sampling | None = None, quality: Quality | None = None) -> str:
    """What decides the stored frames: decoder, choice of frames, size, JPEG. Nothing else changes it.

    Args:
        settings: Say what is not given.
        sampling: How frames are chosen.
        quality: Which of them are kept.
    """
    steps = (quality or Quality.from_settings(settings)).identity
    return fingerprint(
        layout=FORMAT,
        decoder=settings.decoder,
        sampling=(sampling or Sampling.from_settings(settings)).identity,
        short_side_px=settings.short_side_px,
        scaling=SCALING,
        jpeg_quality=settings.jpeg_quality,
        jpeg_subsampling=SUBSAMPLING,
        **({"quality": steps} if steps else {}),  # without a step, nothing that could differ
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

        Raises:
            FrameStoreError: The store can't be reached; so do all other methods. On a local disk, OSError.
        """
        records = tuple(record_of(video) for video in videos)
        content = to_parquet(partition, videos, records)
        name = name or new_name()
        folder = self._partition_folder(partition)
        path = f"{folder}/{name}"
        if isinstance(self._fs, LocalFileSystem):
            _sweep(Path(folder))
            _write_durably(Path(path), content)
        else:
            with self._reaching(writing=True):
                self._fs.pipe_file(path, content)  # an object store shows an object once it is whole
        return FrameShard(name, path, partition.partition_key, records, sum(map(len, videos)), len(content))

    def shards(self, partition: IdRange) -> list[FrameShard]:
        """The range's shards, oldest first, read off their footers; what is no whole shard is warned about."""
        folder = self._partition_folder(partition)
        self._fs.invalidate_cache(folder)
        try:
            with self._reaching():
                entries = self._fs.ls(folder, detail=True)
        except FileNotFoundError:
            return []
        paths = sorted((entry["name"], entry.get("size") or 0) for entry in entries if entry["type"] == "file")
        found = [self._read_footer(path, partition, size) for path, size in paths if not _is_temporary(path)]
        return [shard for shard in found if shard is not None]

    def partition_keys(self) -> list[str]:
        """The names of the ranges that have a folder."""
        self._fs.invalidate_cache(self._folder)
        try:
            with self._reaching():
                return sorted(path.rsplit("/", 1)[-1] for path in self._fs.ls(self._folder, detail=False))
        except FileNotFoundError:
            return []

    def open(self, path: str) -> IO[bytes]:
        """Open a shard's file to read single columns of it."""
        with self._reaching():
            file: IO[bytes] = self._fs.open(path, "rb")
        return file

    def read(self, shard: FrameShard) -> Iterator[EncodedFrames]:
        """Read a shard's videos one by one.

        Raises:
            FrameShardError: The shard is gone or damaged.
        """
        try:
            with self._reaching(parsing=True), self._fs.open(shard.path, "rb") as file:
                yield from read_videos(file, shard.records)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise FrameShardError(shard.path, str(error)) from error

    def remove(self, shard: FrameShard) -> None:
        """Remove a shard; one that is gone already is no matter."""
        with contextlib.suppress(FileNotFoundError), self._reaching():
            self._fs.rm_file(shard.path)

    @contextlib.contextmanager
    def _reaching(self, *, parsing: bool = False, writing: bool = False) -> Iterator[None]:
        """Tell a store that can't be reached from what is wrong with a shard; a disk speaks for itself.

        An OSError may be Arrow's, about what it parses; and a file that is missing is no fault, unless it is written.
        """
        try:
            yield
        except Exception as error:
            of_a_shard = isinstance(error, OSError) and (
                parsing or (not writing and isinstance(error, FileNotFoundError))
            )
            known = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in STORE_PACKAGES
            if isinstance(self._fs, LocalFileSystem) or of_a_shard or not known:
                raise
            # A store's own words may repeat the request, and it may have no others than its kind.
            why = error.strerror if isinstance(error, OSError) else None
            raise FrameStoreError(self._folder, why or type(error).__name__) from None

    def _partition_folder(self, partition: IdRange) -> str:
        return f"{self._folder}/{partition.partition_key}"

    def _read_footer(self, path: str, partition: IdRange, size_bytes: int) -> FrameShard | None:
        try:
            with self._reaching(parsing=True), self._fs.open(path, "rb") as file:
                metadata = pq.read_metadata(file)
            records = listed_records(metadata, partition)
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            logger.warning("Ignoring %s: it is no whole frame shard of range %s (%s).", path, partition, error)
            return None
        name = path.rsplit("/", 1)[-1]
        return FrameShard(name, path, partition.partition_key, records, metadata.num_rows, size_bytes)


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
