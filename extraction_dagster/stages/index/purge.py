"""The brake on removing: only what was gone in two reconciliations some time apart, and only so much of it at once.

    02:00   record 9 is not in the table     noted as gone since 02:00
    02:30   record 9 is not in the table     it waits: EXTRACTION_PURGE_AFTER_SECONDS is an hour
    04:00   record 9 is not in the table     its points are removed, the ledger forgets it
    05:00   record 9 is in the table again   it is processed like any other row; when its marks say that it is done, as
                                             in a restored backup, the next repair makes it pending

A table that is emptied and filled again, a view that is being made, a mistyped predicate, a replica that lags: each
looks for a moment as if rows were deleted. A table without any eligible row never removes anything, and above a share
of the known records it takes a person's word.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from extraction_dagster.stages.catalog.database import chunks, reading, writing
from extraction_dagster.stages.catalog.state_tables import GONE_TABLE, LEDGER_TABLE, insert_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from extraction_dagster.records import IdRange
    from extraction_dagster.stages.catalog.catalog import Catalog

# A handful of a small table is no accident, though it is more than a tenth; half of it is one.
_ALWAYS_ALLOWED = 10
_MOST_OF_FEW = 0.5
_REMEMBERED = timedelta(days=90)
_LOOKED_AT = 500  # removed records at once


@dataclass(frozen=True, slots=True)
class Brake:
    """What becomes of the records that are gone.

    Attributes:
        removable: May be removed now.
        waiting: How many have to be found gone once more.
        since: When the first of those was found gone.
        until: When the last of those may be removed.
        held_back: How many are kept because they are too many, or because no row is left.
        why: The reason, and how to go on.
    """

    removable: tuple[int, ...] = ()
    waiting: int = 0
    since: datetime | None = None
    until: datetime | None = None
    held_back: int = 0
    why: str = ""

    @property
    def summary(self) -> str:
        """What waits and what is held back, in a sentence each; empty when there is neither."""
        said = []
        if self.waiting and self.since and self.until:
            said.append(
                f"{self.waiting} records wait, the first of them since {_shown(self.since)}: 'extraction reconcile "
                f"--repair' after {_shown(self.until)} removes those that are gone by then as well."
            )
        if self.held_back:
            said.append(f"{self.held_back} records are held back: {self.why}")
        return " ".join(said)


def note_gone(catalog: Catalog, gone: Collection[int], *, within: IdRange) -> dict[int, datetime]:
    """Note the records of a range that are gone now, and take off the list those that are back.

    Returns:
        When each of the gone records was found gone first.
    """
    table, now = GONE_TABLE.c, datetime.now(UTC)
    query = sa.select(table.record_id, table.seen_at).where(table.record_id.between(within.first_id, within.last_id))
    with reading(catalog.state_engine, what="read the list of gone records") as connection:
        listed = _moments(connection, query.where(table.purged_at.is_(None)))
        listed |= _half_removed(connection, sorted(set(gone) - listed.keys()))
    back, new = sorted(listed.keys() - set(gone)), sorted(set(gone) - listed.keys())
    if back or new:
        with writing(catalog.state_engine, what="write the list of gone records") as connection:
            _take_off(connection, back)
            insert = insert_of(catalog.state_engine)(GONE_TABLE)
            once_more = insert.on_conflict_do_update(  # it was removed, came back, and is gone once more
                index_elements=["record_id"],
                set_={"seen_at": now, "purged_at": None},
                where=table.purged_at.is_not(None),
            )
            for chunk in chunks(new):
                connection.execute(once_more, [{"record_id": record_id, "seen_at": now} for record_id in chunk])
    return {record_id: listed.get(record_id, now) for record_id in gone}


def take_off(catalog: Catalog, record_ids: Collection[int]) -> None:
    """Take records off the list of those that are gone; what is known of removed ones stays."""
    with writing(catalog.state_engine, what="write the list of gone records") as connection:
        _take_off(connection, sorted(record_ids))


def decide(catalog: Catalog, first_seen: Mapping[int, datetime], *, known: int, force: bool) -> Brake:
    """Which of the gone records may be removed: all that have waited long enough, or none.

    Args:
        catalog: The source table and the ledger.
        first_seen: When each gone record was found gone first.
        known: Records that the ledger or the collection holds.
        force: Remove more than the share that the settings allow.
    """
    if not first_seen:
        return Brake()
    settings, number = catalog.settings, len(first_seen)
    if catalog.source.newest_id() is None:
        why = "the source table has no eligible row, so nothing is removed, also with --force."
        return Brake(held_back=number, why=why)
    if number > _allowed(settings.purge_share, known) and not force:
        why = (
            f"{number} of {known} known records are gone, more than EXTRACTION_PURGE_SHARE ({settings.purge_share:g}) "
            "allows. See that the table is whole and EXTRACTION_SOURCE_PREDICATE is meant so; then 'extraction "
            "reconcile --repair --force' removes them."
        )
        return Brake(held_back=number, why=why)
    wait = timedelta(seconds=settings.purge_after_seconds)
    seen_before = datetime.now(UTC) - wait
    waiting = [moment for moment in first_seen.values() if moment > seen_before]
    return Brake(
        removable=tuple(sorted(record_id for record_id, moment in first_seen.items() if moment <= seen_before)),
        waiting=len(waiting),
        since=min(waiting, default=None),
        until=max(waiting) + wait if waiting else None,
    )


def let_go(catalog: Catalog, claims: Mapping[int, int]) -> list[int]:
    """Forget deleted records, and make pending those whose rows are there and not eligible.

    A record whose row is eligible again, or that a run has claimed since it was looked at, is left as it is.

    Args:
        catalog: The source table and the ledger.
        claims: Each record's claim as it was when the record was found gone.

    Returns:
        The others: their points can be removed.
    """
    let_go: list[int] = []
    for chunk in chunks(sorted(claims)):
        back = {row.video.record_id for row in catalog.source.rows_of(chunk)}
        now = catalog.ledger.claims(chunk)
        gone = [key for key in chunk if key not in back and now.get(key, 0) == claims[key]]
        there = catalog.source.existing(gone)
        if deleted := [key for key in gone if key not in there]:
            catalog.forget(deleted, purged_at=datetime.now(UTC))
        if there:
            catalog.make_pending(sorted(there))
        let_go += gone
    return let_go


def find_returned(catalog: Catalog, *, within: IdRange, repair: bool) -> list[int]:
    """The removed records whose rows are back, marked as done, and unknown to the ledger: nobody would do them again.

    On `repair` they are made pending, and nothing is remembered any more of those that are back and of those that were
    removed long ago.
    """
    found, table, long_ago = list[int](), GONE_TABLE.c, datetime.now(UTC) - _REMEMBERED
    query = sa.select(table.record_id, table.purged_at).where(table.purged_at.is_not(None)).order_by(table.record_id)
    removed, first_id = dict[int, datetime](), within.first_id
    while first_id <= within.last_id:
        page = query.where(table.record_id.between(first_id, within.last_id)).limit(_LOOKED_AT)
        with reading(catalog.state_engine, what="read the list of gone records") as connection:
            removed = _moments(connection, page)
        known = catalog.ledger.claims(list(removed))
        rows = {row.video.record_id: row for row in catalog.source.rows_of(removed)}
        returned = [key for key in removed if key in rows and rows[key].marked_done and key not in known]
        found += returned
        over = [key for key, moment in removed.items() if key in rows or key in known or moment < long_ago]
        if repair and over:
            catalog.make_pending(returned)
            with writing(catalog.state_engine, what="write the list of gone records") as connection:
                _take_off(connection, over, removed_until=max(removed.values()))  # not what is removed meanwhile
        first_id = max(removed) + 1 if len(removed) == _LOOKED_AT else within.last_id + 1
    return found


def _half_removed(connection: sa.Connection, record_ids: list[int]) -> dict[int, datetime]:
    """Those of these gone records that were forgotten by a process that died before it removed their points."""
    table = GONE_TABLE.c
    is_known = sa.exists().where(LEDGER_TABLE.c.record_id == table.record_id)
    query = sa.select(table.record_id, table.seen_at).where(table.purged_at.is_not(None), ~is_known)
    found = dict[int, datetime]()
    for chunk in chunks(record_ids):
        found |= _moments(connection, query.where(table.record_id.in_(chunk)))
    return found


def _moments(connection: sa.Connection, query: sa.Select[Any]) -> dict[int, datetime]:
    """What a query of ids and moments finds."""
    return {int(record_id): moment for record_id, moment in connection.execute(query)}


def _allowed(share: float, known: int) -> float:
    return max(share * known, min(_ALWAYS_ALLOWED, _MOST_OF_FEW * known)) if share else 0


def _take_off(connection: sa.Connection, record_ids: list[int], *, removed_until: datetime | None = None) -> None:
    removed = GONE_TABLE.c.purged_at
    is_meant = removed.is_(None) if removed_until is None else removed <= removed_until
    for chunk in chunks(record_ids):
        connection.execute(sa.delete(GONE_TABLE).where(GONE_TABLE.c.record_id.in_(chunk), is_meant))


def _shown(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%SZ}"
