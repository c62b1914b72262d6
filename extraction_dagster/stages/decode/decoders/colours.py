"""What a video's numbers mean as colours, and how they become SDR: BT.709 primaries, the sRGB curve, full range.

A frame says its matrix, range, transfer and primaries, or the stream as it was opened does, which is what the container
says, or the size decides the matrix, as in players. What libswscale converts right it converts, while it scales. The
rest is converted here, on the small picture: matrices that it refuses, HDR, wide primaries, RGB of limited range.

    signal    matrix and range        R'G'B', 0 to 1
    light     table of the transfer   1 is SDR white: 203 cd/m2 of PQ and HLG (BT.2408)
    BT.709    3x3 matrix              what lies outside is cut off
    SDR       the brightest channel over 0.9 is eased to 1, the others with it: hue and saturation stay
    sRGB      table                   uint8

Codes of matrices, transfers and primaries are those of ITU-T H.273, as in libavutil.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter

UNSAID = 2
RGB, BT709, BT601, BT2020, BT2020_CONSTANT = 0, 1, 6, 9, 10
YCGCO, DERIVED, DERIVED_CONSTANT, ICTCP, IPT_C2, YCGCO_EVEN, YCGCO_ODD = 8, 12, 13, 14, 15, 16, 17
PQ, HLG = 16, 18
LIMITED, FULL = 1, 2
# On its way to packed RGB libswscale halves the columns of colour, and takes twice the time. To planes it does not; but
# where the size stays, it leaves columns unwritten unless it is told to round accurately (libswscale 9).
_PLANES = "gbrp"
_SWSCALE = {BT709: 1, 4: 4, 5: 5, BT601: 5, 7: 7, BT2020: 9}  # the matrices that libswscale converts, by its own names
_SWSCALE_BY_ITSELF = _SWSCALE | {UNSAID: _SWSCALE[BT601]}
_HD_WIDTH, _HD_OVER_HEIGHT = 1280, 576
_WHITE_CD_M2, _HLG_PEAK_CD_M2, _HLG_GAMMA = 203.0, 1000.0, 1.2
# Of SDR white; PQ ends at 10,000 cd/m2, and wide primaries reach beyond that in narrow ones.
_KNEE, _PEAK, _MOST = 0.9, _HLG_PEAK_CD_M2 / _WHITE_CD_M2, 20_000 / _WHITE_CD_M2
_SRGB_LINEAR, _CAMERA_LINEAR = 0.0031308, 0.018053969  # where the curves' linear parts end, in light
_SIGNAL_STEPS, _LIGHT_STEPS = 4095, 16_383
_AT_ONCE = 2**15  # pixels: what is computed of them stays in the cache
_BLUE_2020 = (0.2627, 0.6780, 0.0593)
# White point and red, green, blue, as x and y.
_D65 = (0.3127, 0.3290)
_PRIMARIES = {
    BT709: (_D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    4: ((0.310, 0.316), (0.67, 0.33), (0.21, 0.71), (0.14, 0.08)),
    5: (_D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: (_D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: (_D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    BT2020: (_D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: ((0.314, 0.351), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    12: (_D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_WIDE = frozenset({BT2020, 11, 12})
# Rows give L'M'S' from the three planes: BT.2100's ICtCp for PQ and for HLG, and IPT-PQ-C2; then linear LMS to BT.2020.
_LMS_SIGNAL = {
    (ICTCP, PQ): ((1, 0.00860904, 0.11102963), (1, -0.00860904, -0.11102963), (1, 0.56003134, -0.32062717)),
    (ICTCP, HLG): ((1, 0.01571858, 0.20958107), (1, -0.01571858, -0.20958107), (1, 1.02127108, -0.60527449)),
    (IPT_C2, PQ): ((1, 0.09756893, 0.20522644), (1, -0.11387649, 0.13321716), (1, 0.03261511, -0.67688718)),
}
_LMS_TO_2020 = {
    ICTCP: (
        (3.43660669, -2.50645212, 0.06984542),
        (-0.79132956, 1.98360045, -0.1922709),
        (-0.0259499, -0.09891371, 1.12486361),
    ),
    IPT_C2: (
        (3.06441879, -2.16597676, 0.10155818),
        (-0.65612108, 1.78554118, -0.12943749),
        (0.01736321, -0.04725154, 1.03004253),
    ),
}
_CONSTANT_LUMINANCE = frozenset({BT2020_CONSTANT, DERIVED_CONSTANT})
_NUMERIC = frozenset({YCGCO, DERIVED, ICTCP, IPT_C2, YCGCO_EVEN, YCGCO_ODD}) | _CONSTANT_LUMINANCE
MATRICES = frozenset(_SWSCALE) | _NUMERIC
_TRANSFERS = frozenset(range(1, 19)) - {UNSAID, 3}
_RANGES = {LIMITED: False, FULL: True}
_NAMES: dict[str, dict[int, str]] = {
    "matrix": {RGB: "RGB", BT709: "BT.709", 4: "FCC", 5: "BT.601", BT601: "BT.601", 7: "SMPTE 240M", YCGCO: "YCgCo"}
    | {BT2020: "BT.2020", BT2020_CONSTANT: "BT.2020 constant luminance", DERIVED: "derived from its primaries"}
    | {DERIVED_CONSTANT: "derived from its primaries, constant luminance", ICTCP: "ICtCp", IPT_C2: "IPT-PQ-C2"}
    | {YCGCO_EVEN: "YCgCo-Re", YCGCO_ODD: "YCgCo-Ro"},
    "transfer": {PQ: "PQ", HLG: "HLG"},
    "primaries": {BT2020: "BT.2020 primaries", 11: "DCI-P3 primaries", 12: "Display P3 primaries"},
}


class Said(NamedTuple):
    """What one place says about colours; `UNSAID`, and 0 for the range, where it says nothing."""

    matrix: int = UNSAID
    primaries: int = UNSAID
    transfer: int = UNSAID
    colour_range: int = 0


@dataclass(frozen=True, slots=True)
class Colours:
    """What the numbers of a frame mean.

    Attributes:
        matrix: From R'G'B' to planes; `UNSAID` leaves it to libswscale.
        primaries: Of R, G and B; `UNSAID` counts as BT.709.
        transfer: From light to signal; only PQ and HLG are told apart.
        full_range: Whether black is 0; None where nothing says it, and the pixel format decides.
    """

    matrix: int = UNSAID
    primaries: int = UNSAID
    transfer: int = UNSAID
    full_range: bool | None = None

    @classmethod
    def of(cls, frame: VideoFrame, opened: Said) -> Colours:
        """Understand a frame: what it does not say the stream as it was opened does, else its size."""
        own = Said(frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range)
        # Reserved codes say nothing either, nor does "these planes are R, G and B" about planes that are not.
        matrices, primaries, transfers, ranges = zip(own, opened, strict=True)
        matrix = _first(matrices, MATRICES)
        primary, transfer = _first(primaries, _PRIMARIES), _first(transfers, _TRANSFERS)
        said_range = _first(ranges, _RANGES)
        full_range = True if frame.format.name.startswith("yuvj") else _RANGES.get(said_range)
        if frame.format.is_rgb:
            matrix = RGB
        elif matrix == UNSAID:
            matrix = BT2020 if transfer in {PQ, HLG} else _matrix_by_size(frame.width, frame.height)
        if matrix in _LMS_TO_2020:
            primary, transfer = BT2020, HLG if transfer == HLG and matrix == ICTCP else PQ
        if transfer in {PQ, HLG} and primary == UNSAID:
            primary = BT2020
        return cls(matrix, primary, transfer, full_range)

    @property
    def is_hdr(self) -> bool:
        """Whether it is PQ or HLG."""
        return self.transfer in {PQ, HLG}

    def __str__(self) -> str:
        """In words: `BT.2020, PQ, BT.2020 primaries, limited range`."""
        said = ((kind, getattr(self, kind)) for kind in ("matrix", "transfer", "primaries"))
        names = [_NAMES[kind][code] for kind, code in said if code in _NAMES[kind]]
        ranges = {True: ["full range"], False: ["limited range"], None: []}
        return ", ".join(names + ranges[self.full_range])


def picture_of(
    frame: VideoFrame, size: tuple[int, int], colours: Colours, reformatter: VideoReformatter, *, tone_map: bool
) -> np.ndarray:
    """A frame at another size in SDR.

    Args:
        frame: A decoded frame; transparency is left out of account.
        size: Width and height of the picture.
        colours: What the frame's numbers mean.
        reformatter: libswscale, to be used for all frames of a video.
        tone_map: Without it HDR is taken for SDR of the same signal, and looks pale.

    Returns:
        uint8, shape (H, W, 3), RGB.
    """
    mapped = tone_map and colours.is_hdr
    wide = colours.primaries in _WIDE and not colours.is_hdr
    limited_rgb = colours.matrix == RGB and frame.color_range == LIMITED
    # libswscale takes every grey for one of full range.
    limited_grey = colours.full_range is False and frame.format.name.startswith("gray")
    if mapped or wide or limited_rgb or limited_grey or colours.matrix in _NUMERIC:
        planes, bits = _planes(frame, size, reformatter), frame.format.components[0].bits
        made = np.empty(planes.shape, np.uint8)
        for start in range(0, planes.shape[1], _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            made[:, part] = _sdr(_signal(planes[:, part], colours, bits=bits), colours, mapped=mapped, wide=wide)
        return made.reshape(3, *size[::-1]).transpose(1, 2, 0)
    arguments: dict[str, int] = {}
    wanted = _SWSCALE.get(colours.matrix)
    if wanted is not None and wanted != _SWSCALE_BY_ITSELF.get(frame.colorspace):
        arguments["src_colorspace"] = wanted
    if colours.full_range is not None and frame.color_range not in _RANGES:
        arguments["src_color_range"] = FULL if colours.full_range else LIMITED
    picture: np.ndarray = _scaled(frame, size, _PLANES, reformatter, **arguments).to_ndarray()
    return picture


def _first(codes: Iterable[int], known: Container[int]) -> int:
    return next((code for code in codes if code in known), UNSAID if UNSAID not in known else 0)


def _matrix_by_size(width_px: int, height_px: int) -> int:
    """As players do, by the picture as it is stored: turning and cropping do not count."""
    return BT709 if width_px >= _HD_WIDTH or height_px > _HD_OVER_HEIGHT else BT601


def _scaled(
    frame: VideoFrame, size: tuple[int, int], pixels: str, reformatter: VideoReformatter, **arguments: int
) -> VideoFrame:
    from av.video.reformatter import Interpolation

    area = Interpolation.AREA | Interpolation.ACCURATE_RND
    return reformatter.reformat(frame, *size, pixels, interpolation=area, threads=1, **arguments)


def _planes(frame: VideoFrame, size: tuple[int, int], reformatter: VideoReformatter) -> np.ndarray:
    """The three planes at another size, their meaning unchanged: float32, shape (3, H * W), in steps of 16 bits."""
    if frame.format.is_rgb:
        scaled, order = _scaled(frame, size, "gbrp16le", reformatter), (2, 0, 1)
    else:
        same = {"src_colorspace": 1, "dst_colorspace": 1, "src_color_range": FULL, "dst_color_range": FULL}
        scaled, order = _scaled(frame, size, "yuv444p16le", reformatter, **same), (0, 1, 2)
    width, height = size
    planes = np.empty((3, height, width), np.float32)
    for place, number in enumerate(order):
        plane = scaled.planes[number]
        planes[place] = np.frombuffer(cast("bytes", plane), np.uint16).reshape(height, plane.line_size // 2)[:, :width]
    return planes.reshape(3, -1)


def _signal(planes: np.ndarray, colours: Colours, *, bits: int) -> np.ndarray:
    """R'G'B' (L'M'S' for ICtCp) from planes: float32, shape (3, N), 0 to 1 but for what lies outside of the range."""
    full = colours.full_range if colours.full_range is not None else colours.matrix == RGB
    top = ((1 << bits) - 1) << (16 - bits)
    # Black, and the steps of luma and of the colours: 16, 219 and 224 of 8 bits.
    black, luma, chroma = (0.0, top, top) if full else (4096.0, 219 * 256.0, 224 * 256.0)
    middle = black if colours.matrix == RGB else 32_768.0
    scales = np.array([luma, luma, luma] if colours.matrix == RGB else [luma, chroma, chroma])
    if colours.matrix in _CONSTANT_LUMINANCE:
        return _constant_luminance((planes - [[black], [middle], [middle]]) / scales[:, None], _luma(colours))
    rows = np.array(_rows(colours)) / scales
    offset = rows @ np.array([black, middle, middle])
    signal: np.ndarray = rows.astype(np.float32) @ planes
    signal -= offset.astype(np.float32)[:, None]
    return signal


def _rows(colours: Colours) -> Sequence[Sequence[float]]:
    """R', G' and B' as sums of the planes, luma 0 to 1 and colours -0.5 to 0.5."""
    if colours.matrix == RGB:
        return ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    if colours.matrix == YCGCO:
        return ((1, -1, 1), (1, 1, 0), (1, -1, -1))
    if colours.matrix in {YCGCO_EVEN, YCGCO_ODD}:  # reversible: two bits more, or one, than R, G and B have
        more = 4 if colours.matrix == YCGCO_EVEN else 2
        return ((more, -more / 2, more / 2), (more, more / 2, 0), (more, -more / 2, -more / 2))
    if colours.matrix in {ICTCP, IPT_C2}:
        return _LMS_SIGNAL[colours.matrix, colours.transfer]
    red, green, blue = _luma(colours)
    return (
        (1, 0, 2 * (1 - red)),
        (1, -2 * (1 - blue) * blue / green, -2 * (1 - red) * red / green),
        (1, 2 * (1 - blue), 0),
    )


