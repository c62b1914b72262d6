"""Errors of one video: what it is, what its decoding did."""

from __future__ import annotations

from extraction_dagster.errors.base import ExtractionError


class VideoOpenError(ExtractionError):
    """A file can't be opened as a video."""

    def __init__(self, video: str, why: str) -> None:
        super().__init__(
            f"Video {video!r} can't be opened: {why}. Expected a complete file in a known container (mp4, webm, ts). "
            f"Nothing was written for it; the range goes on. Fetch the file again, then retry the record."
        )


class VideoFormatError(ExtractionError):
    """A file's format is one that is never opened: a playlist, a script, a picture."""

    permanent = True

    def __init__(self, video: str, allowed: str) -> None:
        super().__init__(
            f"Video {video!r} is refused: its content is not one of the containers that are opened ({allowed}). "
            f"Playlists, scripts and pictures are never followed, whatever their name. Convert the file to mp4."
        )


class NoVideoStreamError(ExtractionError):
    """A file holds no moving pictures that can be decoded."""

    permanent = True

    def __init__(self, video: str, found: str) -> None:
        super().__init__(
            f"Video {video!r} has no video stream that can be decoded: found {found}, expected at least one. "
            f"Cover art does not count. Nothing was written for it; the range goes on. Replace the file."
        )


class VideoEncryptedError(ExtractionError):
    """A video is encrypted; its frames would be noise."""

    permanent = True

    def __init__(self, video: str) -> None:
        super().__init__(
            f"Video {video!r} is encrypted: its frames would be noise. Nothing was written for it; the range goes on. "
            f"Replace it by a decrypted file."
        )


class VideoTooLargeError(ExtractionError):
    """A video's pictures have more pixels than allowed."""

    permanent = True

    def __init__(self, video: str, *, width_px: int, height_px: int, max_pixels: int) -> None:
        super().__init__(
            f"Video {video!r} is {width_px}x{height_px} ({width_px * height_px} pixels), expected at most "
            f"{max_pixels}. It was not decoded; the range goes on. Raise EXTRACTION_MAX_PIXELS if it is meant."
        )


class VideoTooLongError(ExtractionError):
    """A video is longer than allowed."""

    permanent = True

    def __init__(self, video: str, *, seconds: float, max_seconds: float) -> None:
        super().__init__(
            f"Video {video!r} lasts {seconds:.0f} s or more, expected at most {max_seconds:.0f} s. It was not decoded; "
            f"the range goes on. Raise EXTRACTION_MAX_DURATION_SECONDS if it is meant."
        )


class FramesTooManyError(ExtractionError):
    """The sampled frames of one video do not fit the memory set aside for them."""

    permanent = True

    def __init__(self, video: str, *, num_frames: int, needed_bytes: int, max_bytes: int) -> None:
        super().__init__(
            f"Video {video!r} would give {num_frames} frames of {needed_bytes} bytes together, expected at most "
            f"{max_bytes}. It was not decoded; the range goes on. Lower EXTRACTION_FPS, EXTRACTION_MAX_FRAMES or "
            f"EXTRACTION_SHORT_SIDE_PX, or raise EXTRACTION_DECODE_MEMORY_BYTES."
        )


class VideoDecodeError(ExtractionError):
    """No sampled frame of a video decodes."""

    def __init__(self, video: str, *, listed_frames: int, why: str) -> None:
        listed = f" of the {listed_frames} that it lists" if listed_frames else ""
        super().__init__(
            f"Video {video!r} decoded 0 frames{listed}, expected at least 1: {why}. Nothing was written for it; the "
            f"range goes on. Fetch the file again, then retry the record."
        )


class DecoderMissingError(ExtractionError):
    """The chosen decoder is not installed."""

    def __init__(self, decoder: str, why: str) -> None:
        super().__init__(
            f"Decoder {decoder!r} can't be imported: {why}. Install it, or set EXTRACTION_DECODER to another one."
        )


class DecodeTimeoutError(ExtractionError):
    """A video took longer than its wall-clock limit."""

    def __init__(self, video: str, *, seconds: float) -> None:
        super().__init__(
            f"Video {video!r} was not decoded within {seconds:g} s; its worker was stopped and replaced. Nothing was "
            f"written for it; the range goes on. Raise EXTRACTION_DECODE_TIMEOUT_SECONDS if it is just long."
        )


class DecodeMemoryError(ExtractionError):
    """A video needed more memory than a worker may use."""

    def __init__(self, video: str, *, limit_bytes: int) -> None:
        super().__init__(
            f"Video {video!r} needs more than the {limit_bytes} bytes of memory that a worker may use. Nothing was "
            f"written for it; the range goes on. Raise EXTRACTION_DECODE_MEMORY_BYTES if it is meant."
        )


class DecodeWorkerDiedError(ExtractionError):
    """The process that decoded a video died."""

    def __init__(self, video: str, *, how: str) -> None:
        super().__init__(
            f"Video {video!r} ended its worker process ({how}), which was replaced. Nothing was written for it; the "
            f"range goes on. If this repeats, the file is hostile or the machine is short of memory."
        )


class DecodeWorkerStartError(ExtractionError):
    """A decoding process can't start: no video is to blame."""

    def __init__(self, how: str, said: str) -> None:
        super().__init__(
            f"A decoding worker did not start ({how}). No record is to blame; finished shards are kept. "
            f"Its last words: {said or 'none'}."
        )


class FramesRejectedError(ExtractionError):
    """The quality steps left nothing of a video."""

    permanent = True

    def __init__(self, path: str, *, num_frames: int) -> None:
        super().__init__(
            f"Video {path!r} kept 0 of {num_frames} sampled frames, expected at least 1: all are of a single colour. "
            f"Nothing was written for it; the range goes on. Set EXTRACTION_MIN_FRAMES=1 to keep one of them, or "
            f"EXTRACTION_REJECT_SOLID=false."
        )
