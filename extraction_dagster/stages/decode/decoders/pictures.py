"""Makes pictures of a video's frames, of each by what holds for it: cropping, fields, transparency, colours, geometry.

The order is a player's: transparency on black, one field of an interlaced frame, the part that container and stream say
is shown, colours and size at once, turning. Frames of several sizes are fitted into the most frequent one at the end.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import numpy as np

from extraction_dagster.errors.decode import DolbyVisionError
from extraction_dagster.stages.decode.decoders.colours import BT601, FULL, MATRICES, RGB, UNSAID, Colours, Said
from extraction_dagster.stages.decode.decoders.container import sound_aspect
from extraction_dagster.stages.decode.decoders.geometry import Geometry, filter_graph, in_one_size
from extraction_dagster.stages.decode.decoders.kinds import PICTURE_BRANDS
from extraction_dagster.stages.decode.decoders.library_log import described

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from fractions import Fraction

    from av.filter import FilterContext, Graph
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame

    from extraction_dagster.stages.decode.decoders.container import OpenVideo
    from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits

_CROPPING = re.compile(r"^ +Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)$", re.MULTILINE)
_DOLBY_VISION = re.compile(r"^ +DOVI configuration record: .*profile: (\d+),.*compatibility id: (\d+)", re.MULTILINE)
# Their base layer means nothing without Dolby's metadata; of the others it is HDR10, HLG or SDR.
_DOLBY_ALONE, _DOLBY_ALONE_IF_INCOMPATIBLE = 5, frozenset({10, 20})
_ASPECT_IN_STREAM = frozenset({"h264", "hevc", "vvc", "mpeg1video", "mpeg2video", "mpeg4", "vc1"})
_SIDE_DATA = ("mov", "matroska", "mpegts")  # containers that crop, or say what Dolby Vision is
_OPAQUE = 0xFF  # of 8 bits
_has_alpha: dict[str, bool] = {}  # by pixel format: asking one costs as much as many a step
# Their decoders say "limited" where the stream says nothing.
_LIMITED_BY_DEFAULT = frozenset({"hevc", "mpeg2video", "prores"})
# Of AVIF and HEIC, whose matrix is BT.601 where nothing says it, whatever the size (ISO/IEC 23000-22).
_ITEM_BRANDS = frozenset(brand.decode() for brand in PICTURE_BRANDS) | {"avis", "hevx"}
_NO_SURPRISE = MATRICES | {RGB, UNSAID}
# Which field is first a frame knows itself, and PyAV can't say; what containers and codecs say of all may be wrong.
_FIRST_FIELD = ("separatefields", "")


class Pictures:
    """Makes the pictures of one reading of a video.

    Args:
        video: The video; no frame of it was decoded yet.
        short_side_px: Short side of the pictures; smaller frames are not scaled up.
        limits: What the video may cost.
        tone_map: Show HDR as SDR does.

    Attributes:
        notes: What was done beside scaling, in words, in the order in which it came up.

    Raises:
        DolbyVisionError: It is a profile whose frames mean nothing without Dolby's metadata.
    """

    def __init__(self, video: OpenVideo, *, short_side_px: int, limits: DecodeLimits, tone_map: bool) -> None:
        from av.video.reformatter import VideoReformatter

        context = video.stream.codec_context
        self._video, self._short_side_px, self._limits, self._tone_map = video, short_side_px, limits, tone_map
        # Before a codec has looked at its own headers: some forget what only the container says.
        self._opened = Said(context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        said = described(video) if video.container.format.name.startswith(_SIDE_DATA) else ""
        self._size, self._crop = (context.width, context.height), _cropping(said, context)
        _refuse_dolby_alone(video, _dolby_vision(said))
        self._is_item = video.container.metadata.get("major_brand", "") in _ITEM_BRANDS
        self._is_put_right = self._is_item or context.name == "vp8" or context.name in _LIMITED_BY_DEFAULT
        self._may_change_aspect = context.name in _ASPECT_IN_STREAM
        # Width of a pixel over its height, and what the codec says of it; before the first frame nothing is known.
        self._aspect: float | None = None
        self._codec_aspect: Fraction | None = None
        self._graphs: dict[tuple[object, ...], tuple[Graph, FilterContext, FilterContext]] = {}
        self._reformatter = VideoReformatter()
        self._before: tuple[tuple[object, ...], Colours] | None = None  # the frame before, as it was understood
        self.notes: dict[str, None] = {}

    def show(self, frame: VideoFrame, *, num_frames: int) -> np.ndarray:
        """The picture as a player shows it: uint8, shape (H, W, 3), RGB.

        Raises:
            FramesTooManyError: `num_frames` of its size don't fit the memory.
        """
        colours = self._colours_of(frame)
        shown, size = self._shown_part(frame, colours)
        geometry = Geometry.of(frame, sample_aspect=self._aspect or 1.0, short_side_px=self._short_side_px, size=size)
        width, height = geometry.shown_size
        self._limits.check_batch(self._video.path, num_frames=num_frames, width_px=width, height_px=height)
        return geometry.show(shown, self._reformatter, colours, tone_map=self._tone_map)

    def _colours_of(self, frame: VideoFrame) -> Colours:
        if self._is_put_right:
            self._put_right(frame)
        said = frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range
        key = (*said, frame.format.name, frame.width, frame.height)
        if self._before is None or self._before[0] != key:
            colours = Colours.of(frame, self._opened)
            if colours.matrix != RGB and frame.colorspace not in _NO_SURPRISE:
                self.notes[f"matrix {frame.colorspace} is not known"] = None
            self.notes[f"colours: {colours}" + (", shown as SDR" if colours.is_hdr and self._tone_map else "")] = None
            self._before = key, colours
        return self._before[1]

    def _put_right(self, frame: VideoFrame) -> None:
        """Let the container speak where the codec can say only one thing, or its decoder says it by default."""
        matrix, _, _, colour_range = self._opened
        if self._video.stream.codec_context.name == "vp8":  # whose every stream is BT.601
            frame.colorspace = matrix if matrix in MATRICES else frame.colorspace
        elif self._is_item and matrix not in MATRICES and frame.colorspace == UNSAID:
            frame.colorspace = BT601
        elif colour_range == FULL and frame.colorspace == frame.color_primaries == frame.color_trc == UNSAID:
            frame.color_range = FULL

    def together(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """All pictures in one size: uint8, shape (N, H, W, 3)."""
        sizes = dict.fromkeys(f"{picture.shape[1]}x{picture.shape[0]}" for picture in pictures)
        if len(sizes) > 1:
            self.notes[f"size or turning changes: {', '.join(sizes)} fitted into one"] = None
        return in_one_size(pictures, self._reformatter)

    def watch(self, frame: VideoFrame) -> None:
        """Look at every frame that is decoded, shown or not: a codec says a new aspect a few frames too early."""
        if self._aspect is not None and not (self._may_change_aspect and frame.key_frame):
            return
        now = self._video.stream.codec_context.sample_aspect_ratio
        if self._aspect is None:
            self._aspect, self._codec_aspect = self._video.sample_aspect, now  # the container's, if it says one
        elif now != self._codec_aspect:
            self._aspect, self._codec_aspect = sound_aspect(now), now

    def _shown_part(self, frame: VideoFrame, colours: Colours) -> tuple[VideoFrame, tuple[int, int]]:
        """The part of a frame that is shown, and its size, to which a field counts as whole."""
        steps, width, height = [], frame.width, frame.height
        if _is_transparent(frame):
            self.notes["transparency: on black"] = None
            steps.append(("premultiply", "inplace=1"))
            if colours.full_range is False:
                frame.color_range = 1
        if frame.interlaced_frame and height > 1:
            self.notes["interlaced: one field of each frame"] = None
            steps.append(_FIRST_FIELD)
        if self._crop is not None and self._size == (width, height):
            left, top, width, height = self._crop
            self.notes[f"cropped to {width}x{height} as the file says"] = None
            rows = 2 if frame.interlaced_frame else 1
            steps.append(("crop", f"w={width}:h={max(1, height // rows)}:x={left}:y={top // rows}:exact=1"))
        return (self._filtered(frame, steps) if steps else frame), (width, height)

    def _filtered(self, frame: VideoFrame, steps: Iterable[tuple[str, str]]) -> VideoFrame:
        key = (frame.format.name, frame.width, frame.height, *steps)
        if key not in self._graphs:
            self._graphs[key] = filter_graph(frame, steps)
        _, source, sink = self._graphs[key]
        source.push(frame)
        shown = sink.pull()
        if _FIRST_FIELD in steps:  # before this one's first field comes the second of the one before
            with suppress(BlockingIOError):
                shown = sink.pull()
        return shown  # type: ignore[return-value] # a video's graph


def _cropping(said: str, context: VideoCodecContext) -> tuple[int, int, int, int] | None:
    """Left, top, width and height of the part that the container says is shown; None for the whole or for nonsense."""
    found = _CROPPING.search(said)
    left, right, top, bottom = map(int, found.groups()) if found else (0, 0, 0, 0)
    width, height = context.width - left - right, context.height - top - bottom
    return (left, top, width, height) if (left or right or top or bottom) and width > 0 and height > 0 else None


def _dolby_vision(said: str) -> tuple[int, int] | None:
    """Profile, and which other system its base layer is compatible with: 0 none, 1 HDR10, 2 SDR, 4 HLG, 6 Blu-ray."""
    found = _DOLBY_VISION.search(said)
    return (int(found[1]), int(found[2])) if found else None


def _refuse_dolby_alone(video: OpenVideo, dolby: tuple[int, int] | None) -> None:
    if dolby is not None and (dolby[0] == _DOLBY_ALONE or (dolby[0] in _DOLBY_ALONE_IF_INCOMPATIBLE and dolby[1] == 0)):
        raise DolbyVisionError(str(video.path), dolby[0])


def _is_transparent(frame: VideoFrame) -> bool:
    """Whether a pixel of a frame may let something through that lies behind it."""
    name = frame.format.name
    if name not in _has_alpha:
        _has_alpha[name] = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    if not _has_alpha[name]:
        return False
    if frame.format.name in {"rgba", "bgra", "argb", "abgr"}:
        plane = frame.planes[0]
        pixels = np.frombuffer(cast("bytes", plane), "<u4").reshape(frame.height, -1)[:, : frame.width]
        if frame.format.name.endswith("a"):
            return bool(pixels.min() < _OPAQUE << 24)
        return bool((pixels & _OPAQUE).min() < _OPAQUE)
    return True
