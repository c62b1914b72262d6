"""Videos rendered on the spot, and what a plain full decode says about them.

Every picture carries its number as eight black or white cells across its upper half, so that a test can read off which
frame it got, whatever the codec, the scaler or the rotation did to it.
"""

from __future__ import annotations

import hashlib
import struct
import time
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from extraction_dagster.demo.videos import take_ordinary_priority

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=12:min-keyint=12:scenecut=0:b-pyramid=normal"}
HEVC = {
    "x265-params": "log-level=none:keyint=12:min-keyint=12:bframes=3:b-adapt=0:open-gop=1:pools=none:frame-threads=1"
}
AV1 = {"svtav1-params": "keyint=12:lp=1:hierarchical-levels=3", "preset": "12"}
ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5", "deadline": "good", "b": "200k"}


@dataclass(frozen=True)
class Clip:
    """How a test video is made."""

    codec: str = "libx264"
    name: str = "clip.mp4"
    frames: int = 48
    size: tuple[int, int] = (160, 112)
    rate: int = 24
    gop: int = 12
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    container: dict[str, str] = field(default_factory=dict)
    ticks: tuple[int, ...] | None = None  # of 1/1000 s, one a frame
    shift: int = 0  # frames by which every time is moved
    drop: int = 0  # packets left out at the beginning
    from_keyframe: int = 0  # keyframe before which every packet is left out
    hidden: int = 0  # before every such packet, a copy of it that is never displayed (VP8)
    not_coded: int = 0  # every such packet says that the picture before it stays (MPEG-4)
    matrix: tuple[int, int, int, int] | None = None
    aspect: Fraction | None = None


