"""A few shards in place of many small ones, which killed runs and a slow trickle of rows leave behind.

    before    A 1 record    B 2 records    C 64 records    D 1 record, which B has too
    written   M, named just after D: A's record, B's other one, and D's
    removed   A, B and D

What counts is each record's newest copy (`newest_copies`): it is in M, with its claim, before any of its sources goes,
and M's name is later than theirs and earlier than whatever is written next. So a kill at any moment loses nothing, and
the next compaction ends what this one began: a shard of which no record counts is removed first. Who has listed the
sources and reads them later, however late, is sent on to M by the store.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Generic

from extraction_dagster.errors.decode import ShardError
from extraction_dagster.shards.store import Copy, S, Shard, merged_name, newest_copies, written_at

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from extraction_dagster.records import IdRange
    from extraction_dagster.settings import Settings
    from extraction_dagster.shards.store import ShardStore
    from extraction_dagster.stages.catalog.ledger import LedgerEntry

logger = logging.getLogger(__name__)

# A merged shard is held in memory twice while it is written.
_MOST_BYTES = 2**26
_SETTLED = frozenset({"done", "parked"})


@dataclass(frozen=True, slots=True)
class CompactionOptions:
    """What is worth a merge.

    Attributes:
        max_records: Most records of a merged shard; one with at most half of them is small.
        enough_shards: Fewest small shards: fewer are no burden, and each merge writes them again.
        untouched: Younger shards are left alone: they are likely to be read soon, and more may come beside them.
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
        newest: By record, the copy that counts.
        superseded: Shards of which no record counts.
        groups: Shards to be merged, each group into one.
    """

    newest: Mapping[int, Copy[S]]
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
    """Decide which shards of a range go and which are merged; those with a record of `not_yet` are left alone."""
    ordered = sorted(shards, key=lambda shard: shard.name)
    newest = newest_copies(ordered)
    before = datetime.now(UTC) - options.untouched
    superseded: list[S] = []
    groups: list[list[S]] = [[]]
    num_records = num_bytes = 0  # of the last group
    for shard in ordered:
        live = _live(shard, newest)
        if not _was_written_before(shard.name, before) or not live.isdisjoint(not_yet):
            continue
        if shard.records and not live:
            superseded.append(shard)
        elif len(live) <= options.max_records // 2 and shard.size_bytes <= _MOST_BYTES // 2:
            if num_records + len(live) > options.max_records or num_bytes + shard.size_bytes > _MOST_BYTES:
                groups.append([])
                num_records = num_bytes = 0
            groups[-1].append(shard)
            num_records, num_bytes = num_records + len(live), num_bytes + shard.size_bytes
    return Plan(newest, superseded, [group for group in groups if len(group) >= options.enough_shards])


def compact(
    store: ShardStore[S],
    partition: IdRange,
    options: CompactionOptions,
    *,
    entries: Mapping[int, LedgerEntry] | None = None,
) -> Compacted:
    """Merge a range's small shards of frames or vectors, and remove what killed writers left in its folder.

    With the ledger's entries of the range, for frames, a shard with a record that is still under way is left alone:
    it is about to be read. Without them no shard is. A shard that turns out to be damaged is set aside.
    """
    store.sweep(partition)
    shards = store.shards(partition)
    plan = plan_compaction(shards, options, not_yet=() if entries is None else _under_way(shards, entries))
    for shard in plan.superseded:
        store.remove(shard)
    done = Compacted(removed=len(plan.superseded))
    for group in plan.groups:
        parts = [(shard, plan.live(shard)) for shard in group]
        try:
            store.merge(partition, parts, merged_name([shard.name for shard in group]))
        except ShardError as error:  # removed meanwhile, or damaged
            logger.warning("Small %s shards of range %s stay as they are: %s", store.kind, partition, error)
            for shard in group:
                if shard.path == error.path and not error.gone:
                    store.set_aside(shard, "it is damaged")
            continue
        for shard in group:
            store.remove(shard)
        done += Compacted(removed=len(group), written=1)
    return done


def _under_way(shards: Sequence[Shard], entries: Mapping[int, LedgerEntry]) -> set[int]:
    held = {record.record_id for shard in shards for record in shard.records}
    return {key for key in held if key not in entries or entries[key].state not in _SETTLED}


def _live(shard: S, newest: Mapping[int, Copy[S]]) -> set[int]:
    return {record.record_id for record in shard.records if newest[record.record_id].shard.name == shard.name}


def _was_written_before(name: str, moment: datetime) -> bool:
    with suppress(ValueError):  # a name that does not say when is left alone
        return written_at(name) < moment
    return False
