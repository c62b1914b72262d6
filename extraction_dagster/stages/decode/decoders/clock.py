"""When decoded frames are shown: their stamps, made one clock that only goes forward.

A codec gives its frames in the order in which they are shown, always; stamps come from the container and may be wrong.

frame       a     b     c     d     e
unknown     0     5     -     15    20           c is at 10
one wrong   0     5     9999  15    20           c is at 10
new clock   0     5     10    0     5            d is at 15, e at 20
jump        0     5     9999  10004 10009        c is at 10, d at 15, e at 20
shuffled    1     3     4     2     5            1 2 3 4 5: stamps in the order of decoding, not of showing
the same    0     5     5     10    15           c is at 7.5
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

# A gap longer than this, and much longer than those between other frames, is a jump of the clock, unless sound goes on
# meanwhile: a film does not stand still for so long.
JUMP_SECONDS = 1800.0
# In broadcast streams a time is due every 0.7 s, and clocks break; ffmpeg takes as much for a break.
BROADCAST_JUMP_SECONDS = 10.0
_LONG_GAPS = 50
# Stamps in the order of decoding are a regular row once they are sorted: its steps, in frames.
_SHORTEST_STEP, _LONGEST_STEP = 0.75, 3.0
_MOST_REORDERED = 32  # frames: 16 of H.264 and HEVC, as fields


def display_times(
    times: Sequence[int | None], *, gap_ticks: float, jump_ticks: float, guessed: bool = False
) -> tuple[np.ndarray, float]:
    """When each frame is shown.

    Args:
        times: The frames' stamps, in ticks, in the order decoded; None where the stream does not say.
        gap_ticks: How long a frame is shown where the stream does not say.
        jump_ticks: No gap up to this is taken for a jump of the clock.
        guessed: The container has no stamps of its own: the library made them up from the order of decoding.

    Returns:
        Ticks from the first frame on, float64, shape (N,), ascending; and the tick of the first frame.

    Examples:
        50, 55, 0, 5 with gap 5 is 0, 5, 10, 15, and the first frame is at 50.
        Frames without a time come one gap after the other, at the beginning one before the other.
    """
    known = [time for time in times if time is not None]
    if guessed or _is_shuffled(known, gap_ticks):
        ascending = iter(sorted(known))
        times = [None if time is None else next(ascending) for time in times]
    unknown, first = next(((number, time) for number, time in enumerate(times) if time is not None), (0, 0))
    shown, first_stands = _walk(times, first - (unknown + 1) * gap_ticks, gap_ticks, _jump(known, jump_ticks))
    start = shown[0] if first_stands else (times[1] or 0) - gap_ticks
    return _spread(np.array(shown, np.float64), gap_ticks) - shown[0], start


def has_jump(ticks: np.ndarray, *, jump_ticks: float) -> bool:
    """Whether ascending stamps have a gap that is a jump of the clock."""
    steps = np.diff(ticks)
    return len(steps) > 0 and bool(steps.max() > jump_ticks) and bool(steps.max() > _jump(ticks, jump_ticks))


def _jump(known: Sequence[int] | np.ndarray, jump_ticks: float) -> float:
    """The gap that is a jump in this video: where a frame an hour is the rule, an hour is none."""
    steps = np.diff(np.unique(np.array(known, np.float64)))
    return max(jump_ticks, _LONG_GAPS * float(np.median(steps))) if len(steps) > 1 else jump_ticks


def _walk(times: Sequence[int | None], latest: float, gap_ticks: float, jump_ticks: float) -> tuple[list[float], bool]:
    """Each frame's tick on the clock of the first, and whether the second frame goes on with that clock."""
    shown: list[float] = []
    offset, first_stands = 0.0, True
    for number, (time, after) in enumerate(zip(times, _next_known(times), strict=True)):
        at = following = latest + gap_ticks
        if time is not None:
            at, later = time + offset, after + offset
            goes_on, in_line = 0 < later - latest <= jump_ticks, 0 <= at - latest <= jump_ticks
            if goes_on and (not in_line or at > later):  # the stamp is wrong
                at = following if following < later else (latest + later) / 2
            elif not in_line:  # a new clock
                at, offset = following, following - time
                first_stands = first_stands and number != 1
        shown.append(at)
        latest = at
    return shown, first_stands


def _next_known(times: Sequence[int | None]) -> list[float]:
    """For each stamp the next one that is known; infinity after the last."""
    after, found = float("inf"), []
    for time in reversed(times):
        found.append(after)
        after = after if time is None else time
    return found[::-1]


def _is_shuffled(known: Sequence[int], gap_ticks: float) -> bool:
    """Whether stamps that step back are a regular row that was dealt out in another order."""
    stamps = np.array(known, np.float64)
    if len(stamps) < 2 or bool((np.diff(stamps) > 0).all()):  # noqa: PLR2004 - one has no order
        return False
    order = np.argsort(stamps, kind="stable")
    steps = np.diff(stamps[order]) / gap_ticks
    moved = np.abs(order - np.arange(len(order))).max()
    return bool(steps.min() >= _SHORTEST_STEP and steps.max() <= _LONGEST_STEP and moved <= _MOST_REORDERED)


def _spread(shown: np.ndarray, gap_ticks: float) -> np.ndarray:
    """Frames with one stamp share the time until the next, so that each can be asked for."""
    if bool((np.diff(shown) > 0).all()):
        return shown
    values, first, counts = np.unique(shown, return_index=True, return_counts=True)
    until = np.append(values[1:], values[-1] + gap_ticks * counts[-1])
    width = np.minimum(until - values, gap_ticks * counts)
    group = np.repeat(np.arange(len(values)), counts)
    spread: np.ndarray = values[group] + width[group] * (np.arange(len(shown)) - first[group]) / counts[group]
    return spread
