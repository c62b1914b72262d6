"""Videos of drawn patches, whose planes are computed here by the standards' own formulas, and what is read back."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import cv2  # noqa: TID253 - draws
import numpy as np
import pytest

from extraction_dagster.demo.videos import take_ordinary_priority
from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.decoders.pyav import decode_with_pyav
from extraction_dagster.stages.decode.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from extraction_dagster.stages.decode.decoders.decoder import DecodedVideo

PATCHES = (
    ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)),
    ((0, 255, 255), (255, 0, 255), (255, 255, 255), (0, 0, 0)),
    ((128, 128, 128), (200, 120, 90), (60, 120, 60), (30, 60, 140)),
)
# Of H.273: what red and blue weigh in luma.
WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}
WEIGHTS |= {9: (0.2627, 0.0593), 10: (0.2627, 0.0593), 12: (0.2126, 0.0722)}
TO_2020 = ((0.6274, 0.3293, 0.0433), (0.0691, 0.9195, 0.0114), (0.0164, 0.0880, 0.8956))  # linear, from BT.709
TO_LMS = np.array(((1688, 2146, 262), (683, 2951, 462), (99, 309, 3688))) / 4096
TO_ICTCP = {
    16: ((0.5, 0.5, 0), (6610 / 4096, -13613 / 4096, 7003 / 4096), (17933 / 4096, -17390 / 4096, -543 / 4096)),
    18: ((0.5, 0.5, 0), (3625 / 4096, -7465 / 4096, 3840 / 4096), (9500 / 4096, -9212 / 4096, -288 / 4096)),
}  # fmt: skip
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"qp": "4"}),
    "hevc": ("libx265", {"x265-params": "log-level=none:qp=4:pools=none:frame-threads=1"}),
    "vp9": ("libvpx-vp9", {"crf": "4", "b": "0", "cpu-used": "8", "deadline": "realtime"}),
    "vp8": ("libvpx", {"crf": "4", "b": "20M", "cpu-used": "8", "deadline": "realtime"}),
    "av1": ("libsvtav1", {"crf": "4", "preset": "6", "svtav1-params": "lp=1"}),
    "mpeg2": ("mpeg2video", {"q:v": "1", "qmin": "1", "qmax": "2", "b": "60M", "maxrate": "80M", "bufsize": "60M"}),
    "prores": ("prores_ks", {"profile": "hq", "qscale": "2"}),
    "ffv1": ("ffv1", {}),
}


@dataclass(frozen=True)
class Drawn:
    """How a video of patches is made.

    Attributes:
        planes: The matrix of its planes, whatever is said about it; likewise `full`.
        said: Matrix, primaries, transfer and range that its encoder is told.
        scene: Draw soft colours and shapes in place of patches.
        rewrite: A filter of packets that changes what the stream says, but not what the container does.
    """

    codec: str = "h264"
    name: str = "drawn.mp4"
    size: tuple[int, int] = (192, 144)
    pix_fmt: str = "yuv420p"
    planes: int = 1
    full: bool = False
    hdr: int | None = None
    wide: bool = False
    said: tuple[int, int, int, int] = (2, 2, 2, 0)
    frames: int = 4
    first: int = 0
    rewrite: str = ""
    scene: bool = False
    options: dict[str, str] = field(default_factory=dict)
    container: dict[str, str] = field(default_factory=dict)


def chart(number: int, size: tuple[int, int]) -> np.ndarray:
    """Twelve patches over a strip that carries `number` as eight white or black cells: float64, 0 to 1."""
    width, height = size
    image = np.zeros((height, width, 3))
    rows = height * 3 // 4
    for row, line in enumerate(PATCHES):
        for column, colour in enumerate(line):
            x, y = slice(column * width // 4, (column + 1) * width // 4), slice(row * rows // 3, (row + 1) * rows // 3)
            image[y, x] = np.array(colour) / 255
    for bit in range(8):
        image[rows:, bit * width // 8 : (bit + 1) * width // 8] = number >> bit & 1
    return image


def scene(number: int, size: tuple[int, int]) -> np.ndarray:
    """Soft colours, of other places for each number, and a bright and a dark shape: float64, 0 to 1."""
    width, height = size
    coarse = np.random.default_rng(number).random((5, 7, 3)).astype(np.float32)
    image = cv2.resize(coarse, size, interpolation=cv2.INTER_LINEAR).astype(np.float64)
    cv2.circle(image, (width // 3, height // 2), height // 4, (0.95, 0.9, 0.4), -1, cv2.LINE_AA)
    cv2.rectangle(image, (width * 3 // 5, height // 3), (width * 4 // 5, height * 4 // 5), (0.05, 0.1, 0.2), -1)
    return np.clip(image, 0, 1)


def patches_in(picture: np.ndarray) -> list[list[tuple[int, ...]]]:
    """The means of the middles of the twelve patches."""
    height, width = picture.shape[0] * 3 / 4 / 3, picture.shape[1] / 4

    def mean(row: int, column: int) -> tuple[int, ...]:
        down, across = (
            slice(int((at + 0.3) * size), int((at + 0.7) * size)) for at, size in ((row, height), (column, width))
        )
        return tuple(picture[down, across].reshape(-1, 3).mean(axis=0).round().astype(int).tolist())

    return [[mean(row, column) for column in range(4)] for row in range(3)]


def number_of(picture: np.ndarray) -> int:
    """The number that a picture carries."""
    height, width = picture.shape[:2]
    strip = picture[height * 13 // 16 : height * 15 // 16].mean(axis=(0, 2))
    return sum(1 << bit for bit in range(8) if strip[(2 * bit + 1) * width // 16] > 128)


def srgb_light(signal: np.ndarray) -> np.ndarray:
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def pq(nits: np.ndarray) -> np.ndarray:
    y = np.maximum(nits / 10_000, 0) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def hlg(scene: np.ndarray) -> np.ndarray:
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(
        scene <= 1 / 12, np.sqrt(3 * np.maximum(scene, 0)), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c
    )


def light_in_2020(image: np.ndarray, transfer: int) -> np.ndarray:
    """SDR white at 203 cd/m2, in BT.2020: in cd/m2 for PQ, as the light of the scene for HLG."""
    nits = srgb_light(image) @ np.array(TO_2020).T * 203
    if transfer == 16:
        return nits
    shown = nits / 1000
    luma = np.maximum(shown @ np.array((0.2627, 0.6780, 0.0593)), 1e-6)[..., None]
    return shown * luma ** (1 / 1.2 - 1)


def oetf(light: np.ndarray) -> np.ndarray:
    return np.where(light < 0.018, 4.5 * light, 1.0993 * np.maximum(light, 0) ** 0.45 - 0.0993)


def oetf_light(signal: np.ndarray) -> np.ndarray:
    return np.where(signal < 0.081, signal / 4.5, ((signal + 0.0993) / 1.0993) ** (1 / 0.45))


def luma_and_differences(image: np.ndarray, drawn: Drawn) -> np.ndarray:
    """Luma, 0 to 1, and two differences, -0.5 to 0.5, by the formulas of H.273 and BT.2100."""
    curve = {16: pq, 18: hlg}.get(drawn.hdr or 0)
    if drawn.planes == 14:
        lms = light_in_2020(image, drawn.hdr or 16) @ TO_LMS.T
        return curve(lms) @ np.array(TO_ICTCP[drawn.hdr or 16]).T
    if curve is not None:
        image = curve(light_in_2020(image, drawn.hdr or 16))
    if drawn.wide:
        linear = srgb_light(image) @ np.array(TO_2020).T
        image = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)
    red, green, blue = np.moveaxis(image, -1, 0)
    if drawn.planes == 0:
        return np.stack([green, blue, red], -1)
    if drawn.planes == 8:
        return np.stack([red / 4 + green / 2 + blue / 4, green / 2 - (red + blue) / 4, (red - blue) / 2], -1)
    weight_red, weight_blue = WEIGHTS[drawn.planes]
    weights = np.array((weight_red, 1 - weight_red - weight_blue, weight_blue))
    if drawn.planes == 10:
        luma = oetf(oetf_light(image) @ weights)
        first, second = blue - luma, red - luma
        blue_scale = np.where(first <= 0, 2 * 0.9702, 2 * 0.7910)
        red_scale = np.where(second <= 0, 2 * 0.8591, 2 * 0.4969)
        return np.stack([luma, first / blue_scale, second / red_scale], -1)
    luma = image @ weights
    return np.stack([luma, (blue - luma) / (2 * (1 - weight_blue)), (red - luma) / (2 * (1 - weight_red))], -1)


def drawn_frame(number: int, drawn: Drawn) -> Any:
    """A frame whose planes hold the chart."""
    import av

    image = scene(number, drawn.size) if drawn.scene else chart(number, drawn.size)
    planes = luma_and_differences(image, drawn)
    frame = av.VideoFrame(*drawn.size, drawn.pix_fmt)
    bits = frame.format.components[0].bits
    top, step = (1 << bits) - 1, 1 << (bits - 8)
    for place in range(3):
        plane = planes[..., place]
        if drawn.planes == 0 or place == 0:
            coded = plane * top if drawn.full else (plane * 219 + 16) * step
        else:
            coded = plane * top + (1 << (bits - 1)) if drawn.full else (plane * 224 + 128) * step
        target = frame.planes[place]
        down, across = drawn.size[1] // target.height, drawn.size[0] // target.width
        coded = coded.reshape(target.height, down, target.width, across).mean(axis=(1, 3))
        kind = np.uint8 if bits == 8 else np.uint16
        rows = np.zeros((target.height, target.line_size // np.dtype(kind).itemsize), kind)
        rows[:, : target.width] = np.clip(coded + 0.5, 0, top)
        target.update(rows.tobytes())
    frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range = drawn.said
    return frame


def render_drawn(path: Path, drawn: Drawn) -> Path:
    """Encode it, ten frames a second."""
    import av
    from av.bitstream import BitStreamFilterContext

    codec, options = CODECS[drawn.codec]
    with av.open(str(path), "w", options=drawn.container) as container:
        stream: Any = container.add_stream(codec, rate=10, options=options | drawn.options)
        stream.width, stream.height = drawn.size
        stream.pix_fmt = drawn.pix_fmt
        context = stream.codec_context
        context.thread_count = 1
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = drawn.said
        container.start_encoding()
        take_ordinary_priority()
        rewriter = BitStreamFilterContext(drawn.rewrite or "null", in_stream=stream)
        for number in [*range(drawn.frames), None]:
            frame = None
            if number is not None:
                frame = drawn_frame(number, drawn)
                frame.pts, frame.time_base = number + drawn.first, Fraction(1, 10)
            for packet in stream.encode(frame):
                for rewritten in rewriter.filter(packet):
                    rewritten.stream = stream
                    container.mux(rewritten)
    return path


@pytest.fixture
def draw(tmp_path) -> Callable[..., Path]:
    """Draws a video: `draw(codec=…, planes=…, said=…)`."""

    def make(**fields: Any) -> Path:
        drawn = Drawn(**fields)
        return render_drawn(tmp_path / drawn.name, drawn)

    return make


@pytest.fixture(scope="session")
def decode() -> Callable[..., DecodedVideo]:
    """Decodes every frame of a video at its own size, or a little smaller."""

    def run(path: Path, **fields: Any) -> DecodedVideo:
        sampling = Sampling("fps", fields.pop("fps", 10.0))
        fields = {"short_side_px": 224, "limits": DecodeLimits(), **fields}
        return decode_with_pyav(path, sampling=sampling, **fields)

    return run


@pytest.fixture(scope="session")
def farthest() -> Callable[[np.ndarray], int]:
    """How far the patches of a picture are from what was drawn, at most, of 255."""

    def measure(picture: np.ndarray) -> int:
        return int(np.abs(np.array(patches_in(picture)) - np.array(PATCHES)).max())

    return measure


@pytest.fixture(scope="session")
def patches() -> Callable[[np.ndarray], list[list[tuple[int, ...]]]]:
    """Reads the twelve patches."""
    return patches_in


@pytest.fixture(scope="session")
def drawn_number() -> Callable[[np.ndarray], int]:
    """Reads the number under the patches."""
    return number_of


TOP_FIRST = {"qp": "4", "x264-params": "tff=1"}


def encode(  # noqa: PLR0913 - fixtures
    path,
    images,
    *,
    codec="libx264",
    pix_fmt="yuv420p",
    rate=10,
    first=0,
    options=None,
    of_context=None,
    source="rgb24",
    first_field=None,
    form=None,
):
    import av

    flag = flagged(first_field) if first_field else None

    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options={"qp": "10"} if options is None else options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        for name, value in (of_context or {}).items():
            setattr(stream.codec_context, name, value)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=source)
            frame = flag(frame) if flag else frame
            frame.pts, frame.time_base = number + first, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def flagged(first_field):
    """Marks frames as interlaced, "tff" or "bff", as a camera does."""
    from av.filter import Graph

    ends = []

    def mark(frame):
        if not ends:
            graph = Graph()
            source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=1)
            sink = graph.add("buffersink")
            graph.link_nodes(source, graph.add("setfield", first_field), sink).configure()
            ends.extend((graph, source, sink))
        ends[1].push(frame)
        return ends[2].pull()

    return mark


def insert_box(path, entry, box):
    """Put a box at the end of an mp4's sample entry, and lengthen every box around it; the index comes last."""
    data = bytearray(path.read_bytes())
    start, end = 0, len(data)
    boxes = ((b"moov", 8), (b"trak", 8), (b"mdia", 8), (b"minf", 8), (b"stbl", 8), (b"stsd", 16), (entry, 86))
    for name, head in boxes:
        at = start
        while data[at + 4 : at + 8] != name:
            at += struct.unpack_from(">I", data, at)[0]
        size = struct.unpack_from(">I", data, at)[0]
        struct.pack_into(">I", data, at, size + len(box))
        start, end = at + head, at + size
    data[end:end] = box
    path.write_bytes(data)
    return path


