"""One video's work in a worker process: decode, sample, encode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from extraction_dagster.errors import SettingsError
from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits, Decoder
from extraction_dagster.stages.decode.decoders.decord import decode_with_decord
from extraction_dagster.stages.decode.decoders.library_log import write_errors
from extraction_dagster.stages.decode.decoders.pyav import decode_with_pyav
from extraction_dagster.stages.decode.jpeg import encode_frames
from extraction_dagster.stages.decode.quality import Quality, refine
from extraction_dagster.stages.decode.sampling import Sampling

if TYPE_CHECKING:
    from extraction_dagster.records import EncodedFrames, VideoRow
    from extraction_dagster.settings import Settings

# By the names of the setting EXTRACTION_DECODER; a decoder imports its library once it decodes.
DECODERS: dict[str, Decoder] = {"pyav": decode_with_pyav, "decord": decode_with_decord}


@dataclass(frozen=True, slots=True)
class NamedDecoder:
    """A decoder and its name in the setting EXTRACTION_DECODER."""

    name: str
    decode: Decoder


def make_decoder(name: str) -> NamedDecoder:
    """The decoder of a name, for a worker, a script or a notebook.

    Raises:
        SettingsError: There is none of that name.
    """
    if name not in DECODERS:
        raise SettingsError("EXTRACTION_DECODER", repr(name), " or ".join(DECODERS))
    return NamedDecoder(name, DECODERS[name])


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
        tone_map: Show HDR as SDR.
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
    tone_map: bool = True

    @classmethod
    def of(cls, row: VideoRow, path: Path, settings: Settings) -> DecodeJob:
        """The job of a row whose file lies at `path`."""
        return cls(
            row.record_id,
            row.content_version,
            str(path),
            settings.decoder,
            Sampling.from_settings(settings),
            DecodeLimits.from_settings(settings),
            settings.short_side_px,
            settings.jpeg_quality,
            Quality.from_settings(settings),
            settings.tone_map == "on",
        )


def decode_job(job: DecodeJob) -> EncodedFrames:
    """Decode one video; runs in a worker process.

    Raises:
        ExtractionError: The video can't be decoded, see `Decoder`; or nothing of it is kept, see `refine`.
        SettingsError: There is no decoder of that name.
    """
    decoder = make_decoder(job.decoder)
    write_errors()  # to the worker's log, from where they reach a failure's details
    video = decoder.decode(
        Path(job.path),
        sampling=job.sampling,
        short_side_px=job.short_side_px,
        limits=job.limits,
        tone_map=job.tone_map,
    )
    if job.quality.identity:
        import cv2

        cv2.setNumThreads(1)  # there is a worker a core: threads inside one would only slow each other down
    video = refine(video, job.quality, path=job.path)
    return encode_frames(video, record_id=job.record_id, content_version=job.content_version, quality=job.jpeg_quality)
