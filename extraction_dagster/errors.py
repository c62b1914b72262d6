"""Every error that this project raises on purpose.

The caller passes facts, the class writes the sentence: the culprit, what was got, what was expected; what survives;
the fix. A class whose name a user may filter by (`extraction errors --type`) is part of the interface.
"""

from __future__ import annotations


class ExtractionError(Exception):
    """Base of the family.

    Attributes:
        permanent: Trying again can't help; the record is parked at once.
    """

    permanent: bool = False

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild the error from its finished sentence, so that it crosses process boundaries."""
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(kind: type[ExtractionError], args: tuple[object, ...], state: dict[str, object]) -> ExtractionError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class SettingsError(ExtractionError):
    """A setting is wrong, unknown, or does not fit another."""

    def __init__(self, setting: str, got: str, expected: str) -> None:
        """Name the setting, what was got and what was expected."""
        super().__init__(
            f"Setting {setting} is {got}, expected {expected}. Correct it in the environment or in .env; "
            f"'extraction doctor' lists every setting."
        )


class PartitionKeyError(ExtractionError):
    """A partition key is not a range of ids."""

    def __init__(self, key: str, why: str) -> None:
        """Name the key and what is wrong with it."""
        super().__init__(
            f"{key!r} is not a range of ids: {why}. Expected FIRST-LAST with both ends included, for example 1-1000."
        )


class RecordShapeError(ExtractionError):
    """A record between rooms was built from arrays that do not fit together; a bug, never a user's mistake."""

    def __init__(self, record: str, why: str, shapes: str) -> None:
        """Name the record, the rule and every shape."""
        super().__init__(f"{record} refused: {why}; got {shapes}.")


# Decoding


class VideoOpenError(ExtractionError):
    """A file can't be opened as a video."""

    def __init__(self, video: str, why: str) -> None:
        """Name the file and what the codec library said."""
        super().__init__(
            f"Video {video!r} can't be opened: {why}. Expected a complete file in a known container (mp4, webm, ts). "
            f"Nothing was written for it; the range goes on. Fetch the file again, then retry the record."
        )


class VideoFormatError(ExtractionError):
    """A file is of a kind that is never opened: a playlist, a script, a picture."""

    permanent = True

    def __init__(self, video: str, allowed: str) -> None:
        """Name the file and the containers that are opened."""
        super().__init__(
            f"Video {video!r} is refused: its content is not one of the containers that are opened ({allowed}). "
            f"Playlists, scripts and pictures are never followed, whatever their name. Convert the file to mp4."
        )


class NoVideoStreamError(ExtractionError):
    """A file holds no moving pictures that can be decoded."""

    permanent = True

    def __init__(self, video: str, found: str) -> None:
        """Name the file and what it holds instead."""
        super().__init__(
            f"Video {video!r} has no video stream that can be decoded: found {found}, expected at least one. "
            f"Cover art does not count. Nothing was written for it; the range goes on. Replace the file."
        )


class VideoEncryptedError(ExtractionError):
    """A video is encrypted; its frames would be noise."""

    permanent = True

    def __init__(self, video: str) -> None:
        """Name the file."""
        super().__init__(
            f"Video {video!r} is encrypted: its frames would be noise. Nothing was written for it; the range goes on. "
            f"Replace it by a decrypted file."
        )


class VideoTooLargeError(ExtractionError):
    """A video's pictures have more pixels than allowed."""

    permanent = True

    def __init__(self, video: str, *, width_px: int, height_px: int, max_pixels: int) -> None:
        """Name the file, its size and the limit."""
        super().__init__(
            f"Video {video!r} is {width_px}x{height_px} ({width_px * height_px} pixels), expected at most "
            f"{max_pixels}. It was not decoded; the range goes on. Raise EXTRACTION_MAX_PIXELS if it is meant."
        )


class VideoTooLongError(ExtractionError):
    """A video is longer than allowed."""

    permanent = True

    def __init__(self, video: str, *, seconds: float, max_seconds: float) -> None:
        """Name the file, its length and the limit."""
        super().__init__(
            f"Video {video!r} lasts {seconds:.0f} s or more, expected at most {max_seconds:.0f} s. It was not decoded; "
            f"the range goes on. Raise EXTRACTION_MAX_DURATION_SECONDS if it is meant."
        )


