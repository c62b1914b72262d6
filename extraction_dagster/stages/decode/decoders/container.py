"""Open an untrusted file as a video: once, without following links; which containers, which stream, which limits.

A path was judged before it reached a decoder. It is opened once, and every reading sees the content that was there
first: if a folder or a file is swapped for a link in between, the result is an error, never another file's frames.
The container format is whitelisted and the only protocol is `file`: a playlist or a script named .mp4 would otherwise
make the library read other files or open sockets. What a file is beside a container is `kinds`' affair.

Long because opening, and all that is known of what is open, share one file's descriptor: name, container, clock, claim.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from extraction_dagster.errors.decode import (
    VideoCodecError,
    VideoEncryptedError,
    VideoFormatError,
    VideoOpenError,
    VideoTooLargeError,
)
from extraction_dagster.stages.decode.decoders import kinds
from extraction_dagster.stages.decode.decoders.clock import BROADCAST_JUMP_SECONDS, JUMP_SECONDS
from extraction_dagster.stages.decode.decoders.streams import choose_stream, own_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from av.container import InputContainer
    from av.error import FFmpegError
    from av.packet import Packet
    from av.stream import Stream
    from av.video.stream import VideoStream

    from extraction_dagster.errors import ExtractionError
    from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits

# Looking a folder up needs no right to list it, where the system can tell the two apart.
_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
# A pipe that took the file's place must not make the opening wait for somebody who writes to it.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_LINKS = frozenset({errno.ELOOP, errno.ENOTDIR})
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,mxf"
# Codecs whose parameters an MP4 holds outside of its packets: none has to be decoded before the stream is known.
_CARRIED = frozenset({"h264", "hevc", "mpeg4"})
# Decoders of sound that the library may open while it finds out what a file holds; none is used after that.
_SOUND = (
    "aac",
    "mp3",
    "mp3float",
    "mp2",
    "mp2float",
    "opus",
    "libopus",
    "vorbis",
    "ac3",
    "eac3",
    "flac",
    "wmav2",
    "amrnb",
)
_MOST_STREAMS = 16  # whose packets are not decoded while the file is opened without a probe
_MICROSECONDS = 1_000_000
_MAX_ASPECT = 8.0
# Containers without times of presentation: the library makes some up from the order of decoding.
_NO_TIMES = frozenset({"avi", "h264", "hevc", "mpegvideo", "m4v", "obu"})
_CLAIMED_FROM_START = frozenset({"avi", "asf"})  # of each stream; ASF claims the file's length for all of them
_SAME_SECONDS = 0.001
_BROADCAST = frozenset({"mpegts", "mpeg"})
_REORDERING_SECONDS = 0.5  # by which the first picture of a fragmented MP4 may follow what is decoded first


class ProbeNeededError(Exception):
    """What the container says is not enough: its packets must be looked at; caught here, never seen outside."""


class VideoFile:
    """An open regular file; `open_file` makes one.

    Attributes:
        path: Where it was opened.
        kind: What it is, where it is no container of videos, or may be none.
        ignores_edits: Whether its edit lists are left out of account, since they show nothing.
    """

    def __init__(self, path: Path, descriptor: int, *, handed_over: bool = False) -> None:
        self.path, self._descriptor, self._handed_over = path, descriptor, handed_over
        self.ignores_edits = False
        self._start, self._end = 0, os.fstat(descriptor).st_size
        self._start = kinds.motion_part(self.reading()) or 0
        self.kind = kinds.kind_of(self.reading())
        if self.kind is not None and self.kind.num_bytes is not None:
            self._end = self.kind.num_bytes

    def reading(self) -> kinds.Reading:
        """A reading from the beginning, independent of the others; of a motion photo, its video."""
        return kinds.Reading(self._descriptor, f"file:{self.path}", start=self._start, end=self._end)

    @property
    def is_motion_photo(self) -> bool:
        """Whether it is a photo, of which the video behind it is read."""
        return self._start > 0

    def saying_what(self, why: str) -> str:
        """Why it gives no picture, with what it is, where that is known."""
        what = self.kind.words if self.kind is not None else ""
        if not what and kinds.is_index_alone(self.reading()):
            what = "an MP4's index without pictures: the first part of a stream, or cut off"
        return f"it is {what}; {why}" if what else why

    @property
    def alias(self) -> str:
        """A path of this very file, for a library that takes only paths; on Linux it stays valid without the name.

        In a worker, which can open no path, it is FFmpeg's name for descriptor 0, and that is the file from here on.
        """
        if self._handed_over:
            os.dup2(self._descriptor, 0)
            os.lseek(0, 0, os.SEEK_SET)
            return "fd:"
        alias = f"/proc/self/fd/{self._descriptor}"
        return alias if os.path.exists(alias) else str(self.path)  # noqa: PTH110 - a string for a library


# What a worker's parent opened for it, or why it could not; a worker can open nothing by itself.
_handed_over: list[int | str] = []


def hand_over(opened: int | str | None) -> None:
    """Let the next `open_file` in this process give this descriptor, or fail for this reason; None takes it back."""
    for descriptor in _handed_over:
        if isinstance(descriptor, int):
            os.close(descriptor)
    _handed_over[:] = [] if opened is None else [opened]


@contextmanager
def open_file(path: Path) -> Iterator[VideoFile]:
    """Open a regular file, without following links.

    Args:
        path: Resolved before: a link anywhere in it is refused.

    Raises:
        VideoOpenError: It is gone, no regular file, or a link leads to it.
    """
    given = _handed_over.pop() if _handed_over else None
    if isinstance(given, str):
        raise VideoOpenError(str(path), given)
    path = path if given is not None else path.absolute()
    descriptor = open_descriptor(path) if given is None else given
    try:
        yield VideoFile(path, descriptor, handed_over=given is not None)
    finally:
        os.close(descriptor)


def open_descriptor(path: Path) -> int:
    """Open a regular file for reading, without following links.

    Raises:
        VideoOpenError: It is gone, no regular file, or a link leads to it.
    """
    try:
        descriptor = _open_without_links(path)
    except OSError as error:
        why = "a link leads to it, or it was replaced meanwhile" if error.errno in _LINKS else error.strerror
        raise VideoOpenError(str(path), why or type(error).__name__) from error
    except ValueError as error:  # a NUL byte
        raise VideoOpenError(str(path), str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise VideoOpenError(str(path), "it is no regular file")
    return descriptor


def _open_without_links(path: Path) -> int:
    folder = os.open(path.anchor, _FOLDER)
    try:
        for part in path.parts[1:-1]:
            inner = os.open(part, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(path.name, _FILE, dir_fd=folder)
    finally:
        os.close(folder)


@dataclass(frozen=True, slots=True)
class OpenVideo:
    """A file that is open, and its moving pictures.

    Attributes:
        file: The file.
        container: The open container.
        stream: The chosen stream; its codec context is set to one thread.
        first_sound_seconds: When sound begins, where the streams' own word for it is a guess; None where it is none.
    """

    file: VideoFile
    container: InputContainer
    stream: VideoStream
    first_sound_seconds: Fraction | None = None

    @property
    def path(self) -> Path:
        """The file's name."""
        return self.file.path

    @property
    def claim_is_shared(self) -> bool:
        """Whether the container claims a duration for all streams together: sound may be what lasts so long."""
        return own_seconds(self.stream) is None or self.container.format.name == "asf"

    def claimed_seconds(
        self, first_tick: float | None = None, *, covered_seconds: float = 0.0, late_seconds: float = 0.0
    ) -> float | None:
        """How long the container claims that the pictures last; None when it claims nothing.

        Args:
            first_tick: Where the first picture stands on the stream's clock; without it, where the stream says so.
            covered_seconds: How long they do last, which tells a length from an end where either may be meant.
            late_seconds: As `late_seconds` gives it: what is claimed for the file counts from the file's start.
        """
        if self.file.kind is not None and self.file.kind.is_photo:
            return None
        own = own_seconds(self.stream)
        claimed = (self.container.duration or 0) / _MICROSECONDS if own is None else own
        first = (self.stream.start_time or 0) if first_tick is None else first_tick
        start = max(0.0, float(Fraction(first) * (self.stream.time_base or 0)))
        if "matroska" in self.container.format.name:  # counts from zero, not from the start
            claimed -= start
        elif "mp4" in self.container.format.name and self.stream.frames == 0 and start > _REORDERING_SECONDS:
            # Of fragments it is their length, or where the last one ends.
            claimed = min(claimed, abs(claimed - start), key=lambda seconds: abs(seconds - covered_seconds))
        elif own is None or self.container.format.name in _CLAIMED_FROM_START:
            claimed -= late_seconds
        return claimed if claimed > 0 else None

    @property
    def guesses_times(self) -> bool:
        """Whether the container has no times of presentation: then the order in which frames are decoded counts."""
        return self.container.format.name in _NO_TIMES

    @property
    def jump_seconds(self) -> float:
        """The gap between two frames that may be a jump of the clock."""
        return BROADCAST_JUMP_SECONDS if self.container.format.name in _BROADCAST else JUMP_SECONDS

    @property
    def sound_seconds(self) -> float:
        """How long sound lasts, as far as the container says it; 0 without sound."""
        return max((own_seconds(stream) or 0.0 for stream in self.container.streams.audio), default=0.0)

    def late_seconds(self, tick: float, *, first_dts: int | None = None) -> float:
        """How long after the file's start the frame at a tick of the stream's clock is shown.

        A player's zero is where the first of its streams begins: pictures may start after sound.

        Args:
            tick: Where the first picture stands.
            first_dts: Where the first packet does, which counts where the container has no times of presentation.
        """
        if self.guesses_times:
            tick = first_dts if first_dts is not None else self.stream.start_time or 0
        own = Fraction(tick) * (self.stream.time_base or 0)
        others = (stream for stream in self.container.streams if stream.index != self.stream.index)
        starts = [start for start in map(_start_seconds, others) if start is not None]
        if self.first_sound_seconds is not None:
            starts.append(self.first_sound_seconds)
        late = float(own - min([own, *starts]))
        # Less is a rounding of clocks, and more is a clock that is wrong.
        return late if _SAME_SECONDS <= late <= max(JUMP_SECONDS, self.sound_seconds) else 0.0

    def notes(self, late_seconds: float, *, mended: int = 0) -> tuple[str, ...]:
        """What it is and how its clock was understood, in words.

        Args:
            late_seconds: As `late_seconds` gives it.
            mended: Frames whose stamps were missing or wrong.
        """
        context, kind = self.stream.codec_context, self.file.kind
        what = kind.words if kind is not None else self.container.format.name.partition(",")[0]
        what = f"the video of a motion photo ({what})" if self.file.is_motion_photo else what
        found = [f"{what}: {context.codec.canonical_name}, {context.width}x{context.height}"]
        others = len(self.container.streams.video) - 1
        found += [f"stream {self.stream.index}, one of {others + 1} of pictures"] if others else []
        found += ["an edit list that shows nothing is left out"] if self.file.ignores_edits else []
        found += [f"pictures start {late_seconds:.3f} s after the file"] if late_seconds else []
        if self.guesses_times:
            return (*found, "the container has no times: frames in the order of decoding")
        return (*found, *([f"clock: {mended} frames with a missing or wrong time"] if mended else []))

    @property
    def sample_aspect(self) -> float:
        """Width of a pixel over its height, as shown, once a frame was decoded; 1 when it is unset or nonsense."""
        return sound_aspect(self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio)


