"""A query video: a file made into vectors, by the same way as the stored ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors.embed import QueryVideoError
from extraction_dagster.records import VideoRow
from extraction_dagster.stages.decode.jpeg import decode_frames
from extraction_dagster.stages.decode.task import DecodeJob
from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_all
from extraction_dagster.stages.embed.runtime import batch_size
from extraction_dagster.stages.embed.vectors import normalise

if TYPE_CHECKING:
    import os

    from extraction_dagster.records import EncodedFrames
    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.embed.models.registry import EmbeddingModel

MAX_QUERY_FRAMES = 32


@dataclass(frozen=True, slots=True)
class QueryVideo:
    """A query video's frames.

    Attributes:
        vectors: float32, shape (N, dim), length 1.
        pts_seconds: float64, shape (N,).
        jpegs: The N frames, as JPEG.
    """

    vectors: np.ndarray
    pts_seconds: np.ndarray
    jpegs: tuple[bytes, ...]


def embed_query_video(
    model: EmbeddingModel, path: str | os.PathLike[str], settings: Settings, *, max_frames: int = MAX_QUERY_FRAMES
) -> QueryVideo:
    """Sample a video as the settings say and embed its frames; of more than `max_frames`, evenly spread ones.

    The file is decoded in a process of its own, within the limits that hold for every video.

    Raises:
        QueryVideoError: There is no such file, it can't be decoded, or no frame of it can be searched for.
    """
    shown, file = str(path), Path(path).absolute()
    if not file.is_file():
        raise QueryVideoError(shown, "there is no such file.")
    frames = _decode(file.resolve(), settings, shown)
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(max_frames, len(frames))).round().astype(int))
    pictures = decode_frames(frames).data[chosen]
    size = batch_size(settings, model.device)
    raw = np.concatenate(
        [model.embed_images(pictures[start : start + size]) for start in range(0, len(pictures), size)]
    )
    vectors, faults = normalise(raw)
    good = np.array([fault is None for fault in faults])
    if not good.any():
        raise QueryVideoError(shown, f"model {model.name!r} gives its frames vectors with {faults[0]}.")
    kept = chosen[good]
    return QueryVideo(vectors[good], frames.pts_seconds[kept], tuple(frames.jpegs[index] for index in kept))


def _decode(file: Path, settings: Settings, shown: str) -> EncodedFrames:
    job = DecodeJob.of(VideoRow(0, str(file)), file, settings)
    (decoded,) = decode_all([job], replace(PoolOptions.from_settings(settings), workers=1))
    failure, frames = decoded.outcome.failure, decoded.outcome.frames
    if frames is None:
        said = failure.message if failure else "it gave no frame."
        # What becomes of a record's row is no matter here.
        raise QueryVideoError(shown, said.removeprefix("Record 0: ").partition(" Nothing was written")[0])
    return frames
