"""From a decoded picture to the picture that a player shows: pixel aspect, size, rotation, mirroring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter

# How pixels are made, in a word for fingerprints.
SCALING = "area, full chroma"
# On its way to packed RGB libswscale halves the columns of colour, and takes twice the time. To planes it does not; but
# where the size stays, it leaves columns unwritten unless it is told to round accurately (libswscale 9).
_PLANES = "gbrp"
_MAX_SIDE_PX = 16_384
_MATRIX_ENTRIES = 9
# By counterclockwise quarter turns.
_QUARTER_TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the pictures of one video are scaled and turned.

    Attributes:
        width_px: Width after scaling, before turning.
        height_px: Height after scaling, before turning.
        transpose: Swap rows and columns.
        mirror_x: Then mirror left to right.
        mirror_y: Then mirror top to bottom.
    """

    width_px: int
    height_px: int
    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @classmethod
    def of(cls, frame: VideoFrame, *, sample_aspect: float, short_side_px: int) -> Geometry:
        """The geometry that shows `frame` upright, its short side `short_side_px` or smaller."""
        width, height = scaled_size(frame.width, frame.height, sample_aspect=sample_aspect, short_side_px=short_side_px)
        return cls(width, height, *_turn(_display_matrix(frame)))

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height as shown."""
        return (self.height_px, self.width_px) if self.transpose else (self.width_px, self.height_px)

    def show(self, frame: VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
        """The picture as a player shows it: uint8, shape (H, W, 3), RGB."""
        from av.video.reformatter import Interpolation

        area = Interpolation.AREA | Interpolation.ACCURATE_RND
        scaled = reformatter.reformat(frame, self.width_px, self.height_px, _PLANES, interpolation=area, threads=1)
        picture: np.ndarray = scaled.to_ndarray()
        if self.transpose:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]


def scaled_size(width_px: int, height_px: int, *, sample_aspect: float, short_side_px: int) -> tuple[int, int]:
    """Width and height with square pixels, the short side `short_side_px` or smaller.

    Examples:
        1280x720 at 224 is 398x224; 160x90 stays; 640x360 with pixels twice as wide as high is 796x224.
    """
    shown = width_px * sample_aspect
    scale = min(1.0, short_side_px / min(shown, height_px), _MAX_SIDE_PX / max(shown, height_px))
    return max(1, round(shown * scale)), max(1, round(height_px * scale))


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """The turning part (a, b, c, d) of the display matrix: x' = a*x + c*y, y' = b*x + d*y."""
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data that PyAV has no name for (Exif, say) hides the rest
        return _QUARTER_TURNS[round(frame.rotation / 90) % 4]
    matrix = np.frombuffer(cast("bytes", side_data), np.int32) if side_data is not None else np.empty(0)
    if len(matrix) >= _MATRIX_ENTRIES:
        return int(matrix[0]), int(matrix[1]), int(matrix[3]), int(matrix[4])
    return 1, 0, 0, 1


def _turn(matrix: tuple[int, int, int, int]) -> tuple[bool, bool, bool]:
    """Transpose, mirror x, mirror y: the quarter turn nearest to the matrix; none for a degenerate one.

    A phone held upright stores (0, 1, -1, 0): x' = -y, y' = x, so transpose, then mirror left to right.
    """
    a, b, c, d = matrix
    if a * d - b * c == 0:
        return False, False, False
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0
