"""Stored frames for others: thumbnails of what a search found, and files that anything can read.

    FOLDER/frames.csv                      one line a frame: record_id, frame_number, pts_seconds, …, file
    FOLDER/12345/00000030.jpg              record 12345, frame 30

    OUT.tar    12345-00000030.jpg          a sample's files lie side by side and share the name before the dot
               12345-00000030.json         record_id, frame_number, pts_seconds, …

A folder or tar is there whole or not at all.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import tarfile
from typing import TYPE_CHECKING

from extraction_dagster.errors.decode import FramesExportError, FrameShardError, ShardStoreError
from extraction_dagster.files import replacing
from extraction_dagster.shards.store import Copy, by_shard, newest_copies

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

    from extraction_dagster.records import EncodedFrames, IdRange
    from extraction_dagster.shards.frame_store import FrameShard, FrameStore

logger = logging.getLogger(__name__)
_NOTHING = "No file was left behind."
_FACTS = ("record_id", "frame_number", "pts_seconds", "target_seconds", "width_px", "height_px", "content_version")
_BEGINS_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_Frame = tuple[dict[str, int | float | str], bytes]  # what is said of a frame, and its JPEG


def find_frames(store: FrameStore, wanted: Collection[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
    """JPEGs by record id and frame number, whatever range and shard they lie in.

    A frame that is not stored, or no longer, is left out. Where several shards hold a record, the newest one that has
    the frame counts.
    """
    numbers = dict[int, set[int]]()
    for record_id, frame_number in wanted:
        numbers.setdefault(record_id, set()).add(frame_number)
    shards = [
        shard
        for partition in store.partitions()
        if any(record_id in partition for record_id in numbers)
        for shard in store.shards(partition)
    ]
    found: dict[tuple[int, int], bytes] = {}
    while numbers and shards:
        newest = {key: copy for key, copy in newest_copies(shards).items() if key in numbers}
        for shard, record_ids in by_shard(newest):
            found |= _read_some(store, shard, {key: numbers[key] for key in record_ids})
        looked_at = {copy.shard.path for copy in newest.values()}
        shards = [shard for shard in shards if newest and shard.path not in looked_at]
        numbers = {key: left for key in newest if (left := {n for n in numbers[key] if (key, n) not in found})}
    return found


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
    newest = _newest_copies(store, within)
    if not newest:
        why = f"no frame of range {within} is stored with the settings of today"
        raise FramesExportError(str(out), why, survives=f"Run 'extraction launch {within}' first. {_NOTHING}")
    is_tar = out.suffix == ".tar"
    if not is_tar and out.exists() and (not out.is_dir() or any(out.iterdir())):
        why = "it is there already, expected a missing or empty folder, or a name that ends in .tar"
        raise FramesExportError(str(out), why, survives="It was not touched. Choose another for --to.")
    videos = frames = 0

    def counted() -> Iterator[_Frame]:
        nonlocal videos, frames
        for video in _videos(store, newest):
            yield from _frames(video)
            videos, frames = videos + 1, frames + len(video)
            if on_video is not None:
                on_video(videos, len(newest))

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out, mode=None, durable=False, folder=not is_tar) as beside:
            (_write_tar if is_tar else _write_folder)(beside, counted())
    except OSError as error:
        raise FramesExportError(str(out), error.strerror or type(error).__name__, survives=_NOTHING) from error
    return videos, frames


def _newest_copies(store: FrameStore, within: IdRange) -> dict[int, Copy[FrameShard]]:
    """The newest frames of each stored record of a range, in ascending order."""
    shards = [
        shard
        for partition in store.partitions()
        if partition.first_id <= within.last_id and within.first_id <= partition.last_id
        for shard in store.shards(partition)
    ]
    return {key: copy for key, copy in sorted(newest_copies(shards).items()) if key in within}


def _videos(store: FrameStore, newest: dict[int, Copy[FrameShard]]) -> Iterator[EncodedFrames]:
    """Each record's newest frames; every shard is read once."""
    for shard, record_ids in sorted(by_shard(newest), key=lambda part: part[1][0]):
        yield from store.read(shard, only=record_ids)


def _frames(video: EncodedFrames) -> Iterator[_Frame]:
    columns = (video.frame_number.tolist(), video.pts_seconds.tolist(), video.target_seconds.tolist(), video.jpegs)
    for number, pts, target, jpeg in zip(*columns, strict=True):
        of_video = (video.width_px, video.height_px, video.content_version)
        yield dict(zip(_FACTS, (video.record_id, number, pts, target, *of_video), strict=True)), jpeg


def _write_folder(folder: Path, frames: Iterable[_Frame]) -> None:
    """Write JPEGs, a folder a record, with a table of contents."""
    with (folder / "frames.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [*_FACTS, "file"])
        table.writeheader()
        for frame, jpeg in frames:
            name = f"{frame['record_id']}/{frame['frame_number']:08d}.jpg"
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(jpeg)
            table.writerow({**{key: _in_cell(value) for key, value in frame.items()}, "file": name})


def _in_cell(value: float | str) -> float | str:
    """A value as a table's cell: a text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_BEGINS_FORMULA) else value


def _write_tar(path: Path, frames: Iterable[_Frame]) -> None:
    """Write a WebDataset tar: no time, owner or order of its own, so that the same frames give the same file."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for frame, jpeg in frames:
            key = f"{frame['record_id']}-{frame['frame_number']:08d}"
            for suffix, content in ((".jpg", jpeg), (".json", json.dumps(frame).encode())):
                entry = tarfile.TarInfo(key + suffix)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def _read_some(store: FrameStore, shard: FrameShard, numbers: dict[int, set[int]]) -> dict[tuple[int, int], bytes]:
    found: dict[tuple[int, int], bytes] = {}
    try:
        for video in store.read(shard, only=numbers):
            frames = zip(video.frame_number.tolist(), video.jpegs, strict=True)
            found |= {(video.record_id, n): jpeg for n, jpeg in frames if n in numbers[video.record_id]}
    except (OSError, FrameShardError, ShardStoreError) as error:
        logger.warning("No thumbnails from %s: %s", shard.path, error)
    return found
