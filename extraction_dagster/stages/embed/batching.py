"""Full batches out of small pieces, and smaller batches when memory runs out.

Videos have few frames each; a forward pass is cheapest with all its places filled. So frames of neighbouring videos
share a batch:

    pieces    |a a a a a|b b|c c c c c c|
    batches   |a a a a|a b b c|c c c c|c|

and the vectors are dealt out again piece by piece, in the pieces' order.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from extraction_dagster.errors.embed import EmbeddingMemoryError, ModelOutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from extraction_dagster.stages.embed.models.interface import EmbeddingModel
    from extraction_dagster.stages.embed.passes import Pending

_log = logging.getLogger(__name__)
T = TypeVar("T")
_MOST_UNDER_WAY = 2
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")


class BatchEmbedder:
    """Embeds batches of at most `batch_size` frames; when memory runs out it halves that for good and tries again.

    On a GPU a pass goes on while the caller makes the next batch; on the CPU it is over when `push` returns.
    """

    def __init__(self, model: EmbeddingModel, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self._under_way: deque[tuple[np.ndarray, Pending]] = deque()

    def push(self, pixels: np.ndarray) -> Iterator[np.ndarray]:
        """Start passes over prepared pixels, uint8 (N, h, w, 3).

        Yields:
            Vectors, float32 (n, dim), not normalised, in the order in which their pixels were pushed; the last ones may
            come out of `finish` alone.

        Raises:
            EmbeddingMemoryError: Not even one frame fits into memory.
            ModelOutputError: The model gave something else than one vector per frame.
        """
        while len(pixels):
            batch, pixels = pixels[: self.batch_size], pixels[self.batch_size :]
            pending = self._attempt(partial(self.model.start, batch), len(batch))
            if pending is None:
                yield from self.finish()  # what is under way holds memory too
                yield from self._one_after_another(batch)
                continue
            self._under_way.append((batch, pending))
            while self._under_way and (len(self._under_way) >= _MOST_UNDER_WAY or self._under_way[0][1].done()):
                yield from self._take()

    def finish(self) -> Iterator[np.ndarray]:
        """Wait for every pass under way; yields and raises as `push` does."""
        while self._under_way:
            yield from self._take()

    def _take(self) -> Iterator[np.ndarray]:
        batch, pending = self._under_way.popleft()
        vectors = self._attempt(pending.result, len(batch))
        if vectors is None:
            yield from self._one_after_another(batch)
        else:
            yield self._checked(vectors, len(batch))

    def _one_after_another(self, pixels: np.ndarray) -> Iterator[np.ndarray]:
        """Passes that are each waited for before the next: they need the least memory."""
        while len(pixels):
            batch = pixels[: self.batch_size]
            vectors = self._attempt(partial(self.model.embed_prepared, batch), len(batch), last=len(batch) == 1)
            if vectors is not None:
                yield self._checked(vectors, len(batch))
                pixels = pixels[len(batch) :]

    def _attempt(self, work: Callable[[], T], num_frames: int, *, last: bool = False) -> T | None:
        """What the work gives; None after memory ran out and the batch size was halved."""
        try:
            return work()
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            if last:
                raise EmbeddingMemoryError(self.model.name, self.model.device, str(error).split("\n")[0]) from error
            self.batch_size = max(1, num_frames // 2)
        # Out here the error is gone, and with its traceback the failed pass's tensors: their memory can be given back.
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        said = "Out of memory on %s with %d frames a batch; going on with %d"
        _log.warning(said, self.model.device, num_frames, self.batch_size)
        return None

    def _checked(self, vectors: np.ndarray, num_frames: int) -> np.ndarray:
        if vectors.shape != (num_frames, self.model.dim) or vectors.dtype != np.float32:
            got = f"{vectors.dtype} {vectors.shape}"
            raise ModelOutputError(self.model.name, got, f"float32 {(num_frames, self.model.dim)}")
        return vectors


def _is_out_of_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError is CUDA's; the CPU's and MPS's allocators, cuBLAS and cuDNN raise a bare RuntimeError.
    torch = sys.modules.get("torch")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError) if torch else MemoryError):
        return True
    says = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in says for words in _MEMORY_WORDS)


@dataclass(slots=True)
class _Unfinished(Generic[T]):
    """A piece whose vectors are not all there yet."""

    tag: T
    missing: int
    vectors: list[np.ndarray] = field(default_factory=list)


def embed_pieces(pieces: Iterable[tuple[T, np.ndarray]], embedder: BatchEmbedder) -> Iterator[tuple[T, np.ndarray]]:
    """Embed pieces in full batches that cross their borders.

    Args:
        pieces: A tag and its prepared pixels, uint8 (n, h, w, 3). A piece without frames marks a place in the stream:
            it comes out when everything before it is embedded.
        embedder: Embeds a batch.

    Yields:
        The same tags in the same order, each with its vectors, float32 (n, dim), not normalised.
    """
    waiting: deque[_Unfinished[T]] = deque()
    buffered: list[np.ndarray] = []
    for tag, pixels in pieces:
        waiting.append(_Unfinished(tag, len(pixels)))
        if len(pixels):
            buffered.append(pixels)
        while sum(map(len, buffered)) >= embedder.batch_size:
            batch, buffered = _cut(buffered, embedder.batch_size)
            _deal(waiting, embedder.push(batch))
        yield from _finished(waiting, embedder.model.dim)
    if buffered:
        _deal(waiting, embedder.push(np.concatenate(buffered)))
    _deal(waiting, embedder.finish())
    yield from _finished(waiting, embedder.model.dim)


def _cut(buffered: list[np.ndarray], size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    joined = buffered[0] if len(buffered) == 1 else np.concatenate(buffered)
    return joined[:size], [joined[size:]] if len(joined) > size else []


def _deal(waiting: deque[_Unfinished[T]], batches: Iterable[np.ndarray]) -> None:
    for vectors in batches:
        for piece in waiting:
            taken, vectors = vectors[: piece.missing], vectors[piece.missing :]  # noqa: PLW2901 - what is left to deal
            piece.vectors.append(taken)
            piece.missing -= len(taken)
            if not len(vectors):
                break


def _finished(waiting: deque[_Unfinished[T]], dim: int) -> Iterator[tuple[T, np.ndarray]]:
    while waiting and not waiting[0].missing:
        piece = waiting.popleft()
        yield piece.tag, np.concatenate(piece.vectors) if piece.vectors else np.empty((0, dim), np.float32)
