"""The packets of a video's stream: one pass that notes when each frame is shown, and which packets decode it.

decode order     I0    P3    B1    B2    I6    B4    B5
pts              0     3     1     2     6     4     5
keyframe         yes                     yes
to show 2: feed I0 P3 B1 B2;  to show 6: feed I6 alone;  to show 5: start at I0, for B4 and B5 lead I6
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors.decode import VideoEncryptedError, VideoTooLongError
from extraction_dagster.stages.decode.decoders import kinds
from extraction_dagster.stages.decode.decoders.clock import has_jump
from extraction_dagster.stages.decode.decoders.container import OpenVideo, open_video, packets_of, raise_out_of_memory
from extraction_dagster.stages.decode.decoders.decoder import shortfall

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from fractions import Fraction

    from av.packet import Packet
    from av.video.stream import VideoStream

    from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits

# What a kept packet costs beside its own bytes.
_PACKET_OVERHEAD_BYTES = 1024
_BEFORE_ALL = -(2**63)
_MICROSECONDS = 1_000_000
# A packet may wait for its turn for some seconds, where pictures stand still; for longer, its pts is looked into.
_LATEST_SECONDS = 10.0
REORDERED = frozenset({"h264", "hevc"})  # of which the library makes up a pts where the container has none
_VP9_FRAME, _VP9_PROFILE, _VP9_PACK = 0b10_00_0000, 0b00_11_0000, 0b110_00_000
# An MPEG-4 packet of so few bytes may say that the picture before it stays: it gives no frame. (In a small picture it
# may also be a frame, and then nothing is lost but time.)
_NOT_CODED_BYTES = {"mpeg4": 19}
# A decoder that starts at a keyframe gives, for these, exactly what it gives when it starts at the file's beginning.
_KEYFRAMES_ARE_CLEAN = frozenset(
    {"h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg1video", "mpeg2video", "mpeg4", "mjpeg", "prores", "dnxhd"}
    | {"rawvideo"}
)


@dataclass(frozen=True, slots=True)
class Run:
    """Packets to feed one after the other, from a keyframe to the last target that it serves."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class PacketIndex:
    """What one pass over a stream's packets found, in decode order.

    Attributes:
        pts: int64, shape (P,): when each packet's frame is shown, in ticks.
        keyframe: bool, shape (P,).
        shown: bool, shape (P,): false for packets outside of the edit list and for frames that are never displayed.
        last_duration: How long the last shown frame stays, in ticks; 0 when unknown.
        kept: The packets themselves, or None when they were too many to keep.
        clean: Whether a decoder that starts at a keyframe gives what it gives when it starts at the beginning.
        irregular: Why the times can't be read off the packets, or None.
        stopped: Why reading ended before the file's end, or None.
        dts: int64, shape (P,): when each packet is decoded, in ticks; its pts where that is not said.
        reorders: Whether the container says of any frame that it is shown at another time than it is decoded.
    """

    pts: np.ndarray
    keyframe: np.ndarray
    shown: np.ndarray
    last_duration: int
    kept: Sequence[Packet[VideoStream]] | None
    clean: bool
    irregular: str | None
    stopped: str | None
    dts: np.ndarray
    reorders: bool

    def __len__(self) -> int:
        """The number of packets, P."""
        return len(self.pts)

    def __repr__(self) -> str:
        """Its size, not its packets."""
        why = self.irregular or self.stopped or "regular"
        return f"PacketIndex({len(self)} packets, {np.count_nonzero(self.keyframe)} keyframes, {why})"

    def head(self) -> Run | None:
        """The packets whose frames may not decode because the stream's beginning is missing; None when all will.

        A stream cut out of a longer one may begin with frames that need the part before the cut. They come before the
        first keyframe, or lead it: decode order P7 P8 I12 B10 B11 I18.
        """
        keys = np.flatnonzero(self.keyframe)
        end = int(keys[1]) - 1 if len(keys) > 1 else len(self) - 1
        first_key = int(keys[0])
        before_key = self.shown[: end + 1] & (self.pts[: end + 1] < self.pts[first_key])
        return Run(0, end) if first_key > 0 or before_key.any() else None

    def runs(self, targets: Sequence[int]) -> list[Run]:
        """The runs that decode the packets at `targets`, in decode order, overlapping ones joined.

        Where keyframes are not clean, or not known, it is all of the stream in one.
        """
        if not self.clean:
            return [Run(0, len(self) - 1)]
        keys = np.flatnonzero(self.keyframe).tolist()
        runs: list[Run] = []
        for start, target in sorted((self._start(keys, target), target) for target in targets):
            if runs and start <= runs[-1].last:
                runs[-1] = Run(runs[-1].first, max(runs[-1].last, target))
            else:
                runs.append(Run(start, target))
        return runs

    def _start(self, keys: list[int], target: int) -> int:
        """The last keyframe that neither follows the target in decode order nor is shown after it; else the start."""
        for key in reversed(keys[: bisect.bisect_right(keys, target)]):
            if self.pts[key] <= self.pts[target]:
                return key
        return 0


