"""Which of the sampled frames are worth keeping, and which part of them: four steps, each with its own switch.

sampled          0  1  2  3  4  5  6        3 is black, 1 and 5 look like 0
crop_bars        one crop for all of them
reject_solid     0  1  2     4  5  6
sampling=scene   0     2     4  5           6 is too near to 5
drop_duplicates  0     2     4
min_frames=4     0     2     4     6        what was left out comes back, solid frames last

No step changes a kept frame's number or times: turning one on or off never renames a frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from extraction_dagster.errors.decode import FramesRejectedError
from extraction_dagster.late import np
from extraction_dagster.stages.decode.sampling import evenly

if TYPE_CHECKING:
    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.decode.decoders.decoder import DecodedVideo

# What a bar's brightest pixel may be: black is 0, and lossy codecs blur a picture's edge into it.
_BLACK = 32
# A crop that leaves less is taken for a dark video with something bright in it, not for a picture between bars.
_LEAST_SHARE, _LEAST_SIDE_PX = 0.25, 16
_HASH_WIDTH, _HASH_HEIGHT = 9, 8
_HASH_STEP = 1  # of 255: a smaller one between neighbours is noise
# Two pictures of like shapes and other colours are no duplicates.
_SAME_COLOUR = 12.0
_COLOUR_BINS = 8  # per channel


@dataclass(frozen=True, slots=True)
class Quality:
    """Which steps are on.

    Attributes:
        crop_bars: Cut off black bars around the picture.
        solid_deviation: Leave out frames each of whose channels deviates less from its mean, of 255; None for off.
        scene_distance: Leave out frames that differ in a smaller share of their colours from the kept one before; None
            for off.
        duplicate_bits: Leave out frames whose dHash differs in so few bits from one that is kept; None for off.
        min_frames: Fewest frames to keep, as far as there are so many.
    """

    crop_bars: bool = False
    solid_deviation: float | None = None
    scene_distance: float | None = None
    duplicate_bits: int | None = None
    min_frames: int = 1

    @classmethod
    def from_settings(cls, settings: Settings) -> Quality:
        """Read the steps from the settings."""
        return cls(
            settings.crop_bars,
            settings.solid_deviation if settings.reject_solid else None,
            settings.scene_distance if settings.sampling == "scene" else None,
            settings.duplicate_bits if settings.drop_duplicates else None,
            settings.min_frames,
        )

    @property
    def identity(self) -> dict[str, object]:
        """What decides the outcome: the steps that are on; empty when none is."""
        steps: dict[str, object] = {"crop_bars": True} if self.crop_bars else {}
        drops = {
            "solid_deviation": self.solid_deviation,
            "scene_distance": self.scene_distance,
            "duplicate_bits": self.duplicate_bits,
        }
        on: dict[str, object] = {name: value for name, value in drops.items() if value is not None}
        return {**steps, **on, "min_frames": self.min_frames} if on else steps


def refine(video: DecodedVideo, quality: Quality, *, path: str) -> DecodedVideo:
    """Apply the steps to a video's sampled frames.

    Args:
        video: The decoded video.
        quality: Which steps are on.
        path: The file, for the error.

    Returns:
        DecodedVideo: with fewer frames, smaller ones, or both; the same object when no step changes anything.

    Raises:
        FramesRejectedError: No frame is left, and `min_frames` is 0.
    """
    if not quality.identity:
        return video
    frames, notes = video.frames, video.notes
    if quality.crop_bars:
        top, bottom, left, right = picture_box(frames.data)
        height, width = frames.data.shape[1:3]
        if (bottom - top, right - left) != (height, width):
            frames = replace(frames, data=frames.data[:, top:bottom, left:right])
            notes += (f"black bars cut off: {right - left}x{bottom - top} of {width}x{height}, from {left},{top} on",)
    kept = _choose(frames.data, quality)
    if len(kept) == 0:
        raise FramesRejectedError(path, num_frames=len(frames))
    if len(kept) < len(frames):
        notes += (f"{len(kept)} of {len(frames)} sampled frames kept",)
        frames = frames[kept]
    return video if frames is video.frames else replace(video, frames=frames, notes=notes)


def _choose(pictures: np.ndarray, quality: Quality) -> np.ndarray:
    """Indexes of the pictures to keep, ascending."""
    deviation = deviations(pictures) if quality.solid_deviation is not None else np.full(len(pictures), np.inf)
    full = np.flatnonzero(deviation >= (quality.solid_deviation or 0.0))
    kept = full
    if quality.scene_distance is not None:
        kept = kept[first_of_scenes(pictures[kept], quality.scene_distance)]
    if quality.duplicate_bits is not None:
        kept = kept[distinct(pictures[kept], quality.duplicate_bits)]
    missing = min(quality.min_frames, len(pictures)) - len(kept)
    if missing > 0:
        spare = np.setdiff1d(full, kept)
        back = spare[evenly(len(spare), min(missing, len(spare)))]
        solid = np.setdiff1d(np.arange(len(pictures)), full)
        most_telling = solid[np.argsort(-deviation[solid], kind="stable")][: missing - len(back)]
        kept = np.sort(np.concatenate([kept, back, most_telling]))
    return kept


def picture_box(pictures: np.ndarray) -> tuple[int, int, int, int]:
    """The part of a video's pictures that is not black bars.

    Args:
        pictures: uint8, shape (N, H, W, 3).

    Returns:
        Top, bottom, left and right, in pixels: rows and columns outside are black in every picture. The whole picture
        where what is left would be small.
    """
    import cv2

    height, width, channels = pictures.shape[1:]
    brightest = pictures[0].copy()
    for picture in pictures[1:]:
        np.maximum(brightest, picture, out=brightest)
    # A row's pixels and channels side by side, in one plane, are several times faster to go through.
    plane = brightest.reshape(height, width * channels)
    rows = cv2.reduce(plane, 1, cv2.REDUCE_MAX)[:, 0]
    columns = cv2.reduce(plane, 0, cv2.REDUCE_MAX).reshape(width, channels).max(axis=1)
    high, wide = np.flatnonzero(rows > _BLACK), np.flatnonzero(columns > _BLACK)
    if len(high) == 0 or len(wide) == 0:
        return 0, height, 0, width
    top, bottom, left, right = int(high[0]), int(high[-1]) + 1, int(wide[0]), int(wide[-1]) + 1
    small = min(bottom - top, right - left) < _LEAST_SIDE_PX
    if small or (bottom - top) * (right - left) < _LEAST_SHARE * height * width:
        return 0, height, 0, width
    return top, bottom, left, right


def deviations(pictures: np.ndarray) -> np.ndarray:
    """How far each picture is from a single colour: float64, shape (N,), its channels' largest standard deviation."""
    import cv2

    return np.array([float(cv2.meanStdDev(picture)[1].max()) for picture in pictures], np.float64)


