"""The embed stage: frame shards in, embedding shards out, one for one."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from extraction_dagster.errors.decode import StoredFrameError
from extraction_dagster.errors.embed import InvalidVectorError
from extraction_dagster.records import EmbeddingBatch, Failure
from extraction_dagster.stages.embed.batching import BatchEmbedder, embed_pieces
from extraction_dagster.stages.embed.passes import normalise
from extraction_dagster.stages.embed.runtime import batch_size, num_readers

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from extraction_dagster.errors import ExtractionError
    from extraction_dagster.records import EncodedFrames, IdRange
    from extraction_dagster.settings import Settings
    from extraction_dagster.shards.embedding_store import EmbeddingShard, EmbeddingStore
    from extraction_dagster.shards.frame_store import FrameShard, FrameStore
    from extraction_dagster.stages.embed.models.interface import EmbeddingModel

_PIECES_AHEAD = 4
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class EmbeddedShard:
    """The result of embedding a frame shard.

    Attributes:
        shard: Its embedding shard.
        failures: Its records that have no vector.
        num_frames: Vectors in it.
        cpu_seconds: CPU time of the whole process since the shard before it, reading ahead included; 0 if reused.
        wall_seconds: The same by the clock.
        reused: It was stored already; nothing was embedded.
    """

    shard: EmbeddingShard
    failures: tuple[Failure, ...]
    num_frames: int
    cpu_seconds: float
    wall_seconds: float
    reused: bool = False


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
        self.failure = self.failure or Failure(
            record_id=self.frames.record_id,
            content_version=self.frames.content_version,
            stage="embed",
            error_type=type(error).__name__,
            message=str(error),
            permanent=error.permanent,
        )


@dataclass(frozen=True, slots=True)
class _Piece:
    """A mark in the stream: some frames of a record, those that can't be read, or the end of its shard."""

    shard: FrameShard
    result: _Result | None
    frames: range = range(0)
    error: StoredFrameError | None = None


def embed_shards(  # noqa: PLR0913 - the shards and what handles them, each by name
    shards: Iterable[FrameShard],
    *,
    frames: FrameStore,
    store: EmbeddingStore,
    model: EmbeddingModel,
    partition: IdRange,
    settings: Settings,
    reuse: bool = True,
) -> Iterator[EmbeddedShard]:
    """Embed the frame shards of a partition.

    A shard whose embedding shard is stored already, of the same records and versions and without a failure that may
    pass, is not read again; so an interrupted run goes on at its first unfinished shard.

    Args:
        shards: Frame shards.
        frames: Reads them; only its `read` is called.
        store: Takes the vectors.
        model: The resident model.
        partition: The partition that the shards belong to.
        settings: embed_batch_size, embed_readers.
        reuse: Whether vectors that are stored already are kept; else every shard is embedded again.

    Yields:
        One result per shard: first those that were stored already, then the others in the order given, each once it is
        stored.

    Raises:
        EmbeddingMemoryError: Not even one frame fits into memory.
        ModelOutputError: The model gave something else than one vector per frame.
    """
    stored = {shard.name: shard for shard in store.shards(partition)}
    todo: list[FrameShard] = []
    for shard in shards:
        there = stored.get(shard.name)
        if reuse and there is not None and _is_current(there, shard):
            yield EmbeddedShard(there, there.failures, there.num_frames, 0.0, 0.0, reused=True)
        else:
            todo.append(shard)
    size, readers = batch_size(settings, model.device), num_readers(settings, model.device)
    clock = _Clock()
    with prefetch(
        _pieces(todo, frames, size), partial(_prepared, model), depth=_PIECES_AHEAD + readers, threads=readers
    ) as pieces:
        results: list[_Result] = []
        for piece, vectors in embed_pieces(pieces, BatchEmbedder(model, size)):
            if piece.result is None:
                written = _write(store, partition, piece.shard.name, results, model.dim)
                yield EmbeddedShard(written, written.failures, written.num_frames, *clock.lap())
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


def _is_current(there: EmbeddingShard, shard: FrameShard) -> bool:
    frames = {record.record_id: (record.content_version, record.num_frames) for record in shard.records}
    vectors = {record.record_id: (record.content_version, record.num_frames) for record in there.records}
    lost = {failure.record_id: failure.content_version for failure in there.failures if failure.permanent}
    return vectors.keys() <= frames.keys() and all(
        vectors.get(record_id) == expected or lost.get(record_id) == expected[0]
        for record_id, expected in frames.items()
    )


def _pieces(shards: Sequence[FrameShard], source: FrameStore, size: int) -> Iterator[_Piece]:
    """The stream of a reading thread: each record's frames, at most `size` at a time, then its shard's end."""
    for shard in shards:
        for frames in source.read(shard):
            result = _Result(frames)
            for start in range(0, len(frames), size):
                yield _Piece(shard, result, range(start, min(start + size, len(frames))))
        yield _Piece(shard, None)


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

    try:
        image: np.ndarray = simplejpeg.decode_jpeg(frames.jpegs[n], colorspace="RGB")
    except (ValueError, TypeError, RuntimeError) as error:
        raise StoredFrameError(frames.record_id, int(frames.frame_number[n]), str(error)) from error
    return image


def _write(
    store: EmbeddingStore, partition: IdRange, name: str, results: Sequence[_Result], dim: int
) -> EmbeddingShard:
    good = [result for result in results if result.failure is None]
    batch = EmbeddingBatch(
        vectors=np.concatenate([np.empty((0, dim), np.float16), *(part for result in good for part in result.vectors)]),
        record_id=np.repeat(
            np.array([result.frames.record_id for result in good], np.int64), [len(result.frames) for result in good]
        ),
        frame_number=np.concatenate([np.empty(0, np.int64), *(result.frames.frame_number for result in good)]),
        pts_seconds=np.concatenate([np.empty(0, np.float64), *(result.frames.pts_seconds for result in good)]),
    )
    return store.write(
        partition,
        name,
        batch,
        versions=[(result.frames.record_id, result.frames.content_version) for result in good],
        failures=[result.failure for result in results if result.failure is not None],
    )
