"""Stored frames as files that anything can read: a folder of JPEGs, or a WebDataset tar.

    FOLDER/frames.csv                      one line a frame: record_id, frame_number, pts_seconds, …, file
    FOLDER/12345/00000030.jpg              record 12345, frame 30

    OUT.tar    12345-00000030.jpg          a sample's files lie side by side and share the name before the dot
               12345-00000030.json         record_id, frame_number, pts_seconds, …

Either is there whole or not at all.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

from extraction_dagster.errors.shards import FramesExportError
from extraction_dagster.shards.frame_lookup import newest_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

    from extraction_dagster.records import EncodedFrames, IdRange
    from extraction_dagster.shards.frame_shard import FrameShard
    from extraction_dagster.shards.frame_store import FrameStore

_NOTHING = "No file was left behind."


@dataclass(frozen=True, slots=True)
class ExportedFrame:
    """What is said of a frame beside its JPEG."""

    record_id: int
    frame_number: int
    pts_seconds: float
    target_seconds: float
    width_px: int
    height_px: int
    content_version: str


def export_frames(
    store: FrameStore, within: IdRange, out: Path, *, on_video: Callable[[int, int], None] | None = None
) -> tuple[int, int]:
    """Write the newest stored frames of a range's records to a folder, or to a tar when `out` ends in .tar.

    Args:
        store: The frames made with the settings of today.
        within: Which records.
        out: A folder that is missing or empty; or a tar, which is replaced.
        on_video: Told the number of videos written, and of all.

    Returns:
        The number of videos and of frames.

    Raises:
        FramesExportError: Nothing is stored, or `out` can't be written.
        FrameShardError: A shard is damaged, or was removed meanwhile.
    """
    newest = newest_shards(store, within)
    if not newest:
        why = f"no frame of range {within} is stored with the settings of today"
        raise FramesExportError(str(out), why, survives=f"Run 'extraction launch {within}' first. {_NOTHING}")
    videos = frames = 0
    try:
        with _TarSink(out) if out.suffix == ".tar" else _FolderSink(out) as sink:
            for video in _videos(store, newest):
                for frame, jpeg in _frames(video):
                    sink.add(frame, jpeg)
                videos, frames = videos + 1, frames + len(video)
                if on_video is not None:
                    on_video(videos, len(newest))
    except OSError as error:
        raise FramesExportError(str(out), error.strerror or type(error).__name__, survives=_NOTHING) from error
    return videos, frames


def _videos(store: FrameStore, newest: dict[int, FrameShard]) -> Iterator[EncodedFrames]:
    """Each record's newest frames; every shard is read once."""
    for shard in {shard.name: shard for shard in newest.values()}.values():
        for video in store.read(shard):
            holder = newest.get(video.record_id)
            if holder is not None and holder.name == shard.name:
                yield video


def _frames(video: EncodedFrames) -> Iterator[tuple[ExportedFrame, bytes]]:
    columns = (video.frame_number.tolist(), video.pts_seconds.tolist(), video.target_seconds.tolist(), video.jpegs)
    for number, pts, target, jpeg in zip(*columns, strict=True):
        size = (video.width_px, video.height_px)
        yield ExportedFrame(video.record_id, number, pts, target, *size, video.content_version), jpeg


class _FolderSink:
    """A folder of JPEGs with a table of contents."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            why = "it is there already, expected a missing or empty folder, or a name that ends in .tar"
            raise FramesExportError(str(folder), why, survives="It was not touched. Choose another for --to.")
        self._folder, self._part = folder, folder.with_name(f".{folder.name}.part")

    def __enter__(self) -> Self:
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        self._file = (self._part / "frames.csv").open("w", encoding="utf-8", newline="")
        self._table = csv.DictWriter(self._file, [*ExportedFrame.__slots__, "file"])
        self._table.writeheader()
        return self

    def add(self, frame: ExportedFrame, jpeg: bytes) -> None:
        name = f"{frame.record_id}/{frame.frame_number:08d}.jpg"
        path = self._part / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg)
        self._table.writerow({**asdict(frame), "file": name})

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            self._file.close()
            if kind is None:
                self._part.replace(self._folder)  # takes the place of an empty folder
        finally:
            shutil.rmtree(self._part, ignore_errors=True)


class _TarSink:
    """A WebDataset tar: no time, owner or order of its own, so that the same frames give the same file."""

    def __init__(self, path: Path) -> None:
        self._path, self._part = path, path.with_name(f".{path.name}.part")

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._tar = tarfile.open(self._part, "w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, frame: ExportedFrame, jpeg: bytes) -> None:
        key = f"{frame.record_id}-{frame.frame_number:08d}"
        for suffix, content in ((".jpg", jpeg), (".json", json.dumps(asdict(frame)).encode())):
            entry = tarfile.TarInfo(key + suffix)
            entry.size = len(content)
            self._tar.addfile(entry, io.BytesIO(content))

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            self._tar.close()
            if kind is None:
                self._part.replace(self._path)
        finally:
            self._part.unlink(missing_ok=True)