def sound_aspect(ratio: Fraction | None) -> float:
    """An aspect, or 1 when it is unset or nonsense."""
    aspect = float(ratio) if ratio else 1.0
    return aspect if 1 / _MAX_ASPECT <= aspect <= _MAX_ASPECT else 1.0


def may_do_without_probe(file: VideoFile) -> bool:
    """Whether it is an MP4 or a QuickTime file, by its first bytes."""
    return file.reading().read(8)[4:] == b"ftyp"


@contextmanager
def open_video(file: VideoFile, limits: DecodeLimits, *, probe: bool = True) -> Iterator[OpenVideo]:
    """Take an open file for a video and choose its stream.

    Args:
        file: The file.
        limits: What it may need.
        probe: Decode the first frames to find out what the container does not say, which costs a keyframe at least.

    Raises:
        ProbeNeededError: Without `probe`, it has several video streams, or one whose codec may want it.
        VideoOpenError: The file is no complete video.
        VideoFormatError: The file's format is one that is never opened.
        NoVideoStreamError: It holds no moving pictures.
        VideoCodecError: Their codec is one that is not opened.
        VideoEncryptedError: They are encrypted.
        VideoTooLargeError: They have too many pixels.
    """
    from av.codec.context import Flags

    container = _open_container(file, limits, probe=probe)
    with container:
        codecs = [stream.codec_context and stream.codec_context.name for stream in container.streams.video]
        if not probe and (len(codecs) != 1 or codecs[0] not in _CARRIED):
            raise ProbeNeededError
        stream = choose_stream(str(file.path), container, file.reading())
        _check_stream(file, stream, limits)
        context = stream.codec_context
        context.thread_count = 1
        context.flags |= Flags.unaligned  # else left edges are cropped to a multiple of 32 pixels only
        context.options = {"max_pixels": str(limits.max_pixels)}
        # Only packets tell when a fragment's sound begins, and none was looked at.
        guessed = not probe and stream.frames == 0 and len(container.streams.audio) > 0
        yield OpenVideo(file, container, stream, _first_sound_seconds(file, limits) if guessed else None)


