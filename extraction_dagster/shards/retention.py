"""How long frame shards stay: `EXTRACTION_KEEP_FRAMES`.

A shard goes as a whole, once none of its records needs it: each is done or parked with the settings of today, or a
newer shard holds it, or the ledger has not known it for a day. Removing one too early costs a decode, never a point: a
row that is asked for again without its frames is decoded again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from extraction_dagster.shards.store import written_at

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extraction_dagster.records import IdRange
    from extraction_dagster.shards.frame_store import FrameShard, FrameStore, ShardRecord
    from extraction_dagster.stages.catalog.catalog import Fingerprints
    from extraction_dagster.stages.catalog.ledger import LedgerEntry

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


def keep_time(keep_frames: str) -> timedelta | None:
    """The time that a finished shard stays after it was written; None for ever."""
    return (
        {"all": None, "none": timedelta()}.get(keep_frames)
        if not keep_frames.isdigit()
        else timedelta(int(keep_frames))
    )


def prune_frames(  # noqa: PLR0913 - each is a different part of the question
    store: FrameStore,
    partition: IdRange,
    entries: dict[int, LedgerEntry],
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
    moment = now or datetime.now(UTC)
    finished = _finished(store.shards(partition), entries, made_with, now=moment)
    old = [shard for shard in finished if moment - written_at(shard.name) >= keep]
    for shard in old:
        store.remove(shard)
    removed = Removed(len(old), sum(len(shard.records) for shard in old), sum(shard.size_bytes for shard in old))
    if old:
        logger.info("Removed %d frame shards (%d bytes): their records are done", removed.shards, removed.num_bytes)
    return removed


def _finished(
    shards: Iterable[FrameShard], entries: dict[int, LedgerEntry], made_with: Fingerprints, *, now: datetime
) -> list[FrameShard]:
    """Those that no record needs."""
    newer: set[int] = set()
    finished = []
    for shard in sorted(shards, key=lambda shard: shard.name, reverse=True):
        unknown_goes = now - written_at(shard.name) >= _UNKNOWN
        needed = [
            record
            for record in shard.records
            if record.record_id not in newer
            and _is_needed(record, entries.get(record.record_id), made_with, unknown_goes=unknown_goes)
        ]
        if not needed:
            finished.append(shard)
        newer.update(record.record_id for record in shard.records)
    return finished


def _is_needed(record: ShardRecord, entry: LedgerEntry | None, made_with: Fingerprints, *, unknown_goes: bool) -> bool:
    if entry is None or entry.content_version != record.content_version:
        return not unknown_goes
    today = (entry.frames_fingerprint, entry.embedding_fingerprint) == (made_with.frames, made_with.embedding)
    return not (entry.state == "parked" or (entry.state == "done" and today))
