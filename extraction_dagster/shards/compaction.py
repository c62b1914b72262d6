"""A few shards in place of many small ones, which killed runs and a slow trickle of rows leave behind.

    before    A 1 record    B 2 records    C 64 records    D 1 record, which B has too
    written   M, named just after D: A's record, B's other one, and D's
    removed   A, B and D

What counts is each record's newest copy: it is in M before any of its sources goes, and M is newer than they were and
older than whatever is written next. So a kill at any moment loses nothing, and the next compaction ends what this one
began: a shard all of whose records a newer one has is removed first.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from extraction_dagster.errors.shards import FrameShardError
from extraction_dagster.shards.names import merged_name, written_at

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from extraction_dagster.records import IdRange
    from extraction_dagster.settings import Settings
    from extraction_dagster.shards.frame_store import FrameStore
    from extraction_dagster.stages.catalog.ledger import LedgerEntry

logger = logging.getLogger(__name__)

# A merged shard is held in memory twice while it is written.
_MOST_BYTES = 2**26
_SETTLED = frozenset({"done", "parked"})


class Record(Protocol):
    """What is asked of a record in a shard."""

    @property
    def record_id(self) -> int: ...  # noqa: D102 - says itself


class Shard(Protocol):
    """What is asked of a shard."""

    @property
    def name(self) -> str: ...  # noqa: D102 - says itself
    @property
    def records(self) -> Sequence[Record]: ...  # noqa: D102 - as above
    @property
    def size_bytes(self) -> int: ...  # noqa: D102 - as above


S = TypeVar("S", bound=Shard)


@dataclass(frozen=True, slots=True)
class CompactionOptions:
    """What is worth a merge.

    Attributes:
        max_records: Most records of a merged shard; one with at most half of them is small.
        enough_shards: Fewest small shards: fewer are no burden, and each merge writes them anew.
        untouched: Younger shards are left alone: a run that listed them may be about to read them.
    """

    max_records: int
    enough_shards: int = 8
    untouched: timedelta = timedelta(hours=1)

    @classmethod
    def from_settings(cls, settings: Settings) -> CompactionOptions:
        """Read the options from the settings."""
        return cls(settings.shard_records)


@dataclass(frozen=True, slots=True)
class Plan(Generic[S]):
    """What to do with a range's shards.

    Attributes:
        newest: By record, the name of the shard that holds its newest copy.
        superseded: Shards all of whose records newer ones have.
        groups: Shards to be merged, each group into one.
    """

    newest: Mapping[int, str]
    superseded: Sequence[S]
    groups: Sequence[Sequence[S]]

    def live(self, shard: S) -> set[int]:
        """The records of which a shard holds the newest copy."""
        return _live(shard, self.newest)


@dataclass(frozen=True, slots=True)
class Compacted:
    """What was done: shards that are gone, and those written in their place."""

    removed: int = 0
    written: int = 0

    def __add__(self, other: Compacted) -> Compacted:
        """Both."""
        return Compacted(self.removed + other.removed, self.written + other.written)


def plan_compaction(shards: Sequence[S], options: CompactionOptions, *, not_yet: Collection[int] = ()) -> Plan[S]:
    """Decide which shards go and which are merged.

    Args:
        shards: Of one range.
        options: What is worth a merge.
        not_yet: Records whose shards are left alone.
    """
    ordered = sorted(shards, key=lambda shard: shard.name)
    newest = {record.record_id: shard.name for shard in ordered for record in shard.records}
    before = datetime.now(UTC) - options.untouched
    superseded: list[S] = []
    groups: list[list[S]] = [[]]
    room = _Room(options.max_records)
    for shard in ordered:
        live = _live(shard, newest)
        if not _was_written_before(shard.name, before) or not live.isdisjoint(not_yet):
            continue
        if shard.records and not live:
            superseded.append(shard)
        elif len(live) <= options.max_records // 2 and shard.size_bytes <= _MOST_BYTES // 2:
            if not room.take(len(live), shard.size_bytes):
                groups.append([])
                room = _Room(options.max_records)
                room.take(len(live), shard.size_bytes)
            groups[-1].append(shard)
    return Plan(newest, superseded, [group for group in groups if len(group) >= options.enough_shards])


def compact_frames(
    store: FrameStore, partition: IdRange, entries: Mapping[int, LedgerEntry], options: CompactionOptions
) -> Compacted:
    """Merge a range's small frame shards.

    A shard with a record that is still under way is left alone: its vectors, if there are any, bear its name.

    Args:
        store: The frames.
        partition: The range.
        entries: The ledger's entries of the range.
        options: What is worth a merge.
    """
    shards = store.shards(partition)
    held = {record.record_id for shard in shards for record in shard.records}
    not_yet = {key for key in held if key not in entries or entries[key].state not in _SETTLED}
    plan = plan_compaction(shards, options, not_yet=not_yet)
    for shard in plan.superseded:
        store.remove(shard)
    done = Compacted(removed=len(plan.superseded))
    for group in plan.groups:
        live = {shard.name: plan.live(shard) for shard in group}
        try:
            videos = [video for shard in group for video in store.read(shard) if video.record_id in live[shard.name]]
        except FrameShardError as error:  # removed meanwhile, or damaged: whoever needs it says so
            logger.warning("Small frame shards of range %s stay as they are: %s", partition, error)
            continue
        store.write_shard(partition, videos, name=merged_name([shard.name for shard in group]))
        for shard in group:
            store.remove(shard)
        done += Compacted(removed=len(group), written=1)
    return done


class _Room:
    """What still fits into a merged shard."""

    def __init__(self, records: int) -> None:
        self._records, self._bytes = records, _MOST_BYTES

    def take(self, records: int, num_bytes: int) -> bool:
        fits = records <= self._records and num_bytes <= self._bytes
        if fits:
            self._records, self._bytes = self._records - records, self._bytes - num_bytes
        return fits


def _live(shard: Shard, newest: Mapping[int, str]) -> set[int]:
    return {record.record_id for record in shard.records if newest[record.record_id] == shard.name}


def _was_written_before(name: str, moment: datetime) -> bool:
    try:
        return written_at(name) < moment
    except ValueError:
        return False
