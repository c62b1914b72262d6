"""Which rows are pending: defined, found, counted, and the partial index that finds them.

A pending row is eligible, above the operator's floor, and neither done, nor parked, nor waiting for its next try.
`status_of` and `is_pending` decide it for one row, `scan` for a window of ids, `count_pending` for the whole table.

A tick asks for windows, never for the whole table at once. With mark columns the answer comes from a partial index
over the rows that are not done, so that it costs the same whatever the table's size. Without, the window's rows are
compared with the ledger, by the database where it has both.
"""

from __future__ import annotations

import random
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, Protocol

import sqlalchemy as sa

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.database import chunks, fetch_all, reading, storable
from extraction_dagster.stages.catalog.ledger import Fingerprints, Ledger, LedgerEntry
from extraction_dagster.stages.catalog.state_tables import LEDGER_TABLE, UNFINISHED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from extraction_dagster.stages.catalog.source_table import SourceTable

_MAX_ID = 2**63 - 1
_MIN_ID = -(2**63)
# A row: its id, its version (None when it can't be read), whether it is marked as done.
_Head = tuple[int, str | None, bool | None]
_MOST_ENTRIES = 20_000  # of the ledger in a scan
_MOST_ENTRIES_ELSEWHERE = 2_000  # where the rows lie in another database
_CHUNK = 500  # rows asked for at once where one of them can't be read
_MOST_ADDRESSES = 500  # of rows that wait or are parked, compared in one scan
_DENSE = 4  # ids to a row up to which the ledger is read as one range, not by lists of ids
Status = Literal["done", "todo", "again", "waiting", "parked"]


class Rows(Protocol):
    """Where rows and what is known of them are read; a `Catalog` is one."""

    source: SourceTable
    source_engine: sa.Engine
    ledger: Ledger
    one_database: bool


def status_of(  # noqa: PLR0913 - what is known of a row, each by name
    source_version: str,
    marked_done: bool | None,  # noqa: FBT001 - three states of a row, not an option
    entry: LedgerEntry | None,
    fingerprints: Fingerprints | None,
    *,
    now: datetime,
    address: str = "",
    keeps_moved: bool = False,
) -> Status:
    """Decide what is to be done with an eligible row.

    With fingerprints, a row that was done with other settings is to be done again: a materialization brings its range
    up to date. Without, it stays done: a changed setting alone makes no row pending.

    A row that the source marks as done and the ledger has never seen was done before this project came: it stays done.

    Args:
        source_version: The row's version column; empty when there is none.
        marked_done: What its marks say; None when it has none.
        entry: Its ledger entry.
        fingerprints: Those of today.
        now: Compared with the entry's `not_before`.
        address: The row's; empty when it is not known, so that it is not compared. A row that failed is tried at once
            when its address was corrected, and one that is done is done again.
        keeps_moved: A row that is done stays done although its address has changed.
    """
    if entry is None:
        return "done" if marked_done else "todo"
    if entry.source_version != source_version:
        return "todo"
    has_moved = bool(address) and entry.address not in {None, address}
    if entry.state == "parked":
        return "todo" if has_moved else "parked"
    if entry.state == "failed":
        waits = entry.not_before is not None and entry.not_before > now and not has_moved
        return "waiting" if waits else "todo"
    if entry.state != "done":
        return "todo"
    if marked_done is False:
        return "again"
    if has_moved and not keeps_moved:
        return "todo"
    made_with = Fingerprints(entry.frames_fingerprint or "", entry.embedding_fingerprint or "")
    return "done" if fingerprints in {None, made_with} else "todo"


def is_pending(record_id: int, status: Status, *, floor_id: int | None) -> bool:
    """Whether an eligible row is pending; no floor holds in a range that a person launches."""
    return status in {"todo", "again"} and (floor_id is None or record_id > floor_id)


