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
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from extraction_dagster.errors import EmbeddingMemoryError, ModelOutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from extraction_dagster.stages.embed.model import EmbeddingModel

_log = logging.getLogger(__name__)
T = TypeVar("T")


class BatchEmbedder:
    """Embeds batches of at most `batch_size`; when memory runs out it halves that for good and tries again."""

    def __init__(self, model: EmbeddingModel, batch_size: int) -> None:
        """Start with the configured batch size."""
        self.model = model
        self.batch_size = batch_size

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Vectors of prepared pixels, float32 (N, dim), not normalised.

        Raises:
            EmbeddingMemoryError: A single frame is too much.
            ModelOutputError: The model gave something else than one vector per frame.
        """
        vectors = np.empty((len(pixels), self.model.dim), np.float32)
        start = 0
        while start < len(pixels):
            part = self._attempt(pixels[start : start + self.batch_size])
            if part is not None:
                vectors[start : start + len(part)] = part
                start += len(part)
        return vectors

    def _attempt(self, pixels: np.ndarray) -> np.ndarray | None:
        """The vectors; None after memory ran out and the batch size was halved."""
        try:
            vectors = self.model.embed_prepared(pixels)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            if len(pixels) == 1:
                raise EmbeddingMemoryError(self.model.name, self.model.device, str(error).split("\n")[0]) from error
            self.batch_size = max(1, len(pixels) // 2)
        else:
            self._check(vectors, len(pixels))
            return vectors
        # Here the error, and with its traceback the failed pass's tensors, is gone: their memory can be given back.
        _release_device_memory()
        _log.warning(
            "Out of memory on %s with %d frames a batch; going on with %d",
            self.model.device,
            len(pixels),
            self.batch_size,
        )
        return None

    def _check(self, vectors: np.ndarray, num_frames: int) -> None:
        if vectors.shape != (num_frames, self.model.dim) or vectors.dtype != np.float32:
            got = f"{vectors.dtype} {vectors.shape}"
            raise ModelOutputError(self.model.name, got, f"float32 {(num_frames, self.model.dim)}")


def _is_out_of_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError is CUDA's; the CPU's and MPS's allocators raise a bare RuntimeError.
    says = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in says or "can't allocate memory" in says)
    )


def _release_device_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@dataclass(slots=True)
class _Open(Generic[T]):
    """A piece whose vectors are not all there yet."""

    tag: T
    missing: int
    vectors: list[np.ndarray] = field(default_factory=list)


def embed_pieces(pieces: Iterable[tuple[T, np.ndarray]], embedder: BatchEmbedder) -> Iterator[tuple[T, np.ndarray]]:
    """Embed pieces in full batches that cross their borders.

    Args:
        pieces: A tag and its prepared pixels, uint8 (n, h, w, 3). A piece without frames is a mark in the stream: it
            comes out once everything before it is embedded.
        embedder: Embeds a batch.

    Yields:
        The same tags in the same order, each with its vectors, float32 (n, dim), not normalised.
    """
    waiting: deque[_Open[T]] = deque()
    buffered: list[np.ndarray] = []
    for tag, pixels in pieces:
        waiting.append(_Open(tag, len(pixels)))
        if len(pixels):
            buffered.append(pixels)
        while sum(map(len, buffered)) >= embedder.batch_size:
            batch, buffered = _cut(buffered, embedder.batch_size)
            _deal(waiting, embedder.embed(batch))
        yield from _finished(waiting, embedder.model.dim)
    if buffered:
        _deal(waiting, embedder.embed(np.concatenate(buffered)))
    yield from _finished(waiting, embedder.model.dim)


def _cut(buffered: list[np.ndarray], size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    joined = buffered[0] if len(buffered) == 1 else np.concatenate(buffered)
    return joined[:size], [joined[size:]] if len(joined) > size else []


def _deal(waiting: deque[_Open[T]], vectors: np.ndarray) -> None:
    for piece in waiting:
        taken, vectors = vectors[: piece.missing], vectors[piece.missing :]
        piece.vectors.append(taken)
        piece.missing -= len(taken)
        if not len(vectors):
            return


def _finished(waiting: deque[_Open[T]], dim: int) -> Iterator[tuple[T, np.ndarray]]:
    while waiting and not waiting[0].missing:
        piece = waiting.popleft()
        yield piece.tag, np.concatenate(piece.vectors) if piece.vectors else np.empty((0, dim), np.float32)