def clean_aperture(width, height, right, down):
    """A clap box: width and height, and how far its middle lies off the picture's, each as a fraction."""
    return struct.pack(">I4s8i", 40, b"clap", width, 1, height, 1, right, 2, down, 2)


def fields(count):
    """Pictures of single moments, a bright bar moving by 12 pixels from each to the next."""
    images = []
    for number in range(count):
        image = np.full((288, 360, 3), 40, np.uint8)
        image[60:230, 12 * number : 12 * number + 24] = 230
        images.append(image)
    return images


def woven(first, second, *, top_first):
    frame = first.copy()
    frame[1 if top_first else 0 :: 2] = second[1 if top_first else 0 :: 2]
    return frame


def half_transparent():
    """Opaque, half transparent, and white under full transparency."""
    image = np.zeros((64, 96, 4), np.uint8)
    image[:, :32] = (200, 100, 50, 255)
    image[:, 32:64] = (200, 100, 50, 128)
    image[:, 64:] = (255, 255, 255, 0)
    return image


@pytest.fixture(scope="session")
def encoded() -> Callable[..., Path]:
    """Encodes pictures as they are: `encoded(path, images, codec=…)`."""
    return encode


@pytest.fixture(scope="session")
def box_inserted() -> Callable[[Path, bytes, bytes], Path]:
    """Puts a box at the end of an mp4's sample entry."""
    return insert_box


