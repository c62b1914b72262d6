"""Decode a whole stream from its beginning: the truth, for streams whose packets do not tell it.

Two passes: the first notes when each frame is shown, the second keeps the sampled ones. Codecs are deterministic on
one thread, so both passes see the same frames, damaged or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors.decode import VideoDecodeError, VideoTooLongError
from extraction_dagster.stages.decode.decoders.container import open_video, packets_of, raise_out_of_memory
from extraction_dagster.stages.decode.decoders.decoder import DecodedVideo, DecodeLimits, shortfall
from extraction_dagster.stages.decode.decoders.pictures import Pictures
from extraction_dagster.stages.decode.sampling import Sampling, Selection, select_frames

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.video.frame import VideoFrame

    from extraction_dagster.records import FrameBatch
    from extraction_dagster.stages.decode.decoders.container import OpenVideo, VideoFile

# A step back further than this is a new clock (two recordings joined); a smaller one is frames out of order.
_NEW_CLOCK_SECONDS = 1.0
_DEFAULT_RATE = Fraction(25)
_DEFAULT_TIME_BASE = Fraction(1, 1000)


@dataclass(slots=True)
class _Tally:
    """What a pass over the stream met.

    Attributes:
        packets: Packets with content.
        errors: Packets that the codec refused.
        stopped: Why reading ended before the file's end, or None.
        last_words: The library's last complaint.
    """

    packets: int = 0
    errors: int = 0
    stopped: str | None = None
    last_words: str = ""


def decode_sequentially(
    file: VideoFile, sampling: Sampling, short_side_px: int, limits: DecodeLimits, *, tone_map: bool = True
) -> DecodedVideo:
    """Decode every frame and keep the sampled ones; see `Decoder`."""
    path, tally = file.path, _Tally()
    with open_video(file, limits) as video:
        seen = [
            (frame.pts if frame.pts is not None else frame.dts, frame.key_frame) for frame in _decode_all(video, tally)
        ]
        base = video.stream.time_base or _DEFAULT_TIME_BASE
        gap = max(1, round(1 / ((video.stream.average_rate or _DEFAULT_RATE) * base)))
        listed, claimed = video.stream.frames, video.claimed_seconds
    if not seen:
        why = tally.last_words or f"{tally.packets} packets gave no frame"
        raise VideoDecodeError(str(path), listed_frames=listed, why=why)
    times, keyframe = [time for time, _ in seen], np.array([key for _, key in seen], bool)
    order, ticks = display_times(times, gap_ticks=gap, new_clock_ticks=round(_NEW_CLOCK_SECONDS / base))
    seconds = ticks * base.numerator / base.denominator
    if seconds[-1] > limits.max_duration_seconds:
        raise VideoTooLongError(str(path), seconds=float(seconds[-1]), max_seconds=limits.max_duration_seconds)
    selection = select_frames(seconds, sampling, keyframe[order])
    with open_video(file, limits) as video:
        painter = Pictures(video, short_side_px=short_side_px, limits=limits, tone_map=tone_map)
        frames, damaged = _keep(video, order, seconds, selection, painter)
    complete = tally.errors == 0 and 0 < listed <= tally.packets
    covered = float((ticks[-1] + gap) * base)
    short = None if complete else shortfall(covered_seconds=covered, claimed_seconds=claimed)
    partial = _partial(tally, short, damaged=damaged, num_frames=len(frames))
    return DecodedVideo(frames, claimed, partial, tuple(painter.notes))


def display_times(times: list[int | None], *, gap_ticks: int, new_clock_ticks: int) -> tuple[np.ndarray, np.ndarray]:
    """Order decoded frames by when they are shown.

    Args:
        times: When each frame is shown, in ticks, in the order decoded; None where the stream does not say.
        gap_ticks: How long a frame is shown where the stream does not say.
        new_clock_ticks: A step back further than this is a new clock.

    Returns:
        Their order, int64, shape (N,), and their ticks from the first on, int64, shape (N,), ascending.

    Examples:
        A clock that starts again goes on: 50, 55, 0, 5 with gap 5 is 0, 5, 10, 15.
        Frames out of order are sorted: 0, 2, 1 is the order 0, 2, 1.
        Frames without a time come one gap after the other, at the beginning one before the other.
    """
    shown = np.empty(len(times), np.int64)
    latest, offset = _before_the_first(times, gap_ticks), 0
    for number, time in enumerate(times):
        following = latest + gap_ticks
        if time is not None and time + offset < latest - new_clock_ticks:
            offset = following - time
        at = time + offset if time is not None else following
        shown[number] = at
        latest = max(latest, at)
    order = np.argsort(shown, kind="stable")
    return order, shown[order] - shown[order[0]]


def _before_the_first(times: list[int | None], gap_ticks: int) -> int:
    """One gap before the first frame; the first time that the stream says tells how far it goes back."""
    unknown, known = next(((number, time) for number, time in enumerate(times) if time is not None), (0, 0))
    return known - (unknown + 1) * gap_ticks


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
    video: OpenVideo, order: np.ndarray, seconds: np.ndarray, selection: Selection, painter: Pictures
) -> tuple[FrameBatch, int]:
    """The selected frames, and how many of them are damaged."""
    place = {int(order[frame]): number for number, frame in enumerate(selection.frame_number)}
    pictures: dict[int, np.ndarray] = {}
    damaged = 0
    for number, frame in enumerate(_decode_all(video, _Tally())):
        painter.watch(frame)
        if number not in place:
            continue
        pictures[place[number]] = painter.show(frame, num_frames=len(place))
        damaged += frame.is_corrupt
        if len(pictures) == len(place):
            break
    data = painter.together([pictures[number] for number in range(len(place))])
    return selection.batch(data, seconds), damaged


def _partial(tally: _Tally, short: str | None, *, damaged: int, num_frames: int) -> str | None:
    """Every way in which the video is incomplete, in one line; None when it is not."""
    reasons = [
        short,
        f"reading stopped: {tally.stopped}" if tally.stopped and short else None,
        f"{tally.errors} of {tally.packets} packets did not decode ({tally.last_words})" if tally.errors else None,
        f"{damaged} of {num_frames} sampled frames are damaged" if damaged else None,
    ]
    return "; ".join(reason for reason in reasons if reason) or None
