"""Which stream of a file is its pictures: the one that a player shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extraction_dagster.errors.decode import NoVideoStreamError
from extraction_dagster.stages.decode.decoders import kinds

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.stream import Stream
    from av.video.stream import VideoStream

_LEAST_SIDE_PX = 32  # of a track that somebody is meant to see
_STILLS = frozenset({"mjpeg", "png", "webp", "bmp", "tiff", "gif"})  # codecs of pictures
_LONGEST_NUMBER = 18  # digits of a number that a tag may state


def choose_stream(path: str, container: InputContainer, reading: kinds.Reading) -> VideoStream:
    """The moving pictures that a player shows: enabled, else with the most frames, else the largest, else the first.

    Cover art, timed thumbnails, stills and what only accompanies others are marked as such, or can be told: a still
    beside a track, as in animated AVIF, and a track too small for anybody to see.
    """
    from av.stream import Disposition

    aside = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image | Disposition.dependent
    playable = [s for s in container.streams.video if s.codec_context is not None and not s.disposition & aside]
    filled = [s for s in playable if s.frames != 0] or playable
    if not filled:
        codes = kinds.codes_in_index(reading)
        tiles = [stream for stream in container.streams.video if stream.disposition & Disposition.dependent]
        found = ", ".join(_describe(stream, codes) for stream in container.streams) or "no stream at all"
        if len(tiles) > 1 and len(tiles) == len(container.streams):
            found = f"a photo in {len(tiles)} tiles (HEIC or AVIF), which are not put together"
        raise NoVideoStreamError(path, found)

    def rank(stream: VideoStream) -> tuple[object, ...]:
        width, height = stream.codec_context.width, stream.codec_context.height
        is_enabled = bool(stream.disposition & Disposition.default)
        seen = min(width, height) >= _LEAST_SIDE_PX
        return seen, not _is_still(stream), is_enabled, _expected_frames(stream), width * height, -stream.index

    return max(filled, key=rank)


def _is_still(stream: VideoStream) -> bool:
    """Whether it is one picture: an item of an AVIF or HEIC, which has no duration, or one of a picture's codecs."""
    if stream.codec_context.name in _STILLS and _num_frames(stream) <= 1:  # or nobody knows how many
        return True
    return stream.frames == 1 and not stream.duration


def _expected_frames(stream: VideoStream) -> int:
    """How many frames the container lists, or a Matroska track's length and rate let expect; 0 for unknown."""
    tagged = own_seconds(stream) if "DURATION" in stream.metadata else None
    return _num_frames(stream) or round((tagged or 0.0) * float(stream.average_rate or 0))


def _num_frames(stream: VideoStream) -> int:
    """How many frames the container lists; 0 when it does not say."""
    tags = {name.upper(): value for name, value in stream.metadata.items()}
    tag = next((value for name, value in tags.items() if name.startswith("NUMBER_OF_FRAMES")), "")
    return stream.frames or (int(tag) if tag.isascii() and tag.isdigit() and len(tag) < _LONGEST_NUMBER else 0)


def own_seconds(stream: Stream) -> float | None:
    """How long a stream lasts, or when it ends, by itself or by its Matroska tag; None when it does not say."""
    if stream.duration and stream.duration > 0 and stream.time_base:
        return float(stream.duration * stream.time_base)
    return _clock_seconds(stream.metadata["DURATION"]) if "DURATION" in stream.metadata else None


def _clock_seconds(clock: str) -> float:
    """`00:01:05.500` is 65.5; 0 when it is no such thing."""
    try:
        hours, minutes, seconds = clock.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


def _describe(stream: Stream, codes: list[str]) -> str:
    name = getattr(stream.codec_context, "name", None)
    if name is None:
        code = codes[stream.index] if stream.index < len(codes) else ""
        name = f"codec {kinds.named_codec(code)}: no decoder" if code else "unknown codec"
    return f"{stream.type} ({name})"
