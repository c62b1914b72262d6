"""What frames are made with, from the settings alone: loads no decoder, for the definitions ask for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extraction_dagster.media import FRAMES_LAYOUT, SCALING, SUBSAMPLING
from extraction_dagster.records import fingerprint
from extraction_dagster.stages.decode.quality import Quality
from extraction_dagster.stages.decode.sampling import Sampling

if TYPE_CHECKING:
    from extraction_dagster.settings import Settings


def frames_fingerprint(settings: Settings) -> str:
    """What decides the stored frames: decoder, choice of frames, size, JPEG. Nothing else changes it."""
    steps = Quality.from_settings(settings).identity
    return fingerprint(
        layout=FRAMES_LAYOUT,
        decoder=settings.decoder,
        sampling=Sampling.from_settings(settings).identity,
        short_side_px=settings.short_side_px,
        scaling=SCALING,
        jpeg_quality=settings.jpeg_quality,
        jpeg_subsampling=SUBSAMPLING,
        **({"quality": steps} if steps else {}),  # without a step, nothing that could differ
        **({"tone_map": settings.tone_map} if settings.tone_map != "on" else {}),
    )