def _open_container(file: VideoFile, limits: DecodeLimits, *, probe: bool) -> InputContainer:
    import av

    named = file.kind.format if file.kind is not None else None
    if file.kind is not None and file.kind.is_foreign:
        raise VideoFormatError(str(file.path), CONTAINERS, file.kind.words)
    # The pixel limit reaches the codecs too, which are run to find out a stream's parameters.
    allowed = named or CONTAINERS
    options = {"protocol_whitelist": "file", "format_whitelist": allowed, "max_pixels": str(limits.max_pixels)}
    options["codec_whitelist"] = ",".join((limits.codecs, *_SOUND))  # of those that find out a stream's parameters
    if file.ignores_edits:
        options["ignore_editlist"] = "1"
    unprobed = {"options": options | {"probesize": "32"}, "stream_options": [{"skip_frame": "all"}] * _MOST_STREAMS}
    more = {"options": options} if probe else unprobed
    try:
        return av.open(file.reading(), "r", format=named, metadata_errors="replace", **more)
    except av.error.FFmpegError as error:
        raise_out_of_memory(error)
        raise _refusal(file, error) from error
    except ValueError as error:  # streams that show themselves only by their packets
        if probe:
            raise
        raise ProbeNeededError from error


def _first_sound_seconds(file: VideoFile, limits: DecodeLimits) -> Fraction | None:
    import av

    with _open_container(file, limits, probe=False) as again:
        try:
            packet = next(again.demux(*again.streams.audio), None)
        except av.error.FFmpegError as error:
            raise_out_of_memory(error)
            return None
        # What comes before zero primes the codec and is not heard.
        return None if packet is None or packet.pts is None else max(0, packet.pts) * packet.time_base