def first_of_scenes(pictures: np.ndarray, distance: float) -> np.ndarray:
    """Indexes of the pictures that differ from the kept one before them; the first picture always does.

    The distance of two pictures is the share of pixels that would have to change their colour, of 512, to turn the
    counts of one into those of the other: 0 for a mirror image, 1 for black and white.
    """
    import cv2

    kept: list[int] = []
    last = None
    bins, levels = [_COLOUR_BINS] * 3, [0, 256] * 3
    for number, picture in enumerate(pictures):
        counts = cv2.calcHist([picture], [0, 1, 2], None, bins, levels) / (picture.shape[0] * picture.shape[1])
        if last is None or np.abs(counts - last).sum() / 2 >= distance:
            kept.append(number)
            last = counts
    return np.array(kept, np.int64)


def distinct(pictures: np.ndarray, bits: int) -> np.ndarray:
    """Indexes of the pictures that look like none kept before: by dHash, and by colour."""
    import cv2

    kept: list[int] = []
    hashes, thumbnails = np.empty(len(pictures), np.uint64), np.empty((len(pictures), _HASH_HEIGHT * _HASH_WIDTH * 3))
    for number, picture in enumerate(pictures):
        small = cv2.resize(picture, (_HASH_WIDTH, _HASH_HEIGHT), interpolation=cv2.INTER_AREA)
        hashes[number], thumbnails[number] = _dhash(small), small.reshape(-1)
        near = np.bitwise_count(hashes[kept] ^ hashes[number]) <= bits
        same = np.abs(thumbnails[kept] - thumbnails[number]).mean(axis=1) <= _SAME_COLOUR
        if not (near & same).any():
            kept.append(number)
    return np.array(kept, np.int64)


def _dhash(small: np.ndarray) -> int:
    """64 bits: whether each pixel of a 9x8 picture is darker than its right neighbour."""
    grey = small.astype(np.int16).sum(axis=2)
    darker = grey[:, 1:] - grey[:, :-1] > _HASH_STEP * 3
    return int.from_bytes(np.packbits(darker).tobytes())
