"""Decode a whole stream from its beginning: the truth, for streams whose packets do not tell it.

Two passes: the first notes when each frame is shown, the second keeps the sampled ones. Codecs are deterministic on
one thread, so both passes see the same frames, damaged or not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors.decode import VideoDecodeError
from extraction_dagster.stages.decode.decoders.clock import display_times
from extraction_dagster.stages.decode.decoders.container import open_video, packets_of, raise_out_of_memory
from extraction_dagster.stages.decode.decoders.decoder import DecodedVideo, DecodeLimits
from extraction_dagster.stages.decode.decoders.packets import REORDERED, check_length, missing, sound_of
from extraction_dagster.stages.decode.decoders.pictures import Pictures
from extraction_dagster.stages.decode.sampling import Sampling, Selection, select_frames

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.video.frame import VideoFrame

    from extraction_dagster.stages.decode.decoders.container import OpenVideo, VideoFile

_DEFAULT_RATE = Fraction(25)
_FAR = 2
_DEFAULT_TIME_BASE = Fraction(1, 1000)


class EditsHideAllError(Exception):
    """An edit list, of no length or beyond the end, leaves every frame out; caught here, never seen outside."""


@dataclass(slots=True)
class _Tally:
    """What a pass over the stream met.

    Attributes:
        packets: Packets with content.
        hidden: Packets whose frames an edit list leaves out.
        errors: Packets that the codec refused.
        durations: How long packets say that their frames are shown, in ticks, where they say it.
        dts: When each packet is decoded, in ticks; None where it is not said.
        reorders: Whether the container says of any frame that it is shown at another time than it is decoded.
        stopped: Why reading ended before the file's end, or None.
        last_words: The library's last complaint.
    """

    packets: int = 0
    hidden: int = 0
    errors: int = 0
    durations: list[int] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    reorders: bool = False
    stopped: str | None = None
    last_words: str = ""


def decode_sequentially(
    file: VideoFile, sampling: Sampling, short_side_px: int, limits: DecodeLimits, *, tone_map: bool = True
) -> DecodedVideo:
    """Decode every frame and keep the sampled ones; see `Decoder`."""
    tally = _Tally()
    try:
        with open_video(file, limits) as video:
            found = _look(video, tally, limits)
    except EditsHideAllError:
        file.ignores_edits = True
        return decode_sequentially(file, sampling, short_side_px, limits, tone_map=tone_map)
    selection = select_frames(found.seconds, sampling, found.keyframe)
    with open_video(file, limits) as video:
        painter = Pictures(video, short_side_px=short_side_px, limits=limits, tone_map=tone_map)
        pictures, damaged = _keep(video, selection, painter)
    frames = selection.batch(pictures, found.seconds, start_seconds=found.late_seconds)
    partial = _partial(tally, found.short, damaged=damaged, num_frames=len(frames))
    return DecodedVideo(frames, found.claimed_seconds, partial, (*found.notes, *painter.notes))


@dataclass(frozen=True, slots=True)
class _Found:
    """What the first pass found: when each frame is shown, and what the container claims.

    Attributes:
        seconds: float64, shape (M,), from the first frame on.
        keyframe: bool, shape (M,).
        late_seconds: How long after the file's start the first frame is shown.
        claimed_seconds: How long the pictures should last; None where the container claims nothing.
        short: What is missing of that, or None.
        notes: In words.
    """

    seconds: np.ndarray
    keyframe: np.ndarray
    late_seconds: float
    claimed_seconds: float | None
    short: str | None
    notes: tuple[str, ...]


def _look(video: OpenVideo, tally: _Tally, limits: DecodeLimits) -> _Found:
    seen = [(frame.pts if frame.pts is not None else frame.dts, frame.key_frame) for frame in _decode_all(video, tally)]
    if not seen and 0 < tally.packets == tally.hidden and not video.file.ignores_edits:
        raise EditsHideAllError
    if not seen:
        why = video.file.saying_what(tally.last_words or f"{tally.packets} packets gave no frame")
        raise VideoDecodeError(str(video.path), listed_frames=video.stream.frames, why=why)
    base = video.stream.time_base or _DEFAULT_TIME_BASE
    times = _times(video, tally, [time for time, _ in seen])
    # A codec that reorders, and a container that knows nothing of it: these are times of decoding.
    context = video.stream.codec_context
    guessed = video.guesses_times or (context.name in REORDERED and context.has_b_frames and not tally.reorders)
    gap, jump = _gap(video, tally, times, base), float(_jump_seconds(video, times, base, limits) / base)
    ticks, first = display_times(times, gap_ticks=gap, jump_ticks=jump, guessed=guessed)
    seconds = ticks * base.numerator / base.denominator
    covered = float((ticks[-1] + gap) * base)
    late = video.late_seconds(first, first_dts=tally.dts[0])
    claimed = video.claimed_seconds(first, covered_seconds=covered, late_seconds=late)
    check_length(video, late + float(seconds[-1]), limits)
    is_whole = tally.errors == 0 and 0 < video.stream.frames <= tally.packets
    # Where a jump was closed, the container's claim is as wrong as its stamps.
    known = [time for time in times if time is not None]
    is_whole = is_whole or (len(known) > 0 and max(known) - min(known) - ticks[-1] > jump)
    short = None if is_whole else missing(video, limits, covered_seconds=covered, claimed_seconds=claimed)
    mended = sum(time is None or abs(tick + first - time) >= gap / 2 for tick, time in zip(ticks, times, strict=True))
    keyframe = np.array([key for _, key in seen], bool)
    return _Found(seconds, keyframe, late, claimed, short, video.notes(late, mended=mended))


def _times(video: OpenVideo, tally: _Tally, stamps: list[int | None]) -> list[int | None]:
    """The frames' stamps; where the container has none of presentation, those of the packets, if each gave a frame."""
    each = [dts for dts in tally.dts if dts is not None]
    return list(each) if video.guesses_times and len(each) == len(tally.dts) == len(stamps) else stamps


