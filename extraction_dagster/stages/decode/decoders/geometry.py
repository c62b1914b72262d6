"""From a decoded frame to the picture that a player shows: pixel aspect, size, turning, one size for all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from extraction_dagster.stages.decode.decoders.colours import Colours, picture_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from av.filter import FilterContext, Graph
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter

_MAX_SIDE_PX = 16_384
_MATRIX_ENTRIES = 9
_UNNAMED = re.compile(r"(\d+) is not a valid")  # of PyAV: the number of a kind of side data
_MOST_UNNAMED = 8


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a frame is scaled and turned.

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
    def of(
        cls, frame: VideoFrame, *, sample_aspect: float, short_side_px: int, size: tuple[int, int] | None = None
    ) -> Geometry:
        """The geometry that shows `frame` upright, its short side `short_side_px` or smaller.

        Args:
            frame: A decoded frame.
            sample_aspect: Width of a pixel over its height.
            short_side_px: Short side of the picture.
            size: Width and height of the part that is shown; the whole frame without it.
        """
        size = size or (frame.width, frame.height)
        width, height = scaled_size(*size, sample_aspect=sample_aspect, short_side_px=short_side_px)
        return cls(width, height, *_turn(_display_matrix(frame)))

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height as shown."""
        return (self.height_px, self.width_px) if self.transpose else (self.width_px, self.height_px)

    def show(
        self,
        frame: VideoFrame,
        reformatter: VideoReformatter,
        colours: Colours = Colours(),  # noqa: B008 - frozen
        *,
        tone_map: bool = True,
    ) -> np.ndarray:
        """The picture as a player shows it: uint8, shape (H, W, 3), RGB."""
        picture = picture_of(frame, (self.width_px, self.height_px), colours, reformatter, tone_map=tone_map)
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


def in_one_size(pictures: Sequence[np.ndarray], reformatter: VideoReformatter) -> np.ndarray:
    """Pictures of several sizes as one array: the most frequent size is kept, others are fitted into it on black.

    Args:
        pictures: uint8, each of a shape (H, W, 3), RGB.
        reformatter: libswscale.

    Returns:
        uint8, shape (N, H, W, 3).

    Examples:
        A phone that is turned gives 398x224, 398x224 and 224x398: the last is fitted as 126x224 between black bars.
    """
    shapes = [picture.shape for picture in pictures]
    shape = max(shapes, key=shapes.count)  # the first of several
    return np.stack(
        [picture if picture.shape == shape else _fitted(picture, shape, reformatter) for picture in pictures]
    )


def _fitted(picture: np.ndarray, shape: tuple[int, ...], reformatter: VideoReformatter) -> np.ndarray:
    import av

    scale = min(shape[0] / picture.shape[0], shape[1] / picture.shape[1])
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    whole = np.zeros(shape, np.uint8)
    whole[top : top + height, left : left + width] = picture_of(
        frame, (width, height), Colours(), reformatter, tone_map=False
    )
    return whole


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """The turning part (a, b, c, d) of the display matrix: x' = a*x + c*y, y' = b*x + d*y."""
    side_data = next((item for item in _side_data(frame) if item.type.name == "DISPLAYMATRIX"), None)
    matrix = np.frombuffer(cast("bytes", side_data), np.int32) if side_data is not None else np.empty(0)
    if len(matrix) >= _MATRIX_ENTRIES:
        return int(matrix[0]), int(matrix[1]), int(matrix[3]), int(matrix[4])
    return 1, 0, 0, 1


def _side_data(frame: VideoFrame) -> list[Any]:
    """A frame's side data, but for kinds that PyAV can't name: one of them, a photo's Exif say, hides all others."""
    for _ in range(_MOST_UNNAMED):
        try:
            return list(cast("Iterable[Any]", frame.side_data))
        except ValueError as error:
            unnamed = _UNNAMED.match(str(error))
            if unnamed is None:
                raise
            _, source, sink = filter_graph(frame, [("sidedata", f"mode=delete:type={unnamed[1]}")])
            source.push(frame)
            frame = cast("VideoFrame", sink.pull())
    return []


def filter_graph(frame: VideoFrame, steps: Iterable[tuple[str, str]]) -> tuple[Graph, FilterContext, FilterContext]:
    """A graph of these filters and their arguments, for frames like this one: itself, its beginning and its end."""
    from av.filter import Graph

    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    sink = graph.add("buffersink")
    graph.link_nodes(source, *(graph.add(name, arguments) for name, arguments in steps), sink).configure()
    return graph, source, sink


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
