"""The default decoder: exact, and close to the least work that the codec library can do.

It plans on packets (one reading, no seeking), decodes only from keyframes to targets, and leaves out frames that no
other frame refers to. Whenever a stream does not behave as planned, it decodes everything from the beginning instead:
the frames are those of a full sequential decode, always.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors import ExtractionError
from extraction_dagster.errors.decode import VideoDecodeError
from extraction_dagster.stages.decode.decoders.container import (
    ProbeNeededError,
    may_do_without_probe,
    open_file,
    open_video,
    raise_out_of_memory,
)
from extraction_dagster.stages.decode.decoders.decoder import DecodedVideo, DecodeLimits
from extraction_dagster.stages.decode.decoders.kinds import ANIMATED_WEBP
from extraction_dagster.stages.decode.decoders.packets import (
    REORDERED,
    PacketIndex,
    Run,
    check_length,
    fed_packets,
    missing,
    read_packets,
)
from extraction_dagster.stages.decode.decoders.pictures import Pictures
from extraction_dagster.stages.decode.decoders.sequential import decode_sequentially
from extraction_dagster.stages.decode.decoders.webp import decode_webp
from extraction_dagster.stages.decode.sampling import Sampling, select_frames

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from av.video.frame import VideoFrame

    from extraction_dagster.stages.decode.decoders.container import OpenVideo, VideoFile

logger = logging.getLogger(__name__)

# libdav1d loses targets when told to skip; vp8 and vp9 gain nothing.
_SKIPS_NONREF = frozenset({"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4"})
_LOOKED_AT = 64  # frames that are decoded to see in which order they come out


class UnplannedError(Exception):
    """The stream does not decode as its packets promised; caught here, never seen outside."""


def decode_with_pyav(
    video: Path, *, sampling: Sampling, short_side_px: int, limits: DecodeLimits, tone_map: bool = True
) -> DecodedVideo:
    """Decode the frames shown at the sampled times, by libavcodec through PyAV; see `Decoder`."""
    with open_file(video) as file:
        if file.kind == ANIMATED_WEBP:
            return decode_webp(file, sampling, short_side_px, limits)
        if may_do_without_probe(file):
            with suppress(UnplannedError, ProbeNeededError, ExtractionError):  # the next attempt finds it as well
                return _decode_planned(file, sampling, short_side_px, limits, probe=False, tone_map=tone_map)
        try:
            return _decode_planned(file, sampling, short_side_px, limits, probe=True, tone_map=tone_map)
        except UnplannedError as unplanned:
            logger.debug("Decoding %r from its beginning: %s.", str(video), unplanned)
            return decode_sequentially(file, sampling, short_side_px, limits, tone_map=tone_map)


def _decode_planned(  # noqa: PLR0913 - the decoder's arguments, and how to open
    file: VideoFile, sampling: Sampling, short_side_px: int, limits: DecodeLimits, *, probe: bool, tone_map: bool
) -> DecodedVideo:
    with open_video(file, limits, probe=probe) as video:
        painter = Pictures(video, short_side_px=short_side_px, limits=limits, tone_map=tone_map)
        index = read_packets(video, limits)
        if len(index) == 0:
            why = file.saying_what(index.stopped or "no packet")
            raise VideoDecodeError(str(file.path), listed_frames=video.stream.frames, why=why)
        if index.irregular is not None:
            raise UnplannedError(index.irregular)
        if sampling.needs_keyframes and not index.clean:
            name = video.stream.codec_context.name
            raise UnplannedError(f"codec {name} knows its keyframes only once they are decoded")
        display = _display_order(video, index, limits)
        # Without times of presentation the n-th frame is shown when the n-th packet is due.
        ticks = np.sort(index.dts[display]) if video.guesses_times else index.pts[display]
        seconds = _seconds(ticks - ticks[0], video)
        selection = select_frames(seconds, sampling, index.keyframe[display])
        targets = display[selection.frame_number]
        pictures = _decode_targets(video, index, targets, painter, limits)
        _check_order(video, index, limits)
        covered = float(_seconds(ticks[-1:] - ticks[0] + index.last_duration, video)[0])
        late = video.late_seconds(int(ticks[0]), first_dts=int(index.dts[0]))
        claimed = video.claimed_seconds(int(ticks[0]), covered_seconds=covered, late_seconds=late)
        partial = _missing(video, index, limits, covered_seconds=covered, claimed_seconds=claimed)
        check_length(video, late + float(seconds[-1]), limits)
        frames = selection.batch(painter.together(pictures), seconds, start_seconds=late)
        return DecodedVideo(frames, claimed, partial, (*video.notes(late), *painter.notes))


def _seconds(ticks: np.ndarray, video: OpenVideo) -> np.ndarray:
    """Ticks as seconds, each correctly rounded."""
    base = video.stream.time_base
    if base is None:
        raise UnplannedError("no time base")
    return ticks * base.numerator / base.denominator


def _display_order(video: OpenVideo, index: PacketIndex, limits: DecodeLimits) -> np.ndarray:
    """The packets whose frames are shown, in the order in which they are shown."""
    shown = index.shown.copy()
    head = index.head() if index.clean else None  # else the check of the whole run does it
    if head is not None:
        decoded = {frame.pts for frame in _decode_runs(video, index, [head], limits, targets=None)}
        positions = np.arange(head.last + 1)
        shown[positions] &= np.isin(index.pts[positions], np.array(list(decoded), np.int64))
    display = np.flatnonzero(shown)
    if len(display) == 0:
        raise UnplannedError("no frame of the stream's beginning decodes")
    return display[np.argsort(index.pts[display])]


def _decode_targets(
    video: OpenVideo, index: PacketIndex, targets: np.ndarray, painter: Pictures, limits: DecodeLimits
) -> list[np.ndarray]:
    """The pictures of the packets at `targets`, in the order of `targets`."""
    place = {int(index.pts[target]): number for number, target in enumerate(targets)}
    pictures: list[np.ndarray | None] = [None] * len(targets)
    for frame in _decode_runs(video, index, index.runs(targets.tolist()), limits, targets=set(targets.tolist())):
        painter.watch(frame)
        number = place.get(frame.pts if frame.pts is not None else -1)
        if number is not None:
            pictures[number] = painter.show(frame, num_frames=len(targets))
    found = [picture for picture in pictures if picture is not None]
    if len(found) < len(pictures):
        raise UnplannedError(f"{len(pictures) - len(found)} targets did not decode")
    return found


def _check_order(video: OpenVideo, index: PacketIndex, limits: DecodeLimits) -> None:
    """Where a codec reorders, and the container knows nothing of it, see whether the first frames come out in order.

    An MP4 without ctts, or FLV without composition times, says when each frame is decoded, not when it is shown.

    Raises:
        UnplannedError: They don't.
    """
    context = video.stream.codec_context
    if index.reorders or context.name not in REORDERED or not context.has_b_frames:
        return
    first = Run(0, min(len(index), _LOOKED_AT) - 1)
    shown = [frame.pts for frame in _decode_runs(video, index, [first], limits, targets=None) if frame.pts is not None]
    if shown != sorted(shown):
        raise UnplannedError("times in the order of decoding")


def _decode_runs(
    video: OpenVideo, index: PacketIndex, runs: Sequence[Run], limits: DecodeLimits, *, targets: set[int] | None
) -> Iterator[VideoFrame]:
    """Feed the runs' packets and yield every frame that comes out; without `targets`, all are wanted."""
    import av

    context = video.stream.codec_context
    skips = targets is not None and context.name in _SKIPS_NONREF
    packets = enumerate(fed_packets(video, index, limits))
    for run in runs:
        check = _Check(index, run, guessed=video.guesses_times) if targets is not None else None
        try:
            for number, packet in packets:
                if number >= run.first:
                    context.skip_frame = "NONREF" if skips and number not in (targets or ()) else "DEFAULT"
                    yield from _checked(context.decode(packet), check)
                if number == run.last:
                    break
            yield from _checked(context.decode(None), check)
            if check is not None:
                check.at_end()
        except av.error.FFmpegError as error:
            raise_out_of_memory(error)
            raise UnplannedError(str(error)) from error
        context.flush_buffers()