def _luma(colours: Colours) -> tuple[float, float, float]:
    """What R, G and B weigh in luma."""
    weights = {BT709: (0.2126, 0.7152, 0.0722), 4: (0.30, 0.59, 0.11), 7: (0.212, 0.701, 0.087), BT2020: _BLUE_2020}
    if colours.matrix in {DERIVED, DERIVED_CONSTANT}:
        red, green, blue = _to_xyz(colours.primaries if colours.primaries in _PRIMARIES else BT709)[1]
        return float(red), float(green), float(blue)
    return weights.get(BT2020 if colours.matrix == BT2020_CONSTANT else colours.matrix, (0.299, 0.587, 0.114))


def _constant_luminance(planes: np.ndarray, weights: tuple[float, float, float]) -> np.ndarray:
    """R'G'B' where luma is that of light: the differences are scaled by sign, and green is what luma leaves of it."""
    luma, blue, red = planes
    weight_red, weight_green, weight_blue = np.array(weights)[:, None]
    blue = luma + blue * np.where(blue <= 0, 2 * _oetf(1 - weight_blue), 2 * (1 - _oetf(weight_blue)))
    red = luma + red * np.where(red <= 0, 2 * _oetf(1 - weight_red), 2 * (1 - _oetf(weight_red)))
    rest = _light_of_oetf(luma) - weight_red * _light_of_oetf(red) - weight_blue * _light_of_oetf(blue)
    return np.stack([red, _oetf(rest / weight_green), blue]).astype(np.float32)


