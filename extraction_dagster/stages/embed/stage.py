"""The embed stage: frame shards in, embedding shards out, one for one.

What is damaged is set aside: a shard, or the frames of a record of which one is no readable JPEG. These records fail,
and are decoded again by their next try; the others go on.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from extraction_dagster.errors.decode import FrameShardError, StoredFrameError
from extraction_dagster.errors.embed import InvalidVectorError
from extraction_dagster.media import stored_jpeg_fault
from extraction_dagster.records import EmbeddingBatch, Failure
from extraction_dagster.shards.store import ShardRecord
from extraction_dagster.stages.embed.batching import BatchEmbedder, embed_pieces
from extraction_dagster.stages.embed.passes import normalise
from extraction_dagster.stages.embed.runtime import batch_size, num_readers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from extraction_dagster.errors import ExtractionError
    from extraction_dagster.records import EncodedFrames, IdRange, VideoRow
    from extraction_dagster.settings import Settings
    from extraction_dagster.shards.embedding_store import EmbeddingShard, EmbeddingStore
    from extraction_dagster.shards.frame_store import FrameShard, FrameStore
    from extraction_dagster.stages.embed.models.interface import EmbeddingModel

_PIECES_AHEAD = 4
_MOST_PIECE_BYTES = 2**28  # of decoded frames that wait together
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class EmbeddedShard:
    """The result of embedding a frame shard.

    Attributes:
        shard: Its embedding shard; None when no record has vectors.
        failures: Its records that have none.
        cpu_seconds: CPU time of the whole process since the shard before it, reading ahead included.
        wall_seconds: The same by the clock.
    """

    shard: EmbeddingShard | None
    failures: tuple[Failure, ...]
    cpu_seconds: float
    wall_seconds: float

    @property
    def num_frames(self) -> int:
        """The vectors in it."""
        return self.shard.num_frames if self.shard else 0


@dataclass(slots=True)
class _Result:
    """A record's vectors so far, or its failure."""

    frames: EncodedFrames
    failure: Failure | None = None
    vectors: list[np.ndarray] = field(default_factory=list)

    def take(self, vectors: np.ndarray, model: EmbeddingModel) -> None:
        """Keep the next vectors, normalised; one that can't be searched for fails the record."""
        first = sum(map(len, self.vectors))
        unit, faults = normalise(vectors)
        self.vectors.append(unit.astype(np.float16))
        bad = next((n for n, fault in enumerate(faults) if fault), None)
        if bad is not None:
            number = int(self.frames.frame_number[first + bad])
            self.fail(InvalidVectorError(self.frames.record_id, number, model.name, str(faults[bad])))

    def fail(self, error: ExtractionError) -> None:
        """Mark the record as failed; its first error stays."""
        self.failure = self.failure or _failure(self.frames.record_id, self.frames.content_version, error)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A mark in the stream: some frames of a record, those that can't be read, or the end of its shard.

    At the end, the error is that of a shard that can't be read any further.
    """

    shard: FrameShard
    wanted: Collection[int]
    result: _Result | None = None
    frames: range = range(0)
    error: StoredFrameError | FrameShardError | None = None


def embed_shards(  # noqa: PLR0913 - the shards and what handles them, each by name
    parts: Iterable[tuple[FrameShard, Collection[int]]],
    *,
    frames: FrameStore,
    store: EmbeddingStore,
    model: EmbeddingModel,
    partition: IdRange,
    settings: Settings,
    rows: Mapping[int, VideoRow] | None = None,
) -> Iterator[EmbeddedShard]:
    """Embed records of frame shards.

    Args:
        parts: Frame shards, each with the records that are embedded.
        frames: Reads them, and sets aside what is damaged.
        store: Takes the vectors.
        model: The resident model.
        partition: The partition that the vectors belong to.
        settings: embed_batch_size, embed_readers.
        rows: Under which claim the vectors are made, and of which address; by default as their frames are.

    Yields:
        One result per shard, in the order given, once it is stored.

    Raises:
        EmbeddingMemoryError: Not even one frame fits into memory.
        ModelOutputError: The model gave something else than one vector per frame.
    """
    size, readers = batch_size(settings, model.device), num_readers(settings, model.device)
    clock = _Clock()
    with prefetch(
        _pieces(parts, frames, size), partial(_prepared, model), depth=_PIECES_AHEAD + readers, threads=readers
    ) as pieces:
        results: list[_Result] = []
        for piece, vectors in embed_pieces(pieces, BatchEmbedder(model, size)):
            if piece.result is None:
                written = _write(store, partition, results, model.dim, rows or {})
                failures = _failures(piece, results, frames)
                yield EmbeddedShard(written, failures, *clock.lap())
                results = []
                continue
            if not results or results[-1] is not piece.result:
                results.append(piece.result)
            if piece.error:
                piece.result.fail(piece.error)
            piece.result.take(vectors, model)


@contextmanager
def prefetch(items: Iterable[T], work: Callable[[T], R], *, depth: int, threads: int = 1) -> Generator[Iterator[R]]:
    """Draw items in a thread, and work on each in one of several, while the caller uses earlier ones.

    Args:
        items: Drawn in that thread alone, in order; what it raises is raised where its place in the order is.
        work: What is done to each; what it raises is likewise raised in its place.
        depth: The most items that wait, worked on or not.
        threads: How many are worked on at once.

    Yields:
        What the work made of each item, in the items' order. The threads have ended when the `with` ends, however it
        ends.
    """
    reader = ThreadPoolExecutor(1, thread_name_prefix="embed-reader")
    pool = ThreadPoolExecutor(threads, thread_name_prefix="embed-prepare")
    iterator = iter(items)

    def draw() -> Future[R] | None:
        for item in iterator:
            return pool.submit(work, item)
        return None

    def results() -> Iterator[R]:
        drawn = deque(reader.submit(draw) for _ in range(depth))
        while (working := drawn.popleft().result()) is not None:
            drawn.append(reader.submit(draw))
            yield working.result()

    try:
        yield results()
    finally:
        reader.shutdown(cancel_futures=True)
        pool.shutdown(cancel_futures=True)


class _Clock:
    """CPU and wall seconds since the last lap."""

    def __init__(self) -> None:
        self._last = (time.process_time(), time.perf_counter())

    def lap(self) -> tuple[float, float]:
        now = (time.process_time(), time.perf_counter())
        cpu, wall = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now
        return cpu, wall


def _failure(record_id: int, content_version: str, error: ExtractionError) -> Failure:
    name = type(error).__name__
    return Failure(record_id, content_version, "embed", name, str(error), permanent=error.permanent)


def _pieces(parts: Iterable[tuple[FrameShard, Collection[int]]], source: FrameStore, size: int) -> Iterator[_Piece]:
    """The stream of a reading thread: each record's frames, at most `size` at a time, then its shard's end.

    Very large frames come in smaller pieces.
    """
    for shard, wanted in parts:
        error = None
        try:
            for frames in source.read(shard, only=wanted):
                result = _Result(frames)
                step = max(1, min(size, _MOST_PIECE_BYTES // (3 * frames.width_px * frames.height_px)))
                for start in range(0, len(frames), step):
                    yield _Piece(shard, wanted, result, range(start, min(start + step, len(frames))))
        except FrameShardError as said:
            error = said
        yield _Piece(shard, wanted, error=error)


def _failures(end: _Piece, results: Sequence[_Result], frames: FrameStore) -> tuple[Failure, ...]:
    """The records of a shard that gave no vectors; what is damaged of it is set aside, so that it is made again."""
    failures = [result.failure for result in results if result.failure is not None]
    if end.error is not None:
        read = {result.frames.record_id for result in results}
        failures += [
            _failure(record.record_id, record.content_version, end.error)
            for record in end.shard.records
            if record.record_id in end.wanted and record.record_id not in read
        ]
    if isinstance(end.error, FrameShardError) and not end.error.gone:
        frames.set_aside(end.shard, "it is damaged")
    elif damaged := [failure.record_id for failure in failures if failure.error_type == StoredFrameError.__name__]:
        frames.set_aside(end.shard, "frames of it are no readable JPEG", records=damaged)
    return tuple(failures)


def _prepared(model: EmbeddingModel, piece: _Piece) -> tuple[_Piece, np.ndarray]:
    """The piece and its pixels; without any where a frame can't be read."""
    if piece.result is not None:
        try:
            return piece, model.prepare([_decode(piece.result.frames, n) for n in piece.frames])
        except StoredFrameError as error:
            piece = replace(piece, error=error)
    return piece, np.empty((0, 1, 1, 3), np.uint8)


