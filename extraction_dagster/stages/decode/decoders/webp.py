"""Animated WebP, which libavcodec 62 does not decode: by OpenCV's libwebp.

    RIFF size WEBP   VP8X: size of the picture   ANIM   ANMF: duration, pixels   ANMF …

Sizes, times and the number of frames are read from these chunks before anything is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors.decode import VideoDecodeError, VideoTooLargeError, VideoTooLongError
from extraction_dagster.stages.decode.decoders.decoder import DecodedVideo, DecodeLimits
from extraction_dagster.stages.decode.decoders.geometry import Geometry
from extraction_dagster.stages.decode.sampling import Sampling, select_frames

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extraction_dagster.stages.decode.decoders.container import VideoFile

_HEAD_BYTES, _CHUNK_HEAD_BYTES = 12, 8
_SIZE_AT, _DURATION_AT = 4, 12  # in a VP8X and in an ANMF chunk, 3 bytes each
_CHANNELS = 4
_UNSAID_MS = 100  # how long browsers show a frame that says 0


@dataclass(frozen=True, slots=True)
class _Header:
    width_px: int
    height_px: int
    durations_ms: tuple[int, ...]


def decode_webp(file: VideoFile, sampling: Sampling, short_side_px: int, limits: DecodeLimits) -> DecodedVideo:
    """Decode the sampled frames of an animated WebP; see `Decoder`. Transparency is shown on black."""
    import av
    from av.video.reformatter import VideoReformatter

    path, content = file.path, file.reading().read(limits.max_batch_bytes)
    header = _header(content)
    _check(file, header, limits)
    ends = np.cumsum(header.durations_ms) / 1000
    seconds = np.concatenate([[0.0], ends[:-1]])
    selection = select_frames(seconds, sampling)
    needed = (len(header.durations_ms) + len(selection)) * _CHANNELS
    limits.check_batch(path, num_frames=needed // 3, width_px=header.width_px, height_px=header.height_px)
    frames = _decode(file, content, len(header.durations_ms))
    reformatter, pictures = VideoReformatter(), []
    for number in selection.frame_number:
        frame = av.VideoFrame.from_ndarray(_on_black(frames[number]), format="bgr24")
        geometry = Geometry.of(frame, sample_aspect=1.0, short_side_px=short_side_px)
        pictures.append(geometry.show(frame, reformatter))
    notes = (f"an animated WebP: webp, {header.width_px}x{header.height_px}", "transparency: on black")
    return DecodedVideo(selection.batch(np.stack(pictures), seconds), float(ends[-1]), None, notes)


def _check(file: VideoFile, header: _Header, limits: DecodeLimits) -> None:
    width, height, seconds = header.width_px, header.height_px, sum(header.durations_ms) / 1000
    if not header.durations_ms:
        why = file.saying_what("no frame is in it")
        raise VideoDecodeError(str(file.path), listed_frames=0, why=why)
    if width * height > limits.max_pixels:
        raise VideoTooLargeError(str(file.path), width_px=width, height_px=height, max_pixels=limits.max_pixels)
    if seconds > limits.max_duration_seconds:
        raise VideoTooLongError(str(file.path), seconds=seconds, max_seconds=limits.max_duration_seconds)


def _decode(file: VideoFile, content: bytes, num_frames: int) -> list[np.ndarray]:
    import cv2

    try:
        done, animation = cv2.imdecodeanimation(np.frombuffer(content, np.uint8))
        frames = list(animation.frames)
    except cv2.error as error:
        raise VideoDecodeError(
            str(file.path), listed_frames=num_frames, why=file.saying_what(str(error.err))
        ) from error
    if not done or len(frames) < num_frames:
        why = file.saying_what(f"{len(frames)} frames decode")
        raise VideoDecodeError(str(file.path), listed_frames=num_frames, why=why)
    return frames


def _on_black(picture: np.ndarray) -> np.ndarray:
    """From BGRA to BGR, uint8, shape (H, W, 3)."""
    if picture.shape[2] < _CHANNELS:
        return np.ascontiguousarray(picture)
    shown: np.ndarray = (picture[..., :3].astype(np.uint16) * picture[..., 3:] + 127) // 255
    return shown.astype(np.uint8)


def _header(content: bytes) -> _Header:
    width = height = 0
    durations = []
    for name, at in _chunks(content):
        if name == b"VP8X":
            width, height = (
                int.from_bytes(content[at + n : at + n + 3], "little") + 1 for n in (_SIZE_AT, _SIZE_AT + 3)
            )
        elif name == b"ANMF":
            duration = int.from_bytes(content[at + _DURATION_AT : at + _DURATION_AT + 3], "little")
            durations.append(duration or _UNSAID_MS)
    return _Header(width, height, tuple(durations))


def _chunks(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Names of the outermost chunks, and where their content begins."""
    at = _HEAD_BYTES
    while at + _CHUNK_HEAD_BYTES <= len(content):
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        yield content[at : at + 4], at + _CHUNK_HEAD_BYTES
        at += _CHUNK_HEAD_BYTES + size + size % 2