CLOCK_WRAPS = 24 * 2**33 // 90_000 - 20  # in the middle of the clip, at 33 bits of MPEG-TS's 90 kHz
UNEVEN = tuple(int(1000 * (i * 0.02 + (i // 7) * 0.11 + (i % 3) * 0.005)) for i in range(48))
CLIPS = {
    "h264": Clip(options={"bf": "0"}),
    "h264 with B-frames": Clip(options={"bf": "3"}),
    "h264 open GOP": Clip(options=OPEN_GOP),
    "h264 open GOP in TS": Clip(name="clip.ts", options=OPEN_GOP),
    "h264 open GOP in Matroska": Clip(name="clip.mkv", options=OPEN_GOP),
    "h264 intra refresh in TS": Clip(name="clip.ts", options={"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
    "h264 fragmented": Clip(options={"bf": "2"}, container={"movflags": "frag_keyframe+empty_moov"}),
    "h264 10-bit": Clip(pix_fmt="yuv420p10le", options={"bf": "2"}),
    "h264 4:4:4 odd size": Clip(name="clip.mkv", pix_fmt="yuv444p", size=(161, 97), options={"bf": "2"}),
    "h264 variable frame rate": Clip(ticks=UNEVEN, options={"bf": "2"}),
    "h264 edit list": Clip(options={"bf": "2"}, shift=-17, container={"avoid_negative_ts": "disabled"}),
    "h264 negative start in TS": Clip(name="clip.ts", shift=CLOCK_WRAPS, options={"bf": "2"}),
    "h264 without times at first": Clip(
        name="clip.mkv", shift=-5, options={"bf": "0"}, container={"avoid_negative_ts": "disabled"}
    ),
    "h264 late start": Clip(name="clip.mkv", shift=240, options={"bf": "2"}),
    "h264 cut out of a longer video": Clip(from_keyframe=1, options=OPEN_GOP),
    "h264 cut out of a longer TS": Clip(name="clip.ts", from_keyframe=1, options=OPEN_GOP),
    "h264 begins without a keyframe": Clip(name="clip.ts", drop=5, options={"bf": "2"}),
    "h264 turned by 90": Clip(matrix=(0, 1, -1, 0)),
    "h264 turned by 180": Clip(matrix=(-1, 0, 0, -1)),
    "h264 turned by 270": Clip(matrix=(0, -1, 1, 0)),
    "h264 one frame": Clip(frames=1),
    "h264 in AVI": Clip(name="clip.avi", options={"bf": "0"}),
    "hevc 10-bit": Clip(codec="libx265", pix_fmt="yuv420p10le", options=HEVC),
    "hevc open GOP": Clip(codec="libx265", options=HEVC),
    "hevc open GOP in TS": Clip(codec="libx265", name="clip.ts", options=HEVC),
    "hevc cut out of a longer video": Clip(codec="libx265", from_keyframe=1, options=HEVC),
    "vp8 with hidden frames": Clip(codec="libvpx", name="clip.webm", options=ALT_REF, hidden=5),
    "vp9": Clip(codec="libvpx-vp9", name="clip.webm", options=ALT_REF),
    "vp9 4:4:4": Clip(codec="libvpx-vp9", name="clip.webm", pix_fmt="yuv444p", options=ALT_REF),
    "vp9 odd size": Clip(codec="libvpx-vp9", name="clip.webm", size=(161, 97), options=ALT_REF),
    "av1": Clip(codec="libsvtav1", options=AV1),
    "mpeg2 with B-frames in TS": Clip(codec="mpeg2video", name="clip.ts", options={"bf": "2", "b": "2M"}),
    "mpeg2 in a program stream": Clip(codec="mpeg2video", name="clip.mpg", options={"bf": "2", "b": "2M"}),
    "mpeg4 with B-frames": Clip(codec="mpeg4", options={"bf": "2", "b": "2M"}),
    "mpeg4 with B-frames in AVI": Clip(codec="mpeg4", name="clip.avi", options={"bf": "2", "b": "2M"}),
    "mpeg4 odd size": Clip(codec="mpeg4", size=(161, 97), options={"bf": "2", "b": "2M"}),
    "mpeg4 with frames not coded": Clip(codec="mpeg4", name="clip.avi", options={"b": "2M"}, not_coded=7),
    "mjpeg in AVI": Clip(codec="mjpeg", name="clip.avi", pix_fmt="yuvj420p", options={"b": "8M"}),
    "prores": Clip(codec="prores_ks", name="clip.mov", pix_fmt="yuv422p10le"),
    "ffv1 in Matroska": Clip(codec="ffv1", name="clip.mkv"),
    "gif": Clip(codec="gif", name="clip.gif", pix_fmt="rgb8", rate=20),
}

# Shown stretched, so that no plain full decode says what it looks like.
STRETCHED = {"h264 wide pixels": Clip(aspect=Fraction(2, 1))}


def picture(number: int, size: tuple[int, int]) -> np.ndarray:
    """A moving pattern that carries `number` in its upper half."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([(x + 3 * number) % 256, (2 * y + number) % 256, (x + y) % 256], axis=-1).astype(np.uint8)
    for bit in range(8):
        image[: height // 2, bit * width // 8 : (bit + 1) * width // 8] = 235 if number >> bit & 1 else 20
    return image


def render_clip(path: Path, clip: Clip) -> Path:
    """Encode `clip` to `path`."""
    import av  # as the code under test does

    pictures = [picture(number, clip.size) for number in range(clip.frames)]
    with av.open(str(path), "w", options=clip.container) as container:
        stream: Any = container.add_stream(clip.codec, rate=clip.rate, options=clip.options)
        stream.width, stream.height = clip.size
        stream.pix_fmt, stream.gop_size = clip.pix_fmt, clip.gop
        stream.codec_context.thread_count = 1
        if clip.aspect is not None:
            stream.codec_context.sample_aspect_ratio = clip.aspect
        base = Fraction(1, 1000) if clip.ticks else Fraction(1, clip.rate)
        stream.codec_context.time_base = base
        container.start_encoding()
        take_ordinary_priority()
        packets = []
        for number, image in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (clip.ticks[number] if clip.ticks else number), base
            packets += stream.encode(frame)
        packets += stream.encode(None)
        keyframes = [place for place, packet in enumerate(packets) if packet.is_keyframe]
        for number, packet in enumerate(packets[max(clip.drop, keyframes[clip.from_keyframe]) :]):
            if clip.not_coded and number % clip.not_coded == clip.not_coded - 1 and not packet.is_keyframe:
                container.mux(not_coded(packet))
                continue
            if clip.shift:
                moved = round(clip.shift / clip.rate / packet.time_base)
                packet.pts, packet.dts = packet.pts + moved, packet.dts + moved
            if clip.hidden and packet.pts and not packet.is_keyframe and packet.pts % clip.hidden == 0:
                container.mux(hide(packet))
            container.mux(packet)
    if clip.matrix is not None:
        turn(path, clip.matrix)
    return path


def hide(packet: Any) -> Any:
    """A copy of a VP8 packet whose frame changes the references and is never displayed: bit 4 is clear."""
    import av

    content = bytearray(bytes(packet))
    content[0] &= ~0x10
    copy = av.Packet(bytes(content))
    copy.stream, copy.time_base = packet.stream, packet.time_base
    copy.pts = copy.dts = packet.pts - 1
    return copy


def not_coded(packet: Any) -> Any:
    """An MPEG-4 packet in place of another: after type, seconds, marker, 5 bits of time and marker, one bit is 0."""
    import av

    content = bytes(packet)
    head = content.index(b"\0\0\1\xb6") + 4
    bits = f"{int.from_bytes(content[head : head + 8]):064b}"
    at = bits.index("0", 2) + 1 + 1 + 5 + 1
    kept = bits[:at] + "0" + "0"
    kept += "1" * (-len(kept) % 8)
    copy = av.Packet(content[:head] + int(kept, 2).to_bytes(len(kept) // 8))
    copy.stream, copy.time_base, copy.pts, copy.dts = packet.stream, packet.time_base, packet.pts, packet.dts
    return copy


def turn(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write a display matrix into an mp4's track header, 40 bytes past its name."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def read_number(image: np.ndarray) -> int:
    """The number that a picture carries."""
    height, width = image.shape[:2]
    row = image[height // 8 : height // 3].mean(axis=(0, 2))
    cells = [row[(2 * bit + 1) * width // 16] > 128 for bit in range(8)]
    return sum(1 << bit for bit, on in enumerate(cells) if on)


@dataclass(frozen=True)
class Truth:
    """A plain full decode: every frame as shown at full size, sorted by time."""

    seconds: np.ndarray
    pictures: Sequence[np.ndarray]
    keyframes: Sequence[int]  # the numbers of the frames that the codec calls keyframes

    def shown_at(self, target: float) -> int:
        """The frame shown at `target`, by looking at every one."""
        return max([number for number, at in enumerate(self.seconds) if at <= target + 1e-6], default=0)


def own_picture(frame, width=None, height=None):
    """The library's own picture of a frame, RGB."""
    from av.video.reformatter import Interpolation

    area = Interpolation.AREA | Interpolation.ACCURATE_RND
    return frame.reformat(width, height, format="gbrp", interpolation=area, threads=1).to_ndarray()


def decode_everything(path: Path) -> Truth:
    """Decode the first video stream from beginning to end with the library's own loop."""
    import av

    shown = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            image = own_picture(frame)
            ticks = frame.pts if frame.pts is not None else frame.dts
            shown.append((None if ticks is None else ticks * stream.time_base, image, frame.key_frame))
        gap = round(1 / stream.average_rate / stream.time_base) * stream.time_base
    first = next(number for number, (at, _, _) in enumerate(shown) if at is not None)
    known = [shown[first][0] + (number - first) * gap if at is None else at for number, (at, _, _) in enumerate(shown)]
    order = sorted(range(len(shown)), key=known.__getitem__)
    seconds = np.array([float(known[number] - known[order[0]]) for number in order])
    keyframes = [place for place, number in enumerate(order) if shown[number][2]]
    return Truth(seconds, [shown[number][1] for number in order], keyframes)


@pytest.fixture(scope="session")
def picture_of() -> Callable[..., np.ndarray]:
    """Gives the library's own picture of a frame, at a size or at its own."""
    return own_picture


@pytest.fixture(scope="session")
def clip_path(shared_folder, one_worker) -> Callable[[str], Path]:
    """Gives the file of a clip by its name in CLIPS, rendered once for all workers of a session; read it only.

    The folder is named after what the clip is made of, so that no other clip can be taken for it.
    """
    made: dict[str, Path] = {}
    program = Path(__file__).read_bytes()

    def give(name: str) -> Path:
        if name not in made:
            clip = {**CLIPS, **STRETCHED}[name]
            key = hashlib.sha256(program + repr(clip).encode()).hexdigest()[:16]
            folder = shared_folder / "clips" / key
            with one_worker(f"clip-{key}"):
                if not folder.exists():
                    beside = folder.with_suffix(".tmp")
                    beside.mkdir(parents=True, exist_ok=True)
                    render_clip(beside / clip.name, clip)
                    beside.rename(folder)
            made[name] = folder / clip.name
        return made[name]

    return give


@pytest.fixture(scope="session")
def truth_of(clip_path) -> Callable[[str], Truth]:
    """Gives the full decode of a clip by its name."""
    known: dict[str, Truth] = {}

    def give(name: str) -> Truth:
        if name not in known:
            known[name] = decode_everything(clip_path(name))
        return known[name]

    return give


@pytest.fixture(scope="session", params=list(CLIPS))
def clip_name(request) -> str:
    """Each clip's name in turn."""
    return request.param


# One clip for each thing that can go wrong with frames and times; the whole matrix is in the two contract tests.
MECHANISMS = (
    "h264 with B-frames",
    "h264 open GOP",
    "h264 intra refresh in TS",
    "h264 variable frame rate",
    "h264 edit list",
    "h264 negative start in TS",
    "h264 without times at first",
    "h264 begins without a keyframe",
    "h264 turned by 90",
    "h264 one frame",
    "hevc cut out of a longer video",
    "vp8 with hidden frames",
    "mpeg2 in a program stream",
    "mpeg4 with frames not coded",
    "gif",
)


@pytest.fixture(scope="session", params=MECHANISMS)
def mechanism(request) -> str:
    """A clip's name for each mechanism in turn."""
    return request.param


@pytest.fixture(scope="session")
def render() -> Callable[..., Path]:
    """Renders a clip of the test's own: `render(path, codec=…, frames=…)`."""
    return lambda path, **fields: render_clip(path, Clip(**{"name": path.name, **fields}))


@pytest.fixture(scope="session")
def number_in() -> Callable[[np.ndarray], int]:
    """Reads the number that a picture carries."""
    return read_number


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Waits until a condition holds, a minute at most."""

    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.02)

    return wait


@pytest.fixture(scope="session")
def is_alive() -> Callable[[int], bool]:
    """Says whether a process is there; one that waits to be reaped is not."""

    def look(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    return look