class _Check:
    """Whether a run's frames come out as its packets promised."""

    def __init__(self, index: PacketIndex, run: Run, *, guessed: bool) -> None:
        self._guessed = guessed
        self._latest = -(2**63)
        fed = slice(run.first, run.last + 1)
        self._promised = set(index.pts[fed][index.shown[fed]].tolist())
        self._first = int(index.pts[run.first])
        self._clean = index.clean

    def look(self, frame: VideoFrame) -> None:
        """Take in a frame.

        Raises:
            UnplannedError: It is not as promised.
        """
        if frame.pts not in self._promised:
            raise UnplannedError(f"a frame at {frame.pts} that no packet announced")
        if frame.is_corrupt:
            raise UnplannedError(f"a damaged frame at {frame.pts}")
        if self._clean and frame.pts == self._first and not frame.key_frame:
            raise UnplannedError(f"the frame at {frame.pts} is no keyframe, against what the container says")
        if self._guessed and frame.pts is not None:
            if frame.pts < self._latest:
                raise UnplannedError(f"a frame at {frame.pts} after one at {self._latest}, by made-up times")
            self._latest = frame.pts
        if not self._clean:
            self._promised.remove(frame.pts)

    def at_end(self) -> None:
        """All of the run came out.

        Raises:
            UnplannedError: Of a run over the whole stream, where every frame counts, one did not.
        """
        if not self._clean and self._promised:
            raise UnplannedError(f"{len(self._promised)} packets gave no frame")


def _checked(frames: Sequence[VideoFrame], check: _Check | None) -> Sequence[VideoFrame]:
    for frame in frames if check is not None else ():
        if check is not None:
            check.look(frame)
    return frames


def _missing(
    video: OpenVideo, index: PacketIndex, limits: DecodeLimits, *, covered_seconds: float, claimed_seconds: float | None
) -> str | None:
    """Why the video is incomplete; None when every packet was read that the container's index lists."""
    if 0 < video.stream.frames <= len(index):
        return None
    short = missing(video, limits, covered_seconds=covered_seconds, claimed_seconds=claimed_seconds)
    return f"{short}; reading stopped: {index.stopped}" if short and index.stopped else short