def count_pending(rows: Rows, *, floor_id: int | None, now: datetime) -> int:
    """The number of pending rows of the whole table, from counts alone: no row is looked at one by one.

    Rows that are gone and have a ledger entry blur it a little; `scan` is exact.
    """
    if floor_id is not None and floor_id >= _MAX_ID:
        return 0
    above = None if floor_id is None else IdRange(floor_id + 1, _MAX_ID)
    unfinished = rows.source.count_unmarked(above)
    if unfinished is None:
        unfinished = rows.source.count(above) - rows.ledger.counts(above).get("done", 0)
    return max(unfinished - rows.ledger.count_held_back(above, now=now), 0)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A row that is neither done nor parked, and whether it may be processed now: a failed one waits for its time."""

    record_id: int
    pending: bool


@dataclass(frozen=True, slots=True)
class Scan:
    """The unfinished rows of a window of ids, all as of one moment.

    Attributes:
        unfinished: In ascending order of ids.
        reached_id: The last id looked at when the budget ended the scan; None when the whole window was looked at.
        finished_up_to: The greatest eligible id in the window below which every eligible row is done or parked, itself
            included; None when there is none. Of a scan that ended at its budget with nothing unfinished, `reached_id`.
    """

    unfinished: tuple[Unfinished, ...]
    reached_id: int | None
    finished_up_to: int | None

    @property
    def is_clear(self) -> bool:
        """Whether the whole window was looked at, and nothing in it is unfinished."""
        return not self.unfinished and self.reached_id is None

    @property
    def pending_ids(self) -> list[int]:
        """The rows that may be processed now."""
        return [row.record_id for row in self.unfinished if row.pending]


def scan(  # noqa: PLR0913 - the window, and how to look through it
    catalog: Rows,
    *,
    after_id: int | None,
    up_to_id: int | None,
    budget: int,
    floor_id: int | None = None,
    every_row: bool = False,
) -> Scan:
    """Find the unfinished rows with `after_id < id <= up_to_id` above the operator's floor, and which are pending.

    Args:
        catalog: The source table and the ledger.
        after_id: None for the whole beginning.
        up_to_id: None for the whole end.
        budget: Most rows looked at.
        floor_id: The cursor's floor: rows at or below are not looked at.
        every_row: Look at rows that are marked as done too: their version may have changed.
    """
    low = max((bound + 1 for bound in (after_id, floor_id) if bound is not None), default=_MIN_ID)
    high = _MAX_ID if up_to_id is None else up_to_id
    if low > high:
        return Scan((), None, None)
    source, now = catalog.source, datetime.now(UTC)
    with snapshot(catalog) as connection:
        heads, reached = _heads(catalog, connection, low, high, budget, every_row=every_row)
        unfinished = tuple(_classify(catalog, connection, heads, now))
        if reached is not None and not unfinished:
            return Scan((), reached, reached)
        end = unfinished[0].record_id - 1 if unfinished else high
        greatest = sa.select(sa.func.max(source.id)).where(source.eligible, source.id.between(low, end))
        finished = connection.execute(greatest).scalar_one() if low <= end else None
    return Scan(unfinished, reached, None if finished is None else int(finished))


def _heads(  # noqa: PLR0913 - the window, and how to look through it
    catalog: Rows, connection: sa.Connection, low: int, high: int, budget: int, *, every_row: bool
) -> tuple[list[_Head], int | None]:
    """The rows of a window that may be unfinished, in ascending order of ids, and where the budget ended the look."""
    source = catalog.source
    condition = None if every_row else source.unmarked
    if condition is None and catalog.one_database:
        return _compared(source, connection, low, high, budget)
    query = source.heads(only=condition).where(source.id.between(low, high)).limit(budget)
    heads = _read(connection, source, query)
    reached = max(heads) if len(heads) >= budget else None
    if condition is not None:
        marked, end = _marked(catalog, connection, low, high if reached is None else reached, budget)
        reached = reached if end is None else end
        for chunk in chunks([key for key in marked if key not in heads]):
            heads |= _read(connection, source, source.heads().where(source.id.in_(chunk)))
    keys = sorted(key for key in heads if reached is None or key <= reached)
    if len(keys) >= budget:
        keys = keys[:budget]
        reached = keys[-1]
    return [(key, *heads[key]) for key in keys], reached


def _compared(
    source: SourceTable, connection: sa.Connection, low: int, high: int, budget: int
) -> tuple[list[_Head], int | None]:
    """The rows of a window that the database does not find done in its ledger; ends as `_heads` does."""
    ids = sa.select(source.id.label("id")).where(source.eligible, source.id.between(low, high))
    page = ids.order_by(source.id).limit(budget).subquery()
    number, last = connection.execute(sa.select(sa.func.count(), sa.func.max(page.c.id))).one()
    if not number:
        return [], None
    heads = _read(connection, source, not_done(source, connection, low, int(last)))
    return [(key, *heads[key]) for key in sorted(heads)], int(last) if number >= budget else None


def not_done(
    source: SourceTable, connection: sa.Connection, low: int = _MIN_ID, high: int = _MAX_ID
) -> sa.Select[int, str, bool | None]:
    """A query of the heads of rows that may be unfinished, where the ledger is beside them."""
    entries = LEDGER_TABLE.c
    entry = sa.and_(entries.record_id == source.id, entries.record_id.between(low, high))
    is_new = entries.record_id.is_(None) if source.unmarked is None else source.unmarked
    both = sa.outerjoin(source.table, LEDGER_TABLE, entry)
    query = source.heads(only=sa.or_(is_new, entries.state != "done", is_other_version(source, connection)))
    return query.select_from(both).where(source.id.between(low, high))


def is_other_version(source: SourceTable, connection: sa.Connection) -> sa.ColumnElement[bool]:
    """That a row's version is another than its entry's, byte for byte."""
    present, known = source.version_text, LEDGER_TABLE.c.source_version
    if connection.dialect.name != "postgresql":
        return present != known
    return present.collate("C") != known.collate("C")  # a column's own collation may call different texts equal


def pending_among(
    catalog: Rows, connection: sa.Connection, condition: sa.ColumnElement[bool], *, floor_id: int | None
) -> list[int]:
    """The pending ones of some rows, above the operator's floor."""
    source, now = catalog.source, datetime.now(UTC)
    query = not_done(source, connection) if catalog.one_database else source.heads()
    if floor_id is not None:
        query = query.where(source.id > floor_id)
    heads = _read(connection, source, query.where(condition))
    found = _classify(catalog, connection, [(key, *heads[key]) for key in sorted(heads)], now)
    return [row.record_id for row in found if row.pending]


