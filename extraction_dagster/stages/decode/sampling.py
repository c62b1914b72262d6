"""Which frames of a video are kept: from times to frames, nothing else.

display order    0     1     2     3     4        frames, shown from their pts on
pts_seconds      0.0   0.4   0.8   1.2   1.6
fps=1            ^0.0        ^1.0                 target 1.0 falls while frame 2 is shown
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from extraction_dagster.settings import Settings

# A frame whose pts is a rounding error past the target is the frame that is shown; the finest clock in use, 90 kHz
# for MPEG-TS, ticks every 11 microseconds.
_TOLERANCE_SECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class Sampling:
    """How frames are chosen.

    Attributes:
        mode: `fps`: one target every 1/fps seconds from the first frame on; `uniform`: the middles of equal parts.
        fps: Targets per second of video, for `fps`.
        max_frames: Most frames of one video, for `fps`; more are thinned out evenly.
        num_frames: Targets per video, for `uniform`.
    """

    mode: Literal["fps", "uniform"] = "fps"
    fps: float = 1.0
    max_frames: int = 600
    num_frames: int = 16

    @classmethod
    def from_settings(cls, settings: Settings) -> Sampling:
        """Read the sampling from the settings."""
        return cls(settings.sampling, settings.fps, settings.max_frames, settings.num_frames)

    @property
    def identity(self) -> dict[str, object]:
        """What decides the choice of frames: the fields that the mode uses."""
        if self.mode == "uniform":
            return {"mode": self.mode, "num_frames": self.num_frames}
        return {"mode": self.mode, "fps": self.fps, "max_frames": self.max_frames}


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


def select_frames(pts_seconds: np.ndarray, sampling: Sampling) -> Selection:
    """Select the frames that are shown at the sampling's target times.

    A target at t selects the last frame with pts <= t. A frame that answers several targets is kept once.

    Args:
        pts_seconds: float64, shape (M,), ascending, relative to the first frame: `pts_seconds[0] == 0`.
        sampling: How frames are chosen.

    Returns:
        Selection: at least one frame when M > 0.

    Examples:
        >>> select_frames(np.array([0.0, 0.4, 0.8, 1.2, 1.6]), Sampling(fps=1.0)).frame_number.tolist()
        [0, 2]
    """
    if len(pts_seconds) == 0:
        return Selection(np.empty(0, np.int64), np.empty(0))
    targets = (
        _uniform_targets(pts_seconds, sampling) if sampling.mode == "uniform" else _fps_targets(pts_seconds, sampling)
    )
    shown = np.searchsorted(pts_seconds, targets + _TOLERANCE_SECONDS, side="right") - 1
    frames, first = np.unique(np.maximum(shown, 0), return_index=True)
    if sampling.mode == "fps" and len(frames) > sampling.max_frames:
        kept = np.arange(sampling.max_frames) * len(frames) // sampling.max_frames
        frames, first = frames[kept], first[kept]
    return Selection(frames.astype(np.int64), targets[first])


def _fps_targets(pts_seconds: np.ndarray, sampling: Sampling) -> np.ndarray:
    """0, 1/fps, 2/fps, … up to the last frame."""
    return np.arange(int((pts_seconds[-1] + _TOLERANCE_SECONDS) * sampling.fps) + 1) / sampling.fps


def _uniform_targets(pts_seconds: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Middles of equal parts; the last frame counts as long as the mean of the others.

    Four frames at 0, 1, 2, 3 s end at 4 s: two targets are 1 and 3, four targets are 0.5, 1.5, 2.5 and 3.5.
    """
    gaps = max(len(pts_seconds) - 1, 1)
    end = float(pts_seconds[-1]) * (gaps + 1) / gaps
    return (np.arange(sampling.num_frames) + 0.5) * end / sampling.num_frames
