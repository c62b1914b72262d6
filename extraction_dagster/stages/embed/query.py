"""A query: an image or a video made into vectors that can be compared with the stored ones."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors.embed import QueryImageError, QueryVideoError
from extraction_dagster.files import read_small
from extraction_dagster.records import VideoRow
from extraction_dagster.stages.decode.jpeg import decode_frames
from extraction_dagster.stages.decode.task import DecodeJob
from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_as_ready
from extraction_dagster.stages.embed.passes import normalise
from extraction_dagster.stages.embed.runtime import batch_size

if TYPE_CHECKING:
    from extraction_dagster.records import EncodedFrames
    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.embed.models.interface import EmbeddingModel

MAX_QUERY_PIXELS = 100_000_000
MAX_QUERY_FRAMES = 32
_MAX_BYTES = 256 * 2**20
_HEADER_BYTES = 30
_EXPECTED = "a JPEG, PNG, WebP, BMP or GIF image"


def load_query_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_QUERY_PIXELS) -> np.ndarray:
    """Read an image file, turned upright as its EXIF orientation says; a GIF's first picture.

    Args:
        path: Local file. What it is shows in its first bytes, whatever its name ends in.
        max_pixels: The most pixels, looked up in the header before anything is decoded.

    Returns:
        uint8, shape (H, W, 3), RGB.

    Raises:
        QueryImageError: There is no such file, it is no image, it is damaged, or it has too many pixels.
    """
    import cv2

    shown = str(path)
    data = _read(Path(path))
    size = _size_px(data)
    if size is None:
        raise QueryImageError(shown, f"a file that starts with {data[:8]!r}", _EXPECTED)
    if not 0 < size[0] * size[1] <= max_pixels:
        raise QueryImageError(shown, f"{size[0]}x{size[1]} pixels", f"1 to {max_pixels} pixels in all")
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise QueryImageError(shown, f"damaged data ({error.err})", _EXPECTED) from error
    if bgr is None:
        raise QueryImageError(shown, "damaged data", _EXPECTED)
    return np.ascontiguousarray(bgr[:, :, ::-1])


def embed_query_image(model: EmbeddingModel, image: np.ndarray, *, shown: str = "query") -> np.ndarray:
    """The vector of one image, made as the stored ones are, but kept in float32.

    Args:
        model: The model that made the stored vectors.
        image: uint8, shape (H, W, 3), RGB.
        shown: What to call the image in an error.

    Returns:
        float32, shape (dim,), length 1.

    Raises:
        QueryImageError: The model gives it a vector that can't be searched for.
    """
    vectors, faults = normalise(model.embed_images([image]))
    if faults[0]:
        raise QueryImageError(shown, f"a vector with {faults[0]} from model {model.name!r}", "finite values")
    vector: np.ndarray = vectors[0]
    return vector


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
    frames = _decode(file.resolve(), _for_few_frames(settings, max_frames), shown)
    frames = _only(frames, spread(len(frames), max_frames))
    pictures = decode_frames(frames).data
    size = batch_size(settings, model.device)
    raw = np.concatenate(
        [model.embed_images(pictures[start : start + size]) for start in range(0, len(pictures), size)]
    )
    vectors, faults = normalise(raw)
    good = np.array([fault is None for fault in faults])
    if not good.any():
        raise QueryVideoError(shown, f"model {model.name!r} gives its frames vectors with {faults[0]}.")
    kept = np.flatnonzero(good)
    return QueryVideo(vectors[good], frames.pts_seconds[kept], tuple(frames.jpegs[index] for index in kept.tolist()))


def spread(count: int, most: int) -> np.ndarray:
    """Indices of `most` of `count` frames, or of all of them: evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


def _for_few_frames(settings: Settings, most: int) -> Settings:
    """The settings with which no more frames are decoded than are used."""
    fewer = {name: min(getattr(settings, name), most) for name in ("max_frames", "num_frames", "min_frames")}
    return settings.model_copy(update=fewer)


def _only(frames: EncodedFrames, chosen: np.ndarray) -> EncodedFrames:
    names = ("pts_seconds", "target_seconds", "frame_number")
    arrays = {name: getattr(frames, name)[chosen] for name in names}
    return replace(frames, jpegs=[frames.jpegs[index] for index in chosen], **arrays)


def _decode(file: Path, settings: Settings, shown: str) -> EncodedFrames:
    job = DecodeJob.of(VideoRow(0, str(file)), file, settings)
    (decoded,) = filter(None, decode_as_ready([job], replace(PoolOptions.from_settings(settings), workers=1)))
    failure, frames = decoded.outcome.failure, decoded.outcome.frames
    if frames is None:
        said = failure.message if failure else "it gave no frame."
        # The rest of the sentence is about a record's row, and a query has none.
        raise QueryVideoError(shown, said.removeprefix("Record 0: ").partition(" Nothing was written")[0])
    return frames


def _read(path: Path) -> bytes:
    try:
        found = read_small(path.resolve(), max_bytes=_MAX_BYTES)  # no pipe is waited at
    except ValueError:
        raise QueryImageError(str(path), f"more than {_MAX_BYTES} bytes", f"at most {_MAX_BYTES}") from None
    except OSError as error:
        said = os.strerror(errno.EISDIR) if path.is_dir() else error.strerror or str(error)
        raise QueryImageError(str(path), said, "a file that can be read") from error
    if found is None:
        raise QueryImageError(str(path), os.strerror(errno.ENOENT), "a file that can be read")
    return found


def _size_px(data: bytes) -> tuple[int, int] | None:
    """Width and height from the header, or None for any other kind of file."""
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_size_px(data)
    if len(data) < _HEADER_BYTES:
        return None
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return struct.unpack_from(">II", data, 16)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return struct.unpack_from("<HH", data, 6)
    if data.startswith(b"BM"):
        width, height = struct.unpack_from("<ii", data, 18)
        return abs(width), abs(height)  # a negative height says that rows run downwards
    return _webp_size_px(data) if data.startswith(b"RIFF") and data[8:12] == b"WEBP" else None


def _jpeg_size_px(data: bytes) -> tuple[int, int] | None:
    import simplejpeg  # noqa: PLC0415 - only a search needs it

    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return width, height


def _webp_size_px(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8 ":  # lossy: 14 bits each
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":  # lossless: 14 bits each, less one, packed
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":  # extended: 24 bits each, less one
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None