def _read(
    connection: sa.Connection, source: SourceTable, query: sa.Select[int, str, bool | None]
) -> dict[int, tuple[str | None, bool | None]]:
    """What a query of heads finds, by id; a row whose version is no text that can be read stands with None."""
    with suppress(ValueError, TypeError, ArithmeticError):
        return {int(record_id): (storable(version), done) for record_id, version, done in fetch_all(connection, query)}
    # One of them can't be read: halve what is asked for until it is alone.
    ids = [int(record_id) for record_id in connection.execute(query.with_only_columns(source.id)).scalars()]
    if len(ids) <= 1:
        return dict.fromkeys(ids, (None, None))
    found: dict[int, tuple[str | None, bool | None]] = {}
    for chunk in chunks(ids, min(len(ids) // 2, _CHUNK)):
        found |= _read(connection, source, source.heads().where(source.id.in_(chunk)))
    return found


def _marked(catalog: Rows, connection: sa.Connection, low: int, high: int, budget: int) -> tuple[list[int], int | None]:
    """Rows that the ledger says are not done, among them those that are marked as done: an interrupted re-embedding.

    The ledger also keeps entries of rows that are gone or not eligible any more, however many: one page is looked at,
    and the look ends there. Where both tables are in one database, the database itself leaves those entries out.

    Returns:
        Ids, and the last one that was looked at when not all were.
    """
    source, entries = catalog.source, LEDGER_TABLE.c
    most = min(budget, _MOST_ENTRIES if catalog.one_database else _MOST_ENTRIES_ELSEWHERE)

    def page(*conditions: sa.ColumnElement[bool] | sa.TextClause) -> sa.Select[int]:
        query = sa.select(entries.record_id).where(UNFINISHED, entries.record_id.between(low, high), *conditions)
        return query.order_by(entries.record_id).limit(most)

    with _ledger(catalog, connection) as ledger:
        if not catalog.one_database:
            found = [int(key) for key in ledger.execute(page()).scalars()]
            return found, found[-1] if len(found) >= most else None
        first = page().subquery()
        number, last = ledger.execute(sa.select(sa.func.count(), sa.func.max(first.c.record_id))).one()
        if not number:
            return [], None
        # The offset keeps PostgreSQL from joining the tables as a whole: each entry's row is looked up by its key.
        row = sa.select(sa.literal(1)).where(source.id == entries.record_id, source.eligible).offset(0)
        there = page(entries.record_id <= last, row.correlate(LEDGER_TABLE).exists())
        return [int(key) for key in ledger.execute(there).scalars()], int(last) if number >= most else None


def _classify(catalog: Rows, connection: sa.Connection, heads: Sequence[_Head], now: datetime) -> Iterator[Unfinished]:
    """The unfinished ones of rows that lie above the floor."""
    entries = _entries(catalog, connection, [head[0] for head in heads])
    held_back = [
        key
        for key, entry in entries.items()
        if entry.address is not None and (entry.state == "parked" or (entry.not_before or now) > now)
    ]
    if len(held_back) > _MOST_ADDRESSES:  # others are looked at by other scans
        held_back = random.sample(held_back, _MOST_ADDRESSES)
    addresses = catalog.source.addresses_of(held_back)
    for record_id, version, done in heads:
        entry, marked_done = entries.get(record_id), None if done is None else bool(done)
        address = addresses.get(record_id, "")
        if version is None:  # its range is to record the failure, which then is in the ledger
            status = status_of(entry.source_version if entry else "", None, entry, None, now=now, address=address)
            status = "todo" if status == "done" else status
        else:
            status = status_of(version, marked_done, entry, None, now=now, address=address)
        if status not in {"done", "parked"}:
            yield Unfinished(record_id, is_pending(record_id, status, floor_id=None))


def _entries(catalog: Rows, connection: sa.Connection, ids: Sequence[int]) -> dict[int, LedgerEntry]:
    if not ids:
        return {}
    table = LEDGER_TABLE.c
    query = sa.select(table.record_id, table.state, table.source_version, table.not_before, table.address)
    dense = ids[-1] - ids[0] < _DENSE * len(ids)
    conditions = [table.record_id.between(ids[0], ids[-1])] if dense else [table.record_id.in_(c) for c in chunks(ids)]
    found: dict[int, LedgerEntry] = {}
    with _ledger(catalog, connection) as ledger:
        for condition in conditions:
            for record_id, state, version, not_before, address in ledger.execute(query.where(condition)):
                found[record_id] = LedgerEntry(
                    record_id, state, source_version=version, not_before=not_before, address=address
                )
    return found


@contextmanager
def snapshot(catalog: Rows) -> Iterator[sa.Connection]:
    """A connection whose statements all see the source as it was at one moment.

    Otherwise a row that commits between two statements could be taken for finished, and the watermark would pass it.
    """
    with reading(catalog.source_engine, what=f"read source table {catalog.source.name!r}") as connection:
        if connection.dialect.name != "sqlite":  # there, every transaction is such a snapshot
            connection.execution_options(isolation_level="REPEATABLE READ")  # it is changed in place
        yield connection


@contextmanager
def _ledger(catalog: Rows, connection: sa.Connection) -> Iterator[sa.Connection]:
    """The ledger's connection: the source's own where they share a database, so that they share the moment too."""
    if catalog.one_database:
        yield connection
        return
    with reading(catalog.ledger.engine, what="read the ledger") as ledger:
        yield ledger


def pending_index(source: SourceTable) -> sa.Index | None:
    """The index that a table needs; None for a table without mark columns."""
    if source.unmarked is None:
        return None
    name = f"extraction_pending_{source.table.name}"[:63]
    table = source.table.to_metadata(sa.MetaData())  # an index belongs to a table; the reflected one stays as it is
    return sa.Index(name, table.c[source.id.name], postgresql_where=source.unmarked, sqlite_where=source.unmarked)