def read_packets(video: OpenVideo, limits: DecodeLimits) -> PacketIndex:
    """Read every packet of the stream once.

    Raises:
        VideoTooLongError: The frames span more than the limit.
        VideoEncryptedError: A packet is encrypted.
        MemoryError: The library ran out of memory.
    """
    import av

    builder, stopped = _Builder(video, limits), None
    try:
        for packet in packets_of(video):
            builder.add(packet)
    except av.error.FFmpegError as error:
        raise_out_of_memory(error)
        stopped = error.strerror or type(error).__name__
    return builder.build(stopped)


def check_length(video: OpenVideo, seconds: float, limits: DecodeLimits) -> None:
    """Refuse a video that is too long.

    Raises:
        VideoTooLongError: It is.
    """
    if seconds > limits.max_duration_seconds:
        raise VideoTooLongError(str(video.path), seconds=seconds, max_seconds=limits.max_duration_seconds)


def sound_of(video: OpenVideo, limits: DecodeLimits) -> tuple[float, float]:
    """When the file's sound ends, in seconds from the file's start, and how much of it there is, by reading it.

    Asked only where pictures end before what a container claims for all of its streams, or stand still for very long.
    """
    import av

    end = amount = 0.0
    with open_video(video.file, limits) as again:
        sound, start = again.container.streams.audio[:1], (again.container.start_time or 0) / _MICROSECONDS
        try:
            for packet in again.container.demux(*sound) if sound else ():
                lasts = float((packet.duration or 0) * packet.time_base) if packet.time_base else 0.0
                amount += lasts
                if packet.pts is not None and packet.time_base:
                    end = max(end, float(packet.pts * packet.time_base) + lasts - start)
        except (av.error.FFmpegError, IndexError) as error:  # what was read until then counts
            raise_out_of_memory(error)
    return end, amount


def missing(
    video: OpenVideo, limits: DecodeLimits, *, covered_seconds: float, claimed_seconds: float | None
) -> str | None:
    """How much of the claimed duration has no pictures; None where nothing is missing, or sound alone goes on."""
    kind = video.file.kind
    if kind is not None and kind.is_cut:
        return f"{kind.words} whose end is missing"
    short = shortfall(covered_seconds=covered_seconds, claimed_seconds=claimed_seconds)
    if short is None or not video.claim_is_shared:
        return short
    return shortfall(covered_seconds=sound_of(video, limits)[0], claimed_seconds=claimed_seconds) and short


def fed_packets(video: OpenVideo, index: PacketIndex, limits: DecodeLimits) -> Iterator[Packet[VideoStream]]:
    """The packets in decode order, once more: those that were kept, or from a second reading of the file."""
    if index.kept is not None:
        yield from index.kept
        return
    with open_video(video.file, limits) as again:
        yield from itertools.islice(packets_of(again), len(index))


