"""Find stored frames, whatever range they belong to: thumbnails of what a search found, the newest of each record."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from extraction_dagster.errors.base import PartitionKeyError
from extraction_dagster.records import IdRange

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from extraction_dagster.shards.frame_shard import FrameShard
    from extraction_dagster.shards.frame_store import FrameStore

logger = logging.getLogger(__name__)


def find_frames(store: FrameStore, wanted: Collection[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
    """JPEGs by record id and frame number; a frame that is not stored, or no longer, is left out.

    Where several shards hold a record, the newest one that has the frame counts.
    """
    numbers: dict[int, set[int]] = defaultdict(set)
    for record_id, frame_number in wanted:
        numbers[record_id].add(frame_number)
    found: dict[tuple[int, int], bytes] = {}
    for partition in _partitions(store):
        here = [record_id for record_id in numbers if record_id in partition]
        for shard in store.shards(partition) if here else ():  # oldest first: a newer one overwrites
            held = [record.record_id for record in shard.records if record.record_id in here]
            if held:
                found |= _read(store, shard.path, {record_id: numbers[record_id] for record_id in held})
    return found


def newest_shards(store: FrameStore, within: IdRange) -> dict[int, FrameShard]:
    """The shard that holds the newest frames of each stored record of a range, by record in ascending order."""
    shards = [shard for partition in overlapping(store, within) for shard in store.shards(partition)]
    newest = {
        record.record_id: shard
        for shard in sorted(shards, key=lambda shard: shard.name)
        for record in shard.records
        if record.record_id in within
    }
    return dict(sorted(newest.items()))


def overlapping(store: FrameStore, within: IdRange) -> list[IdRange]:
    """The ranges with a folder that share an id with `within`, in ascending order."""
    return sorted(
        partition
        for partition in _partitions(store)
        if partition.first_id <= within.last_id and within.first_id <= partition.last_id
    )


def enclosed(keys: Iterable[str], within: IdRange) -> list[IdRange]:
    """The ranges of which every id lies in `within`, in ascending order; what is no range's name is left out."""
    ranges = _ranges(keys)
    return sorted(partition for partition in ranges if partition.first_id in within and partition.last_id in within)


def _partitions(store: FrameStore) -> list[IdRange]:
    return _ranges(store.partition_keys())


def _ranges(keys: Iterable[str]) -> list[IdRange]:
    ranges = []
    for name in keys:
        try:
            ranges.append(IdRange.parse(name))
        except PartitionKeyError:
            continue
    return ranges


def _read(store: FrameStore, path: str, numbers: dict[int, set[int]]) -> dict[tuple[int, int], bytes]:
    try:
        with store.open(path) as file:
            filters = [
                [("record_id", "=", record_id), ("frame_number", "in", sorted(frames))]
                for record_id, frames in numbers.items()
            ]
            table = pq.read_table(file, columns=["record_id", "frame_number", "jpeg"], filters=filters)
    except (OSError, pa.ArrowException) as error:
        logger.warning("No thumbnails from %s: %s", path, error)
        return {}
    return {(row["record_id"], row["frame_number"]): row["jpeg"] for row in table.to_pylist()}
