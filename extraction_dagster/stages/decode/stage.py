"""The decode stage: rows in, frame shards and failures out.

A shard lands as soon as it holds `shard_records` videos or its first video is 5 seconds old, so that killing the
process costs seconds; failures land with it, or alone after a second, so that dead links are seen while others are
still tried. A graceful stop loses no finished video: an interruption that strikes inside the iterator (Ctrl+C, a run's
termination) first yields what is finished as a last `LandedShard`, then goes on; a caller who closes the iterator
early, or fails in a loop over it, finds what was finished in the store. Videos in flight are dropped.
"""

from __future__ import annotations

import time
import traceback
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from extraction_dagster.addresses import brief_address
from extraction_dagster.errors import ExtractionError
from extraction_dagster.records import EncodedFrames, Failure, IdRange, Outcome, VideoRow
from extraction_dagster.stages.catalog.fetch.fetching import Fetched, Fetcher, fetch_ahead
from extraction_dagster.stages.decode.sampling import evenly
from extraction_dagster.stages.decode.task import DecodeJob
from extraction_dagster.stages.decode.workers.pool import Decoded, PoolOptions, decode_as_ready

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence

    from extraction_dagster.settings import Settings
    from extraction_dagster.shards.frame_store import FrameShard, FrameStore

# A shard is held in memory twice while it is written.
_MAX_SHARD_BYTES = 2**27
_MAX_SHARD_SECONDS = 5.0
# Failures wait this long for others: a caller records them in one transaction.
_FAILURE_SECONDS = 1.0
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
        shard: The stored frames; None when only failures land.
        failures: The rows that gave nothing.
        cpu_seconds: CPU time of the workers since the last one, failures included.
        num_videos: Videos in the shard.
        num_frames: Frames in the shard.
        num_bytes: Size of the shard.
        previews: The middle frame of a few of its videos.
    """

    shard: FrameShard | None
    failures: tuple[Failure, ...]
    cpu_seconds: float
    num_videos: int = 0
    num_frames: int = 0
    num_bytes: int = 0
    previews: tuple[Preview, ...] = ()


def decode_rows(
    rows: Iterable[VideoRow], *, store: FrameStore, partition: IdRange, settings: Settings
) -> Generator[LandedShard, None, None]:
    """Decode rows into frame shards.

    Args:
        rows: The rows to decode, drawn as workers become free.
        store: Where the shards go.
        partition: The range that the rows belong to.
        settings: Decoder, sampling, steps, limits, workers, shard size, and what may be fetched from where.

    Yields:
        LandedShard: once its shard is stored; every row is in exactly one, with frames or a failure.

    Raises:
        DecodeWorkerStartError: A worker can't start; no row is to blame.
        FetchSetupError: Files can't be fetched as things are set up here; no row is to blame.
    """
    drawn = dict[int, VideoRow]()

    def drawing() -> Iterator[VideoRow]:
        for row in rows:
            drawn[row.record_id] = row
            yield row

    batch = _Batch(store, partition, settings)
    fetcher = Fetcher(settings)
    fetched = fetch_ahead(drawing(), fetcher, threads=settings.fetch_threads)
    downloaded = dict[int, str]()
    decoded = decode_as_ready(_jobs(fetched, settings, downloaded), PoolOptions.from_settings(settings))
    # The last files are in use until their videos are decoded, long after the last one was fetched.
    with closing(fetcher), closing(fetched), closing(decoded):
        try:
            for item in decoded:
                if item is not None:
                    fetcher.release(item.outcome.record_id, keep=item.outcome.frames is not None)
                    row = drawn.pop(item.outcome.record_id)
                    batch.add(named_by_address(item, row, downloaded.pop(row.record_id, "")), row)
                if (landed := batch.land_due()) is not None:
                    yield landed
            if not batch.is_empty():
                yield batch.land()
        except BaseException as stop:
            decoded.close()
            if not batch.is_empty():
                landed = batch.land()
                if not isinstance(stop, GeneratorExit):  # a caller that closes takes nothing more
                    yield landed
            raise


def _jobs(
    fetched: Iterable[Fetched | None], settings: Settings, downloaded: dict[int, str]
) -> Iterator[DecodeJob | Decoded | None]:
    """A job for each row whose file was fetched, a failure for each other row, None while none is ready.

    Where a file was downloaded to is noted by record.
    """
    for item in fetched:
        if item is None:
            yield None
        elif item.path is not None:
            if Fetcher.is_remote(item.row):
                downloaded[item.row.record_id] = str(item.path)
            yield DecodeJob.of(item.row, item.path, settings)
        elif item.error is not None:
            yield Decoded(Outcome(item.row.record_id, failure=_fetch_failure(item.row, item.error)))


def named_by_address(decoded: Decoded, row: VideoRow, cached: str) -> Decoded:
    """A failure of a downloaded file that names its address, not the file of the cache that is gone soon."""
    failure = decoded.outcome.failure
    if failure is None or not cached:
        return decoded
    shown = brief_address(row.uri)
    message, details = (_renamed(text, cached, shown) for text in (failure.message, failure.details))
    return replace(
        decoded, outcome=replace(decoded.outcome, failure=replace(failure, message=message, details=details))
    )


def _renamed(text: str, path: str, name: str) -> str:
    """A text in which a path stands, as it is or as Python quotes it."""
    return text.replace(path, name).replace(repr(path)[1:-1], name)


def _fetch_failure(row: VideoRow, error: BaseException) -> Failure:
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
    """Finished videos that wait for their shard, and failures that wait for others."""

    def __init__(self, store: FrameStore, partition: IdRange, settings: Settings) -> None:
        self._store, self._partition, self._max_videos = store, partition, settings.shard_records
        self._videos: list[EncodedFrames] = []
        self._failures: list[Failure] = []
        self._bytes = 0
        self._cpu_seconds = 0.0
        self._oldest = self._last_landing = time.monotonic()

    def add(self, decoded: Decoded, row: VideoRow) -> None:
        outcome = decoded.outcome
        self._cpu_seconds += decoded.cpu_seconds
        if outcome.failure is not None:
            self._failures.append(outcome.failure)
        if outcome.frames is not None:
            if not self._videos:
                self._oldest = time.monotonic()
            self._videos.append(replace(outcome.frames, address=row.address, claim=row.claim))
            self._bytes += sum(map(len, outcome.frames.jpegs))

    def is_empty(self) -> bool:
        return not self._videos and not self._failures

    def land_due(self) -> LandedShard | None:
        """Store the videos of a shard that is full or old; else hand on the failures that have waited for others."""
        now = time.monotonic()
        is_old = bool(self._videos) and now - self._oldest >= _MAX_SHARD_SECONDS
        if is_old or len(self._videos) >= self._max_videos or self._bytes >= _MAX_SHARD_BYTES:
            return self.land()
        return self._landed(None, ()) if self._failures and now - self._last_landing >= _FAILURE_SECONDS else None

    def land(self) -> LandedShard:
        """Store the videos; an interruption while writing leaves them here, to be landed again."""
        videos, shard = tuple(self._videos), None
        try:
            if videos:
                shard = self._store.write_shard(self._partition, videos)
        except Exception:
            self._clear_videos()  # the store refused: their rows are decoded again, later
            raise
        landed = self._landed(shard, videos)
        self._clear_videos()
        return landed

    def _landed(self, shard: FrameShard | None, videos: Sequence[EncodedFrames]) -> LandedShard:
        landed = LandedShard(
            shard=shard,
            failures=tuple(self._failures),
            cpu_seconds=self._cpu_seconds,
            num_videos=len(videos),
            num_frames=shard.num_frames if shard else 0,
            num_bytes=shard.size_bytes if shard else 0,
            previews=_previews(videos),
        )
        self._failures.clear()
        self._cpu_seconds, self._last_landing = 0.0, time.monotonic()
        return landed

    def _clear_videos(self) -> None:
        self._videos.clear()
        self._bytes = 0


def _previews(videos: Sequence[EncodedFrames]) -> tuple[Preview, ...]:
    """The middle frames of a few of the videos, evenly spread."""
    few = [videos[index] for index in evenly(len(videos), min(len(videos), _PREVIEWS_PER_SHARD))]
    return tuple(map(preview_of, few))


def preview_of(video: EncodedFrames) -> Preview:
    """The middle frame of a video."""
    middle = len(video) // 2
    return Preview(video.record_id, float(video.pts_seconds[middle]), bytes(video.jpegs[middle]))
