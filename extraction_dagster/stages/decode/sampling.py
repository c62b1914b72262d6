"""Which frames of a video are kept: from times to frames, nothing else.

To add a way, write a function from times to a `Selection`, and name it in `SAMPLERS` and in the setting `sampling`.

display order    0     1     2     3     4        frames, shown from their pts on
pts_seconds      0.0   0.4   0.8   1.2   1.6
fps=1            ^0.0        ^1.0                 target 1.0 falls while frame 2 is shown
keyframes        ^0.0              ^1.2           frames 0 and 3 decode without any other
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from extraction_dagster.late import np
from extraction_dagster.records import FrameBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from extraction_dagster.settings import Settings

# A frame whose pts is a rounding error past the target is the frame that is shown; the finest clock in use, 90 kHz
# for MPEG-TS, ticks every 11 microseconds.
_TOLERANCE_SECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class Sampling:
    """How frames are chosen.

    Attributes:
        mode: A name in `SAMPLERS`.
        fps: Targets per second of video, for `fps`.
        max_frames: Most frames of one video, for all but `uniform`; more are thinned out evenly.
        num_frames: Targets per video, for `uniform`.
        min_frames: A video that would give fewer is filled up with evenly spread frames, as far as it has them.
    """

    mode: str = "fps"
    fps: float = 1.0
    max_frames: int = 600
    num_frames: int = 16
    min_frames: int = 1

    @classmethod
    def from_settings(cls, settings: Settings) -> Sampling:
        """Read the sampling from the settings."""
        return cls(
            settings.sampling, settings.fps, settings.max_frames, settings.num_frames, max(settings.min_frames, 1)
        )

    @property
    def identity(self) -> dict[str, object]:
        """What decides the choice of frames: the mode, and the fields that it uses."""
        used = {name: getattr(self, name) for name in SAMPLERS[self.mode].uses}
        return {"mode": self.mode, **used, **({"min_frames": self.min_frames} if self.min_frames > 1 else {})}

    @property
    def most_frames(self) -> int:
        """Most frames that it can select of one video."""
        uses = SAMPLERS[self.mode].uses
        return max(self.max_frames if "max_frames" in uses else self.num_frames, self.min_frames)

    @property
    def needs_keyframes(self) -> bool:
        """Whether the choice depends on which frames are keyframes."""
        return SAMPLERS[self.mode].needs_keyframes


@dataclass(frozen=True, slots=True)
class Selection:
    """The frames that a sampling selects.

    Attributes:
        frame_number: int64, shape (N,), strictly ascending: indexes in display order.
        target_seconds: float64, shape (N,): the first target that each frame answers.
    """

    frame_number: np.ndarray
    target_seconds: np.ndarray

    def __len__(self) -> int:
        """The number of frames, N."""
        return len(self.frame_number)

    def __repr__(self) -> str:
        """Its size, not its numbers."""
        return f"Selection({len(self)} frames)"

    def batch(self, data: np.ndarray, pts_seconds: np.ndarray, *, start_seconds: float = 0.0) -> FrameBatch:
        """The selected frames: their pictures, and when each frame of the video is shown, selected or not.

        Frames are chosen from the first picture on, and told by the file's clock, on which that one is at
        `start_seconds`: pictures may start after sound.
        """
        shown, targets = pts_seconds[self.frame_number], self.target_seconds
        return FrameBatch(data, shown + start_seconds, targets + start_seconds, self.frame_number)


@dataclass(frozen=True, slots=True)
class Sampler:
    """A way to choose frames.

    Attributes:
        select: From pts_seconds (float64, shape (M,)), keyframe (bool, shape (M,), or None) and the sampling to the
            chosen frames.
        uses: The fields of `Sampling` that it looks at; only these enter the fingerprint. One that uses `max_frames`
            is thinned out to it.
        needs_keyframes: Whether it must be told which frames are keyframes.
    """

    select: Callable[[np.ndarray, np.ndarray | None, Sampling], Selection]
    uses: tuple[str, ...]
    needs_keyframes: bool = False


def select_frames(pts_seconds: np.ndarray, sampling: Sampling, keyframe: np.ndarray | None = None) -> Selection:
    """Select the frames that are shown at the sampling's target times, or the keyframes.

    A target at t selects the last frame with pts <= t. A frame that answers several targets is kept once.

    Args:
        pts_seconds: float64, shape (M,), ascending, relative to the first frame: `pts_seconds[0] == 0`.
        sampling: How frames are chosen.
        keyframe: bool, shape (M,): which frames decode without any other; for samplers that need it.

    Returns:
        Selection: at least one frame when M > 0.

    Examples:
        >>> select_frames(np.array([0.0, 0.4, 0.8, 1.2, 1.6]), Sampling(fps=1.0)).frame_number.tolist()
        [0, 2]
    """
    if len(pts_seconds) == 0:
        return Selection(np.empty(0, np.int64), np.empty(0))
    sampler = SAMPLERS[sampling.mode]
    selection = sampler.select(pts_seconds, keyframe, sampling)
    if "max_frames" in sampler.uses and len(selection) > sampling.max_frames:
        kept = evenly(len(selection), sampling.max_frames)
        selection = Selection(selection.frame_number[kept], selection.target_seconds[kept])
    return _filled_up(selection, pts_seconds, sampling.min_frames)


def _fps(pts_seconds: np.ndarray, _keyframe: np.ndarray | None, sampling: Sampling) -> Selection:
    """One target every 1/fps seconds: 0, 1/fps, 2/fps, … up to the last frame."""
    targets = np.arange(int((pts_seconds[-1] + _TOLERANCE_SECONDS) * sampling.fps) + 1) / sampling.fps
    return _shown_at(pts_seconds, targets)


def _uniform(pts_seconds: np.ndarray, _keyframe: np.ndarray | None, sampling: Sampling) -> Selection:
    """The middles of equal parts of the video."""
    return _shown_at(pts_seconds, _middles(pts_seconds, sampling.num_frames))


def _keyframes(pts_seconds: np.ndarray, keyframe: np.ndarray | None, _sampling: Sampling) -> Selection:
    """Every frame that decodes alone; where there is none, the first."""
    frames = np.flatnonzero(keyframe) if keyframe is not None and keyframe.any() else np.zeros(1, np.int64)
    return Selection(frames.astype(np.int64), pts_seconds[frames])


# By the names of the setting EXTRACTION_SAMPLING. Of the keyframes of `scene`, `quality` keeps those that begin one.
SAMPLERS = {
    "fps": Sampler(_fps, uses=("fps", "max_frames")),
    "uniform": Sampler(_uniform, uses=("num_frames",)),
    "keyframes": Sampler(_keyframes, uses=("max_frames",), needs_keyframes=True),
    "scene": Sampler(_keyframes, uses=("max_frames",), needs_keyframes=True),
}


def _shown_at(pts_seconds: np.ndarray, targets: np.ndarray) -> Selection:
    shown = np.searchsorted(pts_seconds, targets + _TOLERANCE_SECONDS, side="right") - 1
    frames, first = np.unique(np.maximum(shown, 0), return_index=True)
    return Selection(frames.astype(np.int64), targets[first])


def _filled_up(selection: Selection, pts_seconds: np.ndarray, least: int) -> Selection:
    """Add evenly spread frames to a selection of fewer than `least`.

    Frame 0 of 0 to 9 with least 3: the middles of thirds are 1, 5 and 8; of these 1 and 5 are added.
    """
    missing = least - len(selection)
    if missing <= 0:
        return selection
    spread = _shown_at(pts_seconds, _middles(pts_seconds, least))
    new = np.flatnonzero(~np.isin(spread.frame_number, selection.frame_number))
    new = new[evenly(len(new), min(missing, len(new)))]
    frames = np.concatenate([selection.frame_number, spread.frame_number[new]])
    order = np.argsort(frames)
    return Selection(frames[order], np.concatenate([selection.target_seconds, spread.target_seconds[new]])[order])


def evenly(count: int, chosen: int) -> np.ndarray:
    """Indexes of `chosen` of `count` things, evenly spread, the first among them: of 10, 4 are 0, 2, 5, 7."""
    return np.arange(chosen) * count // max(chosen, 1)


def _middles(pts_seconds: np.ndarray, count: int) -> np.ndarray:
    """Middles of equal parts; the last frame counts as long as the mean of the others.

    Four frames at 0, 1, 2, 3 s end at 4 s: two targets are 1 and 3, four targets are 0.5, 1.5, 2.5 and 3.5.
    """
    gaps = max(len(pts_seconds) - 1, 1)
    end = float(pts_seconds[-1]) * (gaps + 1) / gaps
    return (np.arange(count) + 0.5) * end / count
