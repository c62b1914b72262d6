"""Decode a whole stream from its beginning: the truth, for streams whose packets do not tell it.

Two passes: the first notes when each frame is shown, the second keeps the sampled ones. Codecs are deterministic on
one thread, so both passes see the same frames, damaged or not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors.decode import VideoDecodeError, VideoTooLongError
from extraction_dagster.stages.decode.decoders.clock import JUMP_SECONDS, display_times
from extraction_dagster.stages.decode.decoders.container import open_video, packets_of, raise_out_of_memory
from extraction_dagster.stages.decode.decoders.decoder import DecodedVideo, DecodeLimits
from extraction_dagster.stages.decode.decoders.geometry import Geometry
from extraction_dagster.stages.decode.decoders.packets import missing
from extraction_dagster.stages.decode.sampling import Sampling, Selection, select_frames

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.video.frame import VideoFrame

    from extraction_dagster.stages.decode.decoders.container import OpenVideo, VideoFile

_DEFAULT_RATE = Fraction(25)
_DEFAULT_TIME_BASE = Fraction(1, 1000)


@dataclass(slots=True)
class _Tally:
    """What a pass over the stream met.

    Attributes:
        packets: Packets with content.
        errors: Packets that the codec refused.
        durations: How long packets say that their frames are shown, in ticks, where they say it.
        stopped: Why reading ended before the file's end, or None.
        last_words: The library's last complaint.
    """

    packets: int = 0
    errors: int = 0
    durations: list[int] = field(default_factory=list)
    stopped: str | None = None
    last_words: str = ""


def decode_sequentially(file: VideoFile, sampling: Sampling, short_side_px: int, limits: DecodeLimits) -> DecodedVideo:
    """Decode every frame and keep the sampled ones; see `Decoder`."""
    path, tally = file.path, _Tally()
    with open_video(file, limits) as video:
        seen = [
            (frame.pts if frame.pts is not None else frame.dts, frame.key_frame) for frame in _decode_all(video, tally)
        ]
        if not seen:
            why = file.saying_what(tally.last_words or f"{tally.packets} packets gave no frame")
            raise VideoDecodeError(str(path), listed_frames=video.stream.frames, why=why)
        base = video.stream.time_base or _DEFAULT_TIME_BASE
        gap = _gap(video, tally, base)
        jump = max(JUMP_SECONDS, video.sound_seconds) / base
        times, keyframe = [time for time, _ in seen], np.array([key for _, key in seen], bool)
        ticks, first = display_times(times, gap_ticks=gap, jump_ticks=float(jump), guessed=video.guesses_times)
        seconds = ticks * base.numerator / base.denominator
        if seconds[-1] > limits.max_duration_seconds:
            raise VideoTooLongError(str(path), seconds=float(seconds[-1]), max_seconds=limits.max_duration_seconds)
        late, claimed = video.late_seconds(first), video.claimed_seconds(first)
        # Where a jump was closed, the container's claim is as wrong as its stamps.
        is_complete = (tally.errors == 0 and 0 < video.stream.frames <= tally.packets) or _span(times) - ticks[
            -1
        ] > jump
        covered = float((ticks[-1] + gap) * base)
        short = None if is_complete else missing(video, limits, covered_seconds=covered, claimed_seconds=claimed)
    selection = select_frames(seconds, sampling, keyframe)
    with open_video(file, limits) as video:
        pictures, damaged = _keep(video, selection, short_side_px=short_side_px, limits=limits)
    frames = selection.batch(pictures, seconds, start_seconds=late)
    return DecodedVideo(frames, claimed, _partial(tally, short, damaged=damaged, num_frames=len(frames)))


def _gap(video: OpenVideo, tally: _Tally, base: Fraction) -> int:
    """How long a frame is shown where the stream does not say, in ticks."""
    rate = video.stream.average_rate
    if tally.durations and (video.guesses_times or not rate):  # then that rate is a guess as well
        return max(1, round(float(np.median(tally.durations))))
    return max(1, round(1 / ((rate or _DEFAULT_RATE) * base)))


def _span(times: list[int | None]) -> int:
    known = [time for time in times if time is not None]
    return max(known) - min(known) if known else 0


def _decode_all(video: OpenVideo, tally: _Tally) -> Iterator[VideoFrame]:
    """Every frame of the stream, in the order that the codec gives them, over every error that it survives."""
    import av

    context = video.stream.codec_context
    packets = packets_of(video)
    draining = False
    while not draining:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError as error:
            raise_out_of_memory(error)
            packet, tally.stopped = None, error.strerror or type(error).__name__
            tally.last_words = tally.stopped
        draining = packet is None
        if packet is not None and packet.duration:
            tally.durations.append(packet.duration)
        tally.packets += not draining
        try:
            frames = context.decode(packet)
        except av.error.FFmpegError as error:
            raise_out_of_memory(error)
            tally.errors += 1
            tally.last_words = error.strerror or type(error).__name__
            continue
        yield from frames


def _keep(
    video: OpenVideo, selection: Selection, *, short_side_px: int, limits: DecodeLimits
) -> tuple[np.ndarray, int]:
    """The selected frames' pictures, and how many of them are damaged."""
    from av.video.reformatter import VideoReformatter

    place = {int(frame): number for number, frame in enumerate(selection.frame_number)}
    pictures: dict[int, np.ndarray] = {}
    reformatter, geometry, damaged = VideoReformatter(), None, 0
    for number, frame in enumerate(_decode_all(video, _Tally())):
        if number not in place:
            continue
        if geometry is None:
            geometry = Geometry.of(frame, sample_aspect=video.sample_aspect, short_side_px=short_side_px)
            width, height = geometry.shown_size
            limits.check_batch(video.path, num_frames=len(place), width_px=width, height_px=height)
        pictures[place[number]] = geometry.show(frame, reformatter)
        damaged += frame.is_corrupt
        if len(pictures) == len(place):
            break
    return np.stack([pictures[number] for number in range(len(place))]), damaged


def _partial(tally: _Tally, short: str | None, *, damaged: int, num_frames: int) -> str | None:
    """Every way in which the video is incomplete, in one line; None when it is not."""
    reasons = [
        short,
        f"reading stopped: {tally.stopped}" if tally.stopped and short else None,
        f"{tally.errors} of {tally.packets} packets did not decode ({tally.last_words})" if tally.errors else None,
        f"{damaged} of {num_frames} sampled frames are damaged" if damaged else None,
    ]
    return "; ".join(reason for reason in reasons if reason) or None
