"""The decode stage: rows in, frame shards and failures out.

A shard lands as soon as it holds `shard_records` videos or its first video is 5 seconds old, so that killing the
process costs seconds. A graceful stop loses no finished video: an interruption that strikes inside the iterator
(Ctrl+C, a run's termination) first yields what is finished as a last `LandedShard`, then goes on; and whoever closes
the iterator early, or fails in a loop over it, has been given everything that was finished. Videos in flight are
dropped.
"""

from __future__ import annotations

import time
import traceback
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from extraction_dagster.errors.base import ExtractionError
from extraction_dagster.errors.fetch import FetchSetupError
from extraction_dagster.records import Failure
from extraction_dagster.stages.catalog.fetch.ahead import Fetched, fetch_ahead
from extraction_dagster.stages.catalog.fetch.fetching import Fetcher
from extraction_dagster.stages.decode.sampling import evenly
from extraction_dagster.stages.decode.task import DecodeJob
from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_all

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from pathlib import Path

    from extraction_dagster.records import EncodedFrames, IdRange, VideoRow
    from extraction_dagster.settings import Settings
    from extraction_dagster.shards.frame_store import FrameShard, FrameStore
    from extraction_dagster.stages.decode.quality import Quality
    from extraction_dagster.stages.decode.sampling import Sampling
    from extraction_dagster.stages.decode.workers.pool import Decoded

# A shard is held in memory twice while it is written.
_MAX_SHARD_BYTES = 2**27
_MAX_SHARD_SECONDS = 5.0
_PREVIEWS_PER_SHARD = 24


@dataclass(frozen=True, slots=True)
class Preview:
    """A frame to show a person what was decoded.

    Attributes:
        record_id: Its video.
        pts_seconds: When it is shown.
        jpeg: As it is stored.
    """

    record_id: int
    pts_seconds: float
    jpeg: bytes


@dataclass(frozen=True, slots=True)
class LandedShard:
    """What became of some rows: frames that are stored for good, and failures.

    Attributes:
        shard: The stored frames; None when every row failed.
        failures: The rows that gave nothing.
        cpu_seconds: CPU time of the workers, failures included.
        wall_seconds: Time since the last shard landed.
        num_videos: Videos in the shard.
        num_frames: Frames in the shard.
        num_bytes: Size of the shard.
        previews: The middle frame of a few of its videos.
    """

    shard: FrameShard | None
    failures: tuple[Failure, ...]
    cpu_seconds: float
    wall_seconds: float
    num_videos: int
    num_frames: int
    num_bytes: int
    previews: tuple[Preview, ...] = ()


def decode_rows(  # noqa: PLR0913 - the rows and what is done with them, each by name
    rows: Iterable[VideoRow],
    *,
    store: FrameStore,
    partition: IdRange,
    settings: Settings,
    fetch: Callable[[VideoRow], Path] | None = None,
    sampling: Sampling | None = None,
    quality: Quality | None = None,
) -> Generator[LandedShard, None, None]:
    """Decode rows into frame shards.

    Args:
        rows: The rows to decode, drawn as workers become free.
        store: Where the shards go.
        partition: The range that the rows belong to.
        settings: Decoder, sampling, steps, limits, workers, shard size.
        fetch: Gives a row's local file; by default a `Fetcher` as the settings say, whose downloads run ahead.
        sampling: How frames are chosen, where it is not as the settings say.
        quality: Which of them are kept, likewise. Both belong into the store's fingerprint.

    Yields:
        LandedShard: once its shard is stored; every row is in exactly one, with frames or a failure.

    Raises:
        DecodeWorkerStartError: A worker can't start; no row is to blame.
        FetchSetupError: Files can't be fetched as things are set up here; no row is to blame.
    """
    batch = _Batch(store, partition, settings)
    fetcher = Fetcher.from_settings(settings)
    fetched = _fetched(rows, fetch) if fetch else fetch_ahead(rows, fetcher, threads=settings.fetch_threads)
    make_job = partial(DecodeJob.of, settings=settings, sampling=sampling, quality=quality)
    jobs = _jobs(fetched, make_job, batch)
    # The last files are in use until their videos are decoded, long after the last one was fetched.
    with closing(fetcher), closing(fetched), closing(decode_all(jobs, PoolOptions.from_settings(settings))) as decoded:
        try:
            for item in decoded:
                fetcher.release(item.outcome.record_id, keep=item.outcome.frames is not None)
                batch.add(item)
                if batch.is_full():
                    yield batch.land()
        except BaseException:
            decoded.close()
            if not batch.is_empty():  # never so when the caller closes: at each yield above it has just landed
                yield batch.land()
            raise
    if not batch.is_empty():
        yield batch.land()