def _jump_seconds(video: OpenVideo, times: list[int | None], base: Fraction, limits: DecodeLimits) -> float:
    """The gap that is a jump of the clock: pictures may stand still as long as sound goes on."""
    steps = np.abs(np.diff([time for time in times if time is not None]))
    longest = float(steps.max(initial=0) * base)
    return video.jump_seconds if longest <= video.jump_seconds else max(video.jump_seconds, sound_of(video, limits)[1])


def _gap(video: OpenVideo, tally: _Tally, times: list[int | None], base: Fraction) -> int:
    """How long a frame is shown where the stream does not say, in ticks.

    By the stream's rate; where that is far from what packets or most stamps say, it was spoilt by a wrong stamp.
    """
    steps = tally.durations or [step for step in np.diff([time for time in times if time is not None]) if step > 0]
    usual = float(np.median(steps)) if steps else 0.0
    rate = video.stream.average_rate
    by_rate = float(1 / (rate * base)) if rate else usual or float(1 / (_DEFAULT_RATE * base))
    is_spoilt = usual > 0 and not 1 / _FAR <= by_rate / usual <= _FAR
    return max(1, round(usual if is_spoilt or (usual and video.guesses_times) else by_rate))


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
        if packet is not None:
            tally.packets += 1
            tally.hidden += packet.is_discard
            tally.dts.append(packet.dts)
            tally.reorders = tally.reorders or packet.pts != packet.dts
        try:
            frames = context.decode(packet)
        except av.error.FFmpegError as error:
            raise_out_of_memory(error)
            tally.errors += 1
            tally.last_words = error.strerror or type(error).__name__
            continue
        yield from frames


def _keep(video: OpenVideo, selection: Selection, painter: Pictures) -> tuple[np.ndarray, int]:
    """The selected frames' pictures, and how many of them are damaged."""
    place = {int(frame): number for number, frame in enumerate(selection.frame_number)}
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
    return painter.together([pictures[number] for number in range(len(place))]), damaged


def _partial(tally: _Tally, short: str | None, *, damaged: int, num_frames: int) -> str | None:
    """Every way in which the video is incomplete, in one line; None when it is not."""
    reasons = [
        short,
        f"reading stopped: {tally.stopped}" if tally.stopped and short else None,
        f"{tally.errors} of {tally.packets} packets did not decode ({tally.last_words})" if tally.errors else None,
        f"{damaged} of {num_frames} sampled frames are damaged" if damaged else None,
    ]
    return "; ".join(reason for reason in reasons if reason) or None
