"""Which frames and vectors go, and when; `EXTRACTION_KEEP_FRAMES` says how long they stay.

    all      for ever
    none     until every record of their shard is done
    30       30 days after their shard was written, if every record of it is done by then

A shard goes as a whole, once none of its records needs it: each is done or parked with the settings of today, or a
newer shard holds it, or the ledger has not known it for a day. What was made with former settings goes likewise.
Removing frames too early costs a decode, never a point: a row that is asked for again without them is decoded again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from extraction_dagster.shards.store import S, newest_copies, written_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from extraction_dagster.records import IdRange
    from extraction_dagster.shards.frame_store import FrameStore
    from extraction_dagster.shards.store import ShardRecord, ShardStore
    from extraction_dagster.stages.catalog.ledger import Fingerprints, LedgerEntry

logger = logging.getLogger(__name__)
# A record, or a version of it, that the ledger does not know: its run was killed just before it was marked; or the row
# was deleted, or changed since.
_UNKNOWN = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Removed:
    """What went: shards, records in them, bytes."""

    shards: int = 0
    records: int = 0
    num_bytes: int = 0

    def __add__(self, other: Removed) -> Removed:
        """Both."""
        return Removed(self.shards + other.shards, self.records + other.records, self.num_bytes + other.num_bytes)


def keep_time(keep_frames: str) -> timedelta | None:
    """The time that a finished shard stays after it was written; None for ever."""
    return None if keep_frames == "all" else timedelta(0 if keep_frames == "none" else int(keep_frames))


def prune_frames(  # noqa: PLR0913 - each is a different part of the question
    store: FrameStore,
    partition: IdRange,
    entries: Mapping[int, LedgerEntry],
    made_with: Fingerprints,
    *,
    keep: timedelta,
    now: datetime | None = None,
) -> Removed:
    """Remove the shards of a range that nobody needs any more.

    Args:
        store: The frames made with the settings of today.
        partition: The range whose shards are looked at.
        entries: The ledger's entries of the range.
        made_with: The settings of today.
        keep: How long a finished shard stays after it was written.
        now: The time to go by; the present by default.
    """

    def is_needed(record: ShardRecord, *, unknown_goes: bool) -> bool:
        entry = entries.get(record.record_id)
        if entry is None or not _is_of(record, entry):
            return not unknown_goes
        return not _is_settled(entry, made_with)

    return _prune(store, partition, is_needed, keep=keep, now=now)


def prune_former(  # noqa: PLR0913 - as above
    store: ShardStore[S],
    partition: IdRange,
    entries: Mapping[int, LedgerEntry],
    made_with: Fingerprints,
    *,
    keep: timedelta,
    now: datetime | None = None,
) -> Removed:
    """Remove the shards of a range that were made with other frame settings, once their records are done with today's.

    Vectors of today's frames stay whatever their model: a collection may be in use with them.

    Args:
        store: Frames or vectors; the other fingerprints under its root are looked at.
        partition: As above, like the other arguments.
        entries: As above.
        made_with: As above.
        keep: As above.
        now: As above.
    """

    def is_needed(record: ShardRecord, *, unknown_goes: bool) -> bool:
        entry = entries.get(record.record_id)
        return not unknown_goes if entry is None else not _is_settled(entry, made_with)

    removed = Removed()
    former = [name for name in store.fingerprints() if name.partition("-")[0] != made_with.frames]
    for fingerprint in former:
        other = store.sibling(fingerprint)
        gone = _prune(other, partition, is_needed, keep=keep, now=now)
        if gone.shards:
            other.remove_empty(partition)
        removed += gone
    return removed


def _prune(
    store: ShardStore[S],
    partition: IdRange,
    is_needed: Callable[..., bool],
    *,
    keep: timedelta,
    now: datetime | None,
) -> Removed:
    moment = now or datetime.now(UTC)
    old = [
        shard
        for shard in _finished(store.shards(partition), is_needed, now=moment)
        if moment - written_at(shard.name) >= keep
    ]
    for shard in old:
        store.remove(shard)
    removed = Removed(len(old), sum(len(shard.records) for shard in old), sum(shard.size_bytes for shard in old))
    if old:
        what = f"{store.kind} shards"
        logger.info("Removed %d %s (%d bytes): their records are done", removed.shards, what, removed.num_bytes)
    return removed


def _finished(shards: Iterable[S], is_needed: Callable[..., bool], *, now: datetime) -> list[S]:
    """Those that no record needs."""
    shards = list(shards)
    newest = newest_copies(shards)
    return [
        shard
        for shard in shards
        if _says_when(shard.name)
        and not any(
            newest[record.record_id].shard is shard
            and is_needed(record, unknown_goes=now - written_at(shard.name) >= _UNKNOWN)
            for record in shard.records
        )
    ]


def _is_of(record: ShardRecord, entry: LedgerEntry) -> bool:
    """Whether a record is of the version and of the file that the ledger speaks of."""
    same_file = not record.address or not entry.address or record.address == entry.address
    return same_file and record.content_version == entry.content_version


def _is_settled(entry: LedgerEntry, made_with: Fingerprints) -> bool:
    today = (entry.frames_fingerprint, entry.embedding_fingerprint) == (made_with.frames, made_with.embedding)
    return entry.state == "parked" or (entry.state == "done" and today)


def _says_when(name: str) -> bool:
    try:
        written_at(name)
    except ValueError:
        return False
    return True