def _jobs(
    fetched: Iterable[Fetched | None], make_job: Callable[[VideoRow, Path], DecodeJob], batch: _Batch
) -> Iterator[DecodeJob | None]:
    """A job for each row whose file was fetched; the others are failures."""
    for item in fetched:
        if item is None:
            yield None
        elif item.path is not None:
            yield make_job(item.row, item.path)
        elif item.error is not None:
            batch.failures.append(_not_fetched(item.row, item.error))


def _fetched(rows: Iterable[VideoRow], fetch: Callable[[VideoRow], Path]) -> Generator[Fetched, None, None]:
    """Rows whose file a caller's own function gives, one at a time."""
    for row in rows:
        try:
            found = Fetched(row, fetch(row).resolve())
        except (FetchSetupError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a row's address provokes is that row's failure
            found = Fetched(row, error=error)
        yield found


def _not_fetched(row: VideoRow, error: Exception) -> Failure:
    expected = isinstance(error, ExtractionError | OSError)
    return Failure(
        row.record_id,
        row.content_version,
        "fetch",
        type(error).__name__,
        f"Record {row.record_id}: {error}",
        permanent=isinstance(error, ExtractionError) and error.permanent,
        details="" if expected else "".join(traceback.format_exception(error)),
    )


class _Batch:
    """Finished videos and failures that wait for their shard."""

    def __init__(self, store: FrameStore, partition: IdRange, settings: Settings) -> None:
        self._store, self._partition = store, partition
        self._max_videos, self._max_seconds = settings.shard_records, _MAX_SHARD_SECONDS
        self.failures: list[Failure] = []
        self._videos: list[EncodedFrames] = []
        self._bytes = 0
        self._cpu_seconds = 0.0
        self._oldest: float | None = None
        self._last_landing = time.monotonic()

    def add(self, decoded: Decoded) -> None:
        outcome = decoded.outcome
        self._cpu_seconds += decoded.cpu_seconds
        if self._oldest is None:
            self._oldest = time.monotonic()
        if outcome.failure is not None:
            self.failures.append(outcome.failure)
        if outcome.frames is not None:
            self._videos.append(outcome.frames)
            self._bytes += sum(map(len, outcome.frames.jpegs))

    def is_empty(self) -> bool:
        return not self._videos and not self.failures

    def is_full(self) -> bool:
        old = self._oldest is not None and time.monotonic() - self._oldest >= self._max_seconds
        return len(self._videos) + len(self.failures) >= self._max_videos or old or self._bytes >= _MAX_SHARD_BYTES

    def land(self) -> LandedShard:
        """Store the videos; an interruption while writing leaves them here, to be landed again."""
        shard = None
        try:
            if self._videos:
                shard = self._store.write_shard(self._partition, self._videos)
        except Exception:
            self._clear()  # the store refused: the rows are decoded again, later
            raise
        landed = LandedShard(
            shard=shard,
            failures=tuple(self.failures),
            cpu_seconds=self._cpu_seconds,
            wall_seconds=time.monotonic() - self._last_landing,
            num_videos=len(self._videos),
            num_frames=shard.num_frames if shard else 0,
            num_bytes=shard.size_bytes if shard else 0,
            previews=tuple(_preview(self._videos[index]) for index in _some(len(self._videos))),
        )
        self._clear()
        return landed

    def _clear(self) -> None:
        self.failures.clear()
        self._videos.clear()
        self._bytes, self._cpu_seconds, self._oldest = 0, 0.0, None
        self._last_landing = time.monotonic()


def _some(count: int) -> list[int]:
    """Indexes of a few of `count` things, evenly spread."""
    chosen: list[int] = evenly(count, min(count, _PREVIEWS_PER_SHARD)).tolist()
    return chosen


def _preview(video: EncodedFrames) -> Preview:
    middle = len(video) // 2
    return Preview(video.record_id, float(video.pts_seconds[middle]), bytes(video.jpegs[middle]))