def _decode(frames: EncodedFrames, n: int) -> np.ndarray:
    import simplejpeg  # noqa: PLC0415 - only a process that embeds needs it

    fault = stored_jpeg_fault(frames.jpegs[n], width_px=frames.width_px, height_px=frames.height_px)
    if fault is not None:
        raise StoredFrameError(frames.record_id, int(frames.frame_number[n]), fault)
    try:
        image: np.ndarray = simplejpeg.decode_jpeg(frames.jpegs[n], colorspace="RGB")
    except (ValueError, TypeError, RuntimeError) as error:
        raise StoredFrameError(frames.record_id, int(frames.frame_number[n]), str(error)) from error
    return image


def _write(
    store: EmbeddingStore, partition: IdRange, results: Sequence[_Result], dim: int, rows: Mapping[int, VideoRow]
) -> EmbeddingShard | None:
    good = [result for result in results if result.failure is None]
    if not good:
        return None
    batch = EmbeddingBatch(
        vectors=np.concatenate([np.empty((0, dim), np.float16), *(part for result in good for part in result.vectors)]),
        record_id=np.repeat(
            np.array([result.frames.record_id for result in good], np.int64), [len(result.frames) for result in good]
        ),
        frame_number=np.concatenate([result.frames.frame_number for result in good]),
        pts_seconds=np.concatenate([result.frames.pts_seconds for result in good]),
    )
    records = [_record(result.frames, rows.get(result.frames.record_id)) for result in good]
    return store.write(partition, store.next_name(), batch, records=records)


def _record(frames: EncodedFrames, row: VideoRow | None) -> ShardRecord:
    made_for = row or frames
    return ShardRecord(
        frames.record_id,
        frames.content_version,
        len(frames),
        address=made_for.address or frames.address,
        claim=made_for.claim,
    )
