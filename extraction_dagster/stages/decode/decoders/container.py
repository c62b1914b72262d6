"""Open an untrusted file as a video: once, without following links; which containers, which stream, which limits.

A path was judged before it reached a decoder. It is opened once, and every reading sees the content that was there
first: if a folder or a file is swapped for a link in between, the result is an error, never another file's frames.
The container format is whitelisted and the only protocol is `file`: a playlist or a script named .mp4 would otherwise
make the library read other files or open sockets.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extraction_dagster.errors.decode import (
    NoVideoStreamError,
    VideoCodecError,
    VideoEncryptedError,
    VideoFormatError,
    VideoOpenError,
    VideoTooLargeError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

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


class ProbeNeededError(Exception):
    """What the container says is not enough: its packets must be looked at; caught here, never seen outside."""


class VideoFile:
    """An open regular file; `open_file` makes one.

    Attributes:
        path: Where it was opened.
    """

    def __init__(self, path: Path, descriptor: int, *, handed_over: bool = False) -> None:
        self.path, self._descriptor, self._handed_over = path, descriptor, handed_over

    def reading(self) -> Reading:
        """A reading from the beginning, independent of the others."""
        return Reading(self._descriptor, f"file:{self.path}")

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


class Reading:
    """A reading of a file from its beginning, with what a library that reads through Python asks for.

    Attributes:
        name: The file's name; its ending helps to tell containers apart.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self._descriptor, self._at = descriptor, 0

    def read(self, size: int) -> bytes:
        """The next bytes, `size` at most; none at the end."""
        found = os.pread(self._descriptor, size, self._at)
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, and say where that is."""
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: os.fstat(self._descriptor).st_size}
        self._at = max(0, bases[whence] + offset)
        return self._at

    def tell(self) -> int:
        """Where the reading is."""
        return self._at


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
        claimed_seconds: The duration that the container claims for the stream; None when it claims nothing.
    """

    file: VideoFile
    container: InputContainer
    stream: VideoStream
    claimed_seconds: float | None

    @property
    def path(self) -> Path:
        """The file's name."""
        return self.file.path

    @property
    def sample_aspect(self) -> float:
        """Width of a pixel over its height, as shown, once a frame was decoded; 1 when it is unset or nonsense."""
        ratio = self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio
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
    path = file.path
    container = _open_container(file, limits, probe=probe)
    with container:
        codecs = [stream.codec_context and stream.codec_context.name for stream in container.streams.video]
        if not probe and (len(codecs) != 1 or codecs[0] not in _CARRIED):
            raise ProbeNeededError
        stream = _choose_stream(path, container)
        _check_stream(path, stream, limits)
        context = stream.codec_context
        context.thread_count = 1
        context.options = {"max_pixels": str(limits.max_pixels)}
        yield OpenVideo(file, container, stream, _claimed_seconds(container, stream))


def _open_container(file: VideoFile, limits: DecodeLimits, *, probe: bool) -> InputContainer:
    import av

    # The pixel limit reaches the codecs too, which are run to find out a stream's parameters.
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS, "max_pixels": str(limits.max_pixels)}
    options["codec_whitelist"] = ",".join((limits.codecs, *_SOUND))  # of those that find out a stream's parameters
    unprobed = {"options": options | {"probesize": "32"}, "stream_options": [{"skip_frame": "all"}] * _MOST_STREAMS}
    try:
        return av.open(file.reading(), "r", metadata_errors="replace", **({"options": options} if probe else unprobed))
    except av.error.FFmpegError as error:
        raise_out_of_memory(error)
        if error.errno == errno.EINVAL:
            raise VideoFormatError(str(file.path), CONTAINERS) from error
        raise VideoOpenError(str(file.path), error.strerror or type(error).__name__) from error
    except ValueError as error:  # streams that show themselves only by their packets
        if probe:
            raise
        raise ProbeNeededError from error


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


def _choose_stream(path: Path, container: InputContainer) -> VideoStream:
    """The largest stream of moving pictures that has a decoder; the first of several as large.

    Cover art, timed thumbnails and stills are marked as such; an auxiliary track (a depth map, a 16x16 dummy) is
    smaller than the pictures that it accompanies.
    """
    from av.stream import Disposition

    aside = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image | Disposition.dependent
    playable = [s for s in container.streams.video if s.codec_context is not None and not s.disposition & aside]
    filled = [s for s in playable if s.frames != 0] or playable
    if not filled:
        found = ", ".join(_describe(stream) for stream in container.streams) or "no stream at all"
        raise NoVideoStreamError(str(path), found)
    return max(filled, key=lambda s: (s.codec_context.width * s.codec_context.height, -s.index))


def _describe(stream: object) -> str:
    codec = getattr(getattr(stream, "codec_context", None), "name", None) or "unknown codec"
    return f"{getattr(stream, 'type', 'unknown')} ({codec})"


def _check_stream(path: Path, stream: VideoStream, limits: DecodeLimits) -> None:
    context = stream.codec_context
    if context.name not in limits.codecs.split(","):
        raise VideoCodecError(str(path), context.name)
    if "enc_key_id" in stream.metadata or context.codec_tag == "encv":
        raise VideoEncryptedError(str(path))
    width, height = (max(context.width, context.coded_width), max(context.height, context.coded_height))
    if width * height > limits.max_pixels:
        raise VideoTooLargeError(str(path), width_px=width, height_px=height, max_pixels=limits.max_pixels)


def _claimed_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """The stream's own duration, else its Matroska tag, else the container's, which audio may stretch."""
    if stream.duration and stream.duration > 0 and stream.time_base:
        claimed = float(stream.duration * stream.time_base)
    elif "DURATION" in stream.metadata:
        claimed = _clock_seconds(stream.metadata["DURATION"])
    else:
        claimed = (container.duration or 0) / _MICROSECONDS
    if "matroska" in container.format.name and stream.start_time and stream.time_base:
        # Matroska counts from zero, not from the start.
        claimed -= max(0.0, float(stream.start_time * stream.time_base))
    return claimed if claimed > 0 else None


def _clock_seconds(clock: str) -> float:
    """`00:01:05.500` is 65.5; 0 when it is no such thing."""
    try:
        hours, minutes, seconds = clock.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0