def _sdr(signal: np.ndarray, colours: Colours, *, mapped: bool, wide: bool) -> np.ndarray:
    """uint8, shape (3, N), of a signal."""
    is_lms = colours.matrix in _LMS_TO_2020
    if not mapped and not wide and not is_lms:
        plain: np.ndarray = (np.clip(signal, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
        return plain
    light = _look_up(_light(colours.transfer), signal)
    if is_lms:
        light = np.array(_LMS_TO_2020[colours.matrix], np.float32) @ light
    if not mapped and not wide:  # R'G'B' of the same transfer
        signal = np.interp(light, _light(colours.transfer), np.linspace(0, 1, _SIGNAL_STEPS + 1))
        return (signal * 255 + 0.5).astype(np.uint8)
    if colours.transfer == HLG:
        light *= _system_gain(np.array(_BLUE_2020, np.float32) @ light)
    if colours.primaries not in {UNSAID, BT709}:
        light = _to_bt709(colours.primaries) @ light
    np.maximum(light, 0, out=light)
    if mapped:
        _ease(light)
    return _look_up(_srgb(), light)


def _look_up(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The table's entries for values from 0, its first, to 1, its last; what lies outside gets the nearest."""
    scaled = values * np.float32(len(table) - 1)
    scaled += np.float32(0.5)
    return np.take(table, scaled.astype(np.int32), mode="clip")


def _ease(light: np.ndarray) -> None:
    """Bring the brightest channel of each pixel under 1, and the others with it, in place.

    Up to 0.9 nothing changes; 203 cd/m2 end at 0.95, which is 249 of 255, and 1000 cd/m2 at 1.
    """
    brightest = light.max(axis=0)
    if brightest.max() > _KNEE:
        light *= _look_up(_easing(), brightest / np.float32(_MOST))


@cache
def _easing() -> np.ndarray:
    """What to multiply a pixel with, of each step of its brightest channel: float32, shape (32767,)."""
    brightest = np.linspace(0, _MOST, 2 * _LIGHT_STEPS + 1)
    above, peak = np.maximum(brightest - _KNEE, 0) / (1 - _KNEE), (_PEAK - _KNEE) / (1 - _KNEE)
    eased = np.minimum(_KNEE + (1 - _KNEE) * above * (1 + above / peak**2) / (1 + above), 1)
    return (eased / np.maximum(brightest, _KNEE)).astype(np.float32)


def _system_gain(luminance: np.ndarray) -> np.ndarray:
    """HLG's rendering for a screen of 1000 cd/m2, of SDR white: Y to the 0.2."""
    return _look_up(_gains(), np.sqrt(np.maximum(luminance, 0)))


@cache
def _gains() -> np.ndarray:
    """HLG's gain of each step of the root of luminance: float32, shape (4096,)."""
    root = np.linspace(0, 1, _SIGNAL_STEPS + 1)
    return (root ** (2 * (_HLG_GAMMA - 1)) * _PEAK).astype(np.float32)


@cache
def _light(transfer: int) -> np.ndarray:
    """Light of each step of a signal: float32, shape (4096,); SDR by the curve with which it is stored as well."""
    signal = np.linspace(0, 1, _SIGNAL_STEPS + 1)
    if transfer == PQ:  # SMPTE ST 2084
        root = signal ** (32 / 2523)
        shown = (np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16_384 / 2610)
        light = shown * 10_000 / _WHITE_CD_M2
    elif transfer == HLG:  # BT.2100, scene light
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 1 / 2, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        light = np.where(signal <= 12.92 * _SRGB_LINEAR, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


@cache
def _srgb() -> np.ndarray:
    """The stored number of each step of light, by the sRGB curve: uint8, shape (16384,)."""
    light = np.linspace(0, 1, _LIGHT_STEPS + 1)
    signal = np.where(light <= _SRGB_LINEAR, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return (signal * 255 + 0.5).astype(np.uint8)


def _oetf(light: np.ndarray) -> np.ndarray:
    """BT.709's and BT.2020's signal of light."""
    above: np.ndarray = 1.099297 * np.maximum(light, 0) ** 0.45 - 0.099297
    signal: np.ndarray = np.where(light < _CAMERA_LINEAR, 4.5 * light, above)
    return signal


def _light_of_oetf(signal: np.ndarray) -> np.ndarray:
    above: np.ndarray = ((np.maximum(signal, 0) + 0.099297) / 1.099297) ** (1 / 0.45)
    light: np.ndarray = np.where(signal < 4.5 * _CAMERA_LINEAR, signal / 4.5, above)
    return light


@cache
def _to_bt709(primaries: int) -> np.ndarray:
    """Linear RGB of these primaries to BT.709: float32, shape (3, 3); white stays white."""
    matrix = np.linalg.inv(_to_xyz(BT709)) @ _to_xyz(primaries)
    kept: np.ndarray = (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)
    return kept


@cache
def _to_xyz(primaries: int) -> np.ndarray:
    """Linear RGB of these primaries to XYZ, white at Y = 1: float64, shape (3, 3)."""
    white, *corners = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in _PRIMARIES[primaries])
    columns = np.stack(corners, axis=1)
    matrix: np.ndarray = columns * np.linalg.solve(columns, white)
    return matrix
