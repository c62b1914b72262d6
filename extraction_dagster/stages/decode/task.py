"""One video's work in a worker process: decode, sample, encode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from extraction_dagster.errors import SettingsError
from extraction_dagster.records import fingerprint
from extraction_dagster.shards.frame_store import FORMAT
from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.decoders.decord import decode_with_decord
from extraction_dagster.stages.decode.decoders.geometry import SCALING
from extraction_dagster.stages.decode.decoders.pyav import decode_with_pyav
from extraction_dagster.stages.decode.jpeg import SUBSAMPLING, encode_frames
from extraction_dagster.stages.decode.quality import Quality, refine
from extraction_dagster.stages.decode.sampling import Sampling

if TYPE_CHECKING:
    from extraction_dagster.records import EncodedFrames, VideoRow
    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.decode.decoders.decoder import Decoder

# By the names of the setting EXTRACTION_DECODER; a decoder imports its library once it decodes.
DECODERS: dict[str, Decoder] = {"pyav": decode_with_pyav, "decord": decode_with_decord}


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """Everything that a worker needs to know about one video.

    Attributes:
        record_id: The row's id.
        content_version: The version of the row.
        path: The local file, without a link in its path.
        decoder: A name in `DECODERS`.
        sampling: How frames are chosen.
        limits: What the video may cost.
        short_side_px: Short side of the frames.
        jpeg_quality: Quality of the frames' JPEG.
        quality: Which of the sampled frames are kept, and which part of them.
    """

    record_id: int
    content_version: str
    path: str
    decoder: str = "pyav"
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    limits: DecodeLimits = DecodeLimits()  # noqa: RUF009 - frozen
    short_side_px: int = 224
    jpeg_quality: int = 95
    quality: Quality = Quality()  # noqa: RUF009 - frozen

    @classmethod
    def of(
        cls,
        row: VideoRow,
        path: Path,
        settings: Settings,
        *,
        sampling: Sampling | None = None,
        quality: Quality | None = None,
    ) -> DecodeJob:
        """The job of a row whose file lies at `path`; what is not given is as the settings say."""
        return cls(
            row.record_id,
            row.content_version,
            str(path),
            settings.decoder,
            sampling or Sampling.from_settings(settings),
            DecodeLimits.from_settings(settings),
            settings.short_side_px,
            settings.jpeg_quality,
            quality or Quality.from_settings(settings),
        )


def decode_job(job: DecodeJob) -> EncodedFrames:
    """Decode one video; runs in a worker process.

    Raises:
        ExtractionError: The video can't be decoded, see `Decoder`; or nothing of it is kept, see `refine`.
        SettingsError: There is no decoder of that name.
    """
    decode = DECODERS.get(job.decoder)
    if decode is None:
        setting = "EXTRACTION_DECODER"
        raise SettingsError(setting, repr(job.decoder), " or ".join(DECODERS))
    _log_codec_errors()
    video = decode(Path(job.path), sampling=job.sampling, short_side_px=job.short_side_px, limits=job.limits)
    if job.quality.identity:
        _limit_opencv_threads()
    video = refine(video, job.quality, path=job.path)
    return encode_frames(video, record_id=job.record_id, content_version=job.content_version, quality=job.jpeg_quality)


def _log_codec_errors() -> None:
    """Have the codec library write its errors to the worker's log, from where they reach a failure's details."""
    import av.logging

    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.ERROR)


def _limit_opencv_threads() -> None:
    """There is a worker a core: threads inside one would only slow each other down."""
    import cv2

    cv2.setNumThreads(1)


def frames_fingerprint(settings: Settings, *, sampling: Sampling | None = None, quality: Quality | None = None) -> str:
    """What decides the stored frames: decoder, choice of frames, size, JPEG. Nothing else changes it.

    Args:
        settings: Say what is not given.
        sampling: How frames are chosen.
        quality: Which of them are kept.
    """
    steps = (quality or Quality.from_settings(settings)).identity
    return fingerprint(
        layout=FORMAT,
        decoder=settings.decoder,
        sampling=(sampling or Sampling.from_settings(settings)).identity,
        short_side_px=settings.short_side_px,
        scaling=SCALING,
        jpeg_quality=settings.jpeg_quality,
        jpeg_subsampling=SUBSAMPLING,
        **({"quality": steps} if steps else {}),  # without a step, nothing that could differ
    )
