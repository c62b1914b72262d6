"""What a decoder is: a file and a sampling in, exactly the frames shown at the sampled times out.

To add one, write a function as `Decoder` describes it in a file beside this one, and name it in `task.DECODERS` and in
the setting `decoder`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from extraction_dagster.errors.decode import FramesTooManyError
from extraction_dagster.media import COMMON_CODECS

if TYPE_CHECKING:
    from pathlib import Path

    from extraction_dagster.records import FrameBatch
    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.decode.sampling import Sampling

# "Much less" than claimed: under nine tenths, and more than half a second short.
_MUCH_LESS, _SHORT_SECONDS = 0.9, 0.5


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What one video may cost; each is checked before the first frame is decoded.

    Attributes:
        max_pixels: Most pixels of a source frame.
        max_duration_seconds: Longest video.
        max_packet_bytes: Most compressed bytes kept in memory; a larger file is read twice instead.
        max_batch_bytes: Most bytes of sampled frames, uncompressed.
        codecs: FFmpeg's decoders that may be opened, separated by commas.
    """

    max_pixels: int = 8192 * 4320
    max_duration_seconds: float = 6 * 3600.0
    max_packet_bytes: int = 2**28
    max_batch_bytes: int = 2**31
    codecs: str = ",".join(COMMON_CODECS)

    @classmethod
    def from_settings(cls, settings: Settings) -> DecodeLimits:
        """Read the limits from the settings; the byte limits are shares of a worker's memory."""
        memory = settings.decode_memory_bytes
        most = settings.max_pixels, settings.max_duration_seconds, memory // 16, memory // 2
        return cls(*most, ",".join(settings.video_codecs))

    def check_batch(self, video: Path, *, num_frames: int, width_px: int, height_px: int) -> None:
        """Refuse frames that together would not fit.

        Raises:
            FramesTooManyError: They don't.
        """
        needed = num_frames * width_px * height_px * 3
        if needed > self.max_batch_bytes:
            raise FramesTooManyError(
                str(video), num_frames=num_frames, needed_bytes=needed, max_bytes=self.max_batch_bytes
            )


@dataclass(frozen=True, slots=True)
class DecodedVideo:
    """A video's sampled frames.

    Attributes:
        frames: The frames; `pts_seconds` counts from the file's start, as a player's clock does.
        duration_seconds: What the container claims; None when it claims nothing.
        partial: Why the video is incomplete, or None.
        notes: What was done to its pictures beside scaling, and how its colours were understood, in words.
    """

    frames: FrameBatch
    duration_seconds: float | None
    partial: str | None = None
    notes: tuple[str, ...] = ()


class Decoder(Protocol):
    """A function that decodes the sampled frames of one local file, on one thread."""

    def __call__(
        self, video: Path, *, sampling: Sampling, short_side_px: int, limits: DecodeLimits, tone_map: bool = True
    ) -> DecodedVideo:
        """Decode the frames shown at the sampled times.

        Args:
            video: Local file, without a link in its path.
            sampling: How frames are chosen.
            short_side_px: Short side of the frames; a smaller video is not scaled up.
            limits: What the video may cost.
            tone_map: Show HDR as SDR; without it its signal is taken as it is, and looks pale.

        Returns:
            DecodedVideo: at least one frame, turned as a player shows it.

        Raises:
            VideoOpenError: The file is no complete video.
            VideoFormatError: The file's format is one that is never opened.
            NoVideoStreamError: It holds no moving pictures.
            VideoEncryptedError: They are encrypted.
            DolbyVisionError: Their colours mean nothing without Dolby's metadata.
            VideoTooLargeError: They have too many pixels.
            VideoTooLongError: They last too long.
            FramesTooManyError: The sampled frames don't fit the memory.
            VideoDecodeError: No frame decodes.
        """
        ...


def shortfall(*, covered_seconds: float, claimed_seconds: float | None) -> str | None:
    """Say how much of the claimed duration is missing; None when it is there, or nearly."""
    if claimed_seconds is None or covered_seconds >= min(
        claimed_seconds * _MUCH_LESS, claimed_seconds - _SHORT_SECONDS
    ):
        return None
    return f"the frames cover {covered_seconds:.1f} s of the {claimed_seconds:.1f} s that the container claims"