@pytest.fixture(scope="session")
def aperture() -> Callable[[int, int, int, int], bytes]:
    """Makes a clap box."""
    return clean_aperture


@pytest.fixture(scope="session")
def moments() -> list[np.ndarray]:
    """Pictures of single moments, two a frame of interlaced video."""
    return fields(24)


@pytest.fixture(scope="session")
def weave() -> Callable[..., np.ndarray]:
    """Makes a frame of two moments."""
    return woven


@pytest.fixture
def clean_aperture_clip(tmp_path) -> Path:
    """Of 320x240 the middle 240x160 is to be shown."""
    path = encode(tmp_path / "clap.mp4", [np.full((240, 320, 3), 90, np.uint8)] * 3)
    return insert_box(path, b"avc1", clean_aperture(240, 160, 0, 0))


@pytest.fixture
def interlaced_clip(tmp_path) -> Path:
    """A bar that moves by 12 pixels from field to field."""
    single = fields(24)
    images = [woven(first, second, top_first=True) for first, second in zip(single[::2], single[1::2], strict=True)]
    return encode(tmp_path / "interlaced.mp4", images, rate=25, options=TOP_FIRST, first_field="tff")


@pytest.fixture
def transparent_image() -> np.ndarray:
    """Opaque, half transparent, and white under full transparency; RGBA."""
    return half_transparent()


@pytest.fixture
def transparent_clip(tmp_path) -> Path:
    """Three such pictures."""
    return encode(
        tmp_path / "alpha.mov", [half_transparent()] * 3, codec="png", pix_fmt="rgba", options={}, source="rgba"
    )