def _refusal(file: VideoFile, error: FFmpegError) -> ExtractionError:
    """The error of a file that does not open: by what it is, where that can be told."""
    if file.kind is not None:
        return VideoOpenError(str(file.path), f"it is {file.kind.words}")
    fault = kinds.index_faults(file.reading())
    if fault is None and error.errno == errno.EINVAL:
        return VideoFormatError(str(file.path), CONTAINERS)
    return VideoOpenError(str(file.path), f"it is {fault}" if fault else error.strerror or type(error).__name__)


def packets_of(video: OpenVideo) -> Iterator[Packet[VideoStream]]:
    """The packets of the stream that have content, in decode order, from where reading stands.

    Raises:
        av.error.FFmpegError: The file can't be read on.
    """
    try:
        yield from (packet for packet in video.container.demux(video.stream) if packet.size)
    except IndexError:  # PyAV 18, at the end, where a stream turned up in mid-file: nothing is left to read
        return


def raise_out_of_memory(error: Exception) -> None:
    """Tell a lack of memory from a broken file: the library reports both as its own errors.

    Raises:
        MemoryError: The library ran out of memory.
    """
    if getattr(error, "errno", None) == errno.ENOMEM:
        raise MemoryError from error


def _check_stream(file: VideoFile, stream: VideoStream, limits: DecodeLimits) -> None:
    context = stream.codec_context
    if context.name not in limits.codecs.split(","):
        raise VideoCodecError(str(file.path), context.name)
    if "enc_key_id" in stream.metadata or context.codec_tag == "encv":
        raise VideoEncryptedError(str(file.path), kinds.encryption_scheme(file.reading()))
    width, height = (max(context.width, context.coded_width), max(context.height, context.coded_height))
    if width * height > limits.max_pixels:
        raise VideoTooLargeError(str(file.path), width_px=width, height_px=height, max_pixels=limits.max_pixels)


def _start_seconds(stream: Stream) -> Fraction | None:
    """When a stream begins, where a player's clock heeds it: sound and moving pictures."""
    from av.stream import Disposition

    is_played = stream.type in {"audio", "video"} and not stream.disposition & Disposition.attached_pic
    if not is_played or stream.start_time is None or stream.time_base is None:
        return None
    return stream.start_time * stream.time_base