class FramesTooManyError(ExtractionError):
    """The sampled frames of one video do not fit the memory set aside for them."""

    permanent = True

    def __init__(self, video: str, *, num_frames: int, needed_bytes: int, max_bytes: int) -> None:
        """Name the file, the frames and both sizes."""
        super().__init__(
            f"Video {video!r} would give {num_frames} frames of {needed_bytes} bytes together, expected at most "
            f"{max_bytes}. It was not decoded; the range goes on. Lower EXTRACTION_FPS, EXTRACTION_MAX_FRAMES or "
            f"EXTRACTION_SHORT_SIDE_PX, or raise EXTRACTION_DECODE_MEMORY_BYTES."
        )


class VideoDecodeError(ExtractionError):
    """No sampled frame of a video decodes."""

    def __init__(self, video: str, *, listed_frames: int, why: str) -> None:
        """Name the file, how many frames it lists and what the codec library said."""
        listed = f" of the {listed_frames} that it lists" if listed_frames else ""
        super().__init__(
            f"Video {video!r} decoded 0 frames{listed}, expected at least 1: {why}. Nothing was written for it; the "
            f"range goes on. Fetch the file again, then retry the record."
        )


class DecoderMissingError(ExtractionError):
    """The chosen decoder is not installed."""

    def __init__(self, decoder: str, why: str) -> None:
        """Name the decoder and why it can't be imported."""
        super().__init__(
            f"Decoder {decoder!r} can't be imported: {why}. Install it, or set EXTRACTION_DECODER to another one."
        )


class DecodeTimeoutError(ExtractionError):
    """A video took longer than its wall-clock limit."""

    def __init__(self, video: str, *, seconds: float) -> None:
        """Name the file and the limit."""
        super().__init__(
            f"Video {video!r} was not decoded within {seconds:g} s; its worker was stopped and replaced. Nothing was "
            f"written for it; the range goes on. Raise EXTRACTION_DECODE_TIMEOUT_SECONDS if it is just long."
        )


class DecodeMemoryError(ExtractionError):
    """A video needed more memory than a worker may use."""

    def __init__(self, video: str, *, limit_bytes: int) -> None:
        """Name the file and the limit."""
        super().__init__(
            f"Video {video!r} needs more than the {limit_bytes} bytes of memory that a worker may use. Nothing was "
            f"written for it; the range goes on. Raise EXTRACTION_DECODE_MEMORY_BYTES if it is meant."
        )


class DecodeWorkerDiedError(ExtractionError):
    """The process that decoded a video died."""

    def __init__(self, video: str, *, how: str) -> None:
        """Name the file and how the process ended."""
        super().__init__(
            f"Video {video!r} ended its worker process ({how}), which was replaced. Nothing was written for it; the "
            f"range goes on. If this repeats, the file is hostile or the machine is short of memory."
        )


class DecodeWorkerStartError(ExtractionError):
    """A decoding process can't start: no video is to blame."""

    def __init__(self, how: str, said: str) -> None:
        """Say how the process ended and its last words."""
        super().__init__(
            f"A decoding worker did not start ({how}). No record is to blame; finished shards are kept. "
            f"Its last words: {said or 'none'}."
        )


class FrameShardError(ExtractionError):
    """A frame shard can't be read back."""

    def __init__(self, path: str, why: str) -> None:
        """Name the shard and what is wrong with it."""
        super().__init__(
            f"Frame shard {path!r} can't be read: {why}. Its records are to be decoded again: remove the file and "
            f"materialize video_frames for its range."
        )


# Fetching


class SchemeError(ExtractionError):
    """A row's address has a scheme that is not read."""

    permanent = True

    def __init__(self, uri: str, scheme: str) -> None:
        """Name the address, its scheme and what is supported."""
        super().__init__(
            f"Address {uri!r} has scheme {scheme!r}, expected a path or a file:// URI. Correct the row, or the "
            f"setting EXTRACTION_SOURCE_URI_COLUMN or EXTRACTION_SOURCE_URI_TEMPLATE."
        )


class FileForbiddenError(ExtractionError):
    """A row's address points where nothing may be read, or at what is no regular file."""

    permanent = True

    def __init__(self, uri: str, why: str, *, roots: str) -> None:
        """Name the address, what is wrong with it and the folders that may be read."""
        super().__init__(
            f"Address {uri!r} is refused: {why}. Expected a regular file under one of {roots}. "
            f"Correct the row, or add the folder to EXTRACTION_ALLOWED_ROOTS."
        )


class FileUnavailableError(ExtractionError):
    """A row's file is missing, empty or unreadable now; it may still arrive."""

    def __init__(self, uri: str, why: str) -> None:
        """Name the address and what is wrong."""
        super().__init__(
            f"File {uri!r} is not available: {why}, expected a readable file with content. The record is tried again "
            f"later; the range goes on."
        )