class _Builder:
    """Collects packets into an index; each costs a few microseconds, which count where decoding is cheap."""

    def __init__(self, video: OpenVideo, limits: DecodeLimits) -> None:
        self._video, self._limits = video, limits
        self._codec = video.stream.codec_context.name
        self._is_hidden = _HIDES_FRAMES.get(self._codec)
        self._not_coded_bytes = _NOT_CODED_BYTES.get(self._codec, 0)
        self._pts: list[int] = []
        self._dts: list[int] = []
        self._keyframe: list[bool] = []
        self._shown: list[bool] = []
        self._kept: list[Packet[VideoStream]] | None = []
        self._kept_bytes = 0
        self._last_dts = _BEFORE_ALL
        self._start, self._end, self._last_duration = 0, _BEFORE_ALL, 0
        self._irregular: str | None = None
        self._base = base = video.stream.time_base
        self._jump_ticks = round(video.jump_seconds / base) if base else -_BEFORE_ALL
        self._late_ticks = round(_LATEST_SECONDS / base) if base else -_BEFORE_ALL
        self._jumps = False

    def add(self, packet: Packet[VideoStream]) -> None:
        if packet.has_sidedata("encryption_info"):
            scheme = kinds.encryption_scheme(self._video.file.reading())
            raise VideoEncryptedError(str(self._video.path), scheme)
        pts, dts = packet.pts, packet.dts
        if dts is not None:
            if dts < self._last_dts:
                self._irregular = self._irregular or "time runs backwards"
            self._last_dts = dts
        if pts is None:  # which is no time: the frame's place is found once it is decoded
            self._irregular = self._irregular or "packets without pts"
            pts = self._start
        elif not self._start <= pts < self._end:
            self._widen(pts, packet)
        if packet.size <= self._not_coded_bytes:
            self._irregular = self._irregular or "packets that may give no frame"
        self._pts.append(pts)
        self._dts.append(pts if dts is None else dts)
        self._keyframe.append(packet.is_keyframe)
        self._shown.append(not (packet.is_discard or (self._is_hidden is not None and self._is_hidden(packet))))
        self._keep(packet)

    def build(self, stopped: str | None) -> PacketIndex:
        pts, shown = np.array(self._pts, np.int64), np.array(self._shown, bool)
        self._irregular = self._irregular or self._look_at_times(pts, shown)
        if self._irregular is None and self._jumps and self._base is not None:
            self._check_length(self._base)
        return PacketIndex(
            pts=pts,
            keyframe=np.array(self._keyframe, bool),
            shown=shown,
            last_duration=self._last_duration,
            kept=self._kept,
            clean=self._codec in _KEYFRAMES_ARE_CLEAN,
            irregular=self._irregular,
            stopped=stopped,
            dts=np.array(self._dts, np.int64),
            reorders=self._pts != self._dts,
        )

    def _look_at_times(self, pts: np.ndarray, shown: np.ndarray) -> str | None:
        """Why the times can't be taken as they are, or None."""
        ticks = np.unique(pts[shown])
        if len(ticks) != np.count_nonzero(shown):
            return "several frames with the same pts"
        if not any(self._keyframe):
            return "no keyframe"
        if has_jump(ticks, jump_ticks=self._jump_ticks):
            return "the clock jumps"
        if len(pts) and np.ptp(pts - np.array(self._dts, np.int64)) > self._late_ticks:
            return "a pts far from its packet's turn"
        if self._codec in REORDERED and self._video.guesses_times and self._video.stream.codec_context.has_b_frames:
            return "a container without times of presentation"
        return None

    def _widen(self, pts: int, packet: Packet[VideoStream]) -> None:
        """Note how long the frames last, and refuse a video of which they last too long by an unbroken clock."""
        if self._end == _BEFORE_ALL:
            self._start = pts
        elif pts - self._end > self._jump_ticks or self._start - pts > self._jump_ticks:
            self._jumps = True
        self._start = min(self._start, pts)
        if pts >= self._end:
            self._end, self._last_duration = pts, packet.duration or 0
        if not self._jumps:
            self._check_length(packet.time_base)

    def _check_length(self, base: Fraction) -> None:
        check_length(self._video, float((self._end - self._start) * base), self._limits)

    def _keep(self, packet: Packet[VideoStream]) -> None:
        if self._kept is None:
            return
        self._kept_bytes += packet.size + _PACKET_OVERHEAD_BYTES
        if self._kept_bytes > self._limits.max_packet_bytes:
            self._kept = None
        else:
            self._kept.append(packet)


def _is_hidden_vp8(packet: Packet[VideoStream]) -> bool:
    """A packet's bit 4 says whether its frame is displayed."""
    return not memoryview(packet)[0] & 0x10


def _is_hidden_vp9(packet: Packet[VideoStream]) -> bool:
    """Whether a packet's frame is for reference only; such frames are packed with a shown one, as a rule.

    The first byte: 10, profile (2 bits, and a third where both are set), shows an older frame, type, is displayed. A
    pack ends with an index, whose first and last byte are the same: 110, bytes of a size - 1 (2), frames - 1 (3).
    """
    content = memoryview(packet)
    mark, head = content[-1], content[0]
    index_bytes = 2 + ((mark >> 3 & 3) + 1) * ((mark & 7) + 1)
    if mark & 0xE0 == _VP9_PACK and len(content) >= index_bytes and content[-index_bytes] == mark:
        return False
    later = 1 if head & _VP9_PROFILE == _VP9_PROFILE else 0
    return head & 0xC0 == _VP9_FRAME and not head >> (3 - later) & 1 and not head >> (1 - later) & 1


# Codecs that keep frames for reference alone in packets of their own; others pack them with shown ones.
_HIDES_FRAMES = {"vp8": _is_hidden_vp8, "vp9": _is_hidden_vp9}
