"""Which rows are unfinished: asked each tick for a window of ids, and never for the whole table at once.

With mark columns the answer comes from a partial index over the rows that are not done, so that it costs the same
whatever the table's size. Without, the window's rows are compared with the ledger.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import sqlalchemy as sa

from extraction_dagster.stages.catalog.catalog import status_of
from extraction_dagster.stages.catalog.database import reading
from extraction_dagster.stages.catalog.ledger import LedgerEntry
from extraction_dagster.stages.catalog.source_table import chunks
from extraction_dagster.stages.catalog.state_tables import LEDGER_TABLE, UNFINISHED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from extraction_dagster.stages.catalog.catalog import Catalog

_MAX_ID = 2**63 - 1
_MIN_ID = -(2**63)
_DENSE = 4  # ids to a row up to which the ledger is read as one range, not by lists of ids


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A row that is neither done nor parked.

    Attributes:
        record_id: Its id.
        due: Whether it may be processed now; a failed one waits for its time.
    """

    record_id: int
    due: bool


@dataclass(frozen=True, slots=True)
class Scan:
    """The unfinished rows of a window of ids, all as of one moment.

    Attributes:
        unfinished: In ascending order of ids.
        reached_id: The last id looked at when the budget ended the scan; None when the whole window was looked at.
        finished_up_to: The greatest eligible id in the window below which every eligible row is done or parked, itself
            included; None when there is none.
    """

    unfinished: tuple[Unfinished, ...]
    reached_id: int | None
    finished_up_to: int | None

    @property
    def due_ids(self) -> list[int]:
        """The rows that may be processed now."""
        return [row.record_id for row in self.unfinished if row.due]


def scan(
    catalog: Catalog,
    *,
    after_id: int | None,
    up_to_id: int | None,
    budget: int,
    every_row: bool = False,
) -> Scan:
    """Find the unfinished rows with `after_id < id <= up_to_id`.

    Args:
        catalog: The source table and the ledger.
        after_id: None for the whole beginning.
        up_to_id: None for the whole end.
        budget: Most rows looked at.
        every_row: Look at rows that are marked as done too: their version may have changed.
    """
    low = _MIN_ID if after_id is None else after_id + 1
    high = _MAX_ID if up_to_id is None else up_to_id
    if low > high:
        return Scan((), None, None)
    source, now = catalog.source, datetime.now(UTC)
    with _snapshot(catalog) as connection:
        heads = _heads(catalog, connection, low, high, budget, every_row=every_row)
        reached = heads[-1][0] if len(heads) >= budget else None
        unfinished = tuple(_classify(catalog, connection, heads, now))
        end = unfinished[0].record_id - 1 if unfinished else high if reached is None else reached
        greatest = sa.select(sa.func.max(source.id)).where(source.eligible, source.id.between(low, end))
        finished = connection.execute(greatest).scalar_one() if low <= end else None
    return Scan(unfinished, reached, None if finished is None else int(finished))


_Head = tuple[int, str, bool | None]


def _heads(  # noqa: PLR0913 - the window, and how to look through it
    catalog: Catalog, connection: sa.Connection, low: int, high: int, budget: int, *, every_row: bool
) -> list[_Head]:
    """The rows of a window that may be unfinished, in ascending order of ids; at most `budget`."""
    source = catalog.source
    condition = None if every_row else source.unmarked
    query = source.heads(only=condition).where(source.id.between(low, high)).limit(budget)
    heads = {int(record_id): (version, done) for record_id, version, done in connection.execute(query)}
    if condition is not None:
        _add_marked(catalog, connection, heads, (low, max(heads) if len(heads) >= budget else high), budget)
    return [(key, *heads[key]) for key in sorted(heads)][:budget]


def _add_marked(
    catalog: Catalog,
    connection: sa.Connection,
    heads: dict[int, tuple[str, bool | None]],
    window: tuple[int, int],
    budget: int,
) -> None:
    """Add the rows that are marked as done and not done for the ledger: a re-embedding that was interrupted, say.

    The ledger also keeps entries of rows that are gone, however many: it is read page by page until rows are enough.
    """
    low, high = window
    while True:
        page = _unfinished_entries(catalog, connection, low, high, budget)
        for chunk in chunks([key for key in page if key not in heads]):
            for record_id, version, done in connection.execute(
                catalog.source.heads().where(catalog.source.id.in_(chunk))
            ):
                heads[int(record_id)] = (version, done)
        if len(page) < budget or sum(key <= page[-1] for key in heads) >= budget:
            return
        low = page[-1] + 1


def _unfinished_entries(catalog: Catalog, connection: sa.Connection, low: int, high: int, budget: int) -> list[int]:
    query = (
        sa.select(LEDGER_TABLE.c.record_id)
        .where(UNFINISHED, LEDGER_TABLE.c.record_id.between(low, high))
        .order_by(LEDGER_TABLE.c.record_id)
        .limit(budget)
    )
    with _ledger(catalog, connection) as ledger:
        return [int(record_id) for record_id in ledger.execute(query).scalars()]


def _classify(
    catalog: Catalog, connection: sa.Connection, heads: Sequence[_Head], now: datetime
) -> Iterator[Unfinished]:
    entries = _entries(catalog, connection, [head[0] for head in heads])
    for record_id, version, done in heads:
        marked_done = None if done is None else bool(done)
        status = status_of(version, marked_done, entries.get(record_id), None, now=now)
        if status not in {"done", "parked"}:
            yield Unfinished(record_id, due=status != "waiting")


def _entries(catalog: Catalog, connection: sa.Connection, ids: Sequence[int]) -> dict[int, LedgerEntry]:
    if not ids:
        return {}
    table = LEDGER_TABLE.c
    query = sa.select(table.record_id, table.state, table.source_version, table.not_before)
    dense = ids[-1] - ids[0] < _DENSE * len(ids)
    conditions = [table.record_id.between(ids[0], ids[-1])] if dense else [table.record_id.in_(c) for c in chunks(ids)]
    found: dict[int, LedgerEntry] = {}
    with _ledger(catalog, connection) as ledger:
        for condition in conditions:
            for record_id, state, version, not_before in ledger.execute(query.where(condition)):
                found[record_id] = LedgerEntry(record_id, state, source_version=version, not_before=not_before)
    return found


@contextmanager
def _snapshot(catalog: Catalog) -> Iterator[sa.Connection]:
    """A connection whose statements all see the source as it was at one moment.

    Otherwise a row that commits between two statements could be taken for finished, and the watermark would pass it.
    """
    level: Literal["REPEATABLE READ"] = "REPEATABLE READ"
    with reading(catalog.source_engine, what=f"read source table {catalog.source.name!r}") as connection:
        if connection.dialect.name != "sqlite":  # there, every transaction is such a snapshot
            connection = connection.execution_options(isolation_level=level)  # noqa: PLW2901 - the same one, set
        yield connection


@contextmanager
def _ledger(catalog: Catalog, connection: sa.Connection) -> Iterator[sa.Connection]:
    """The ledger's connection: the source's own where they share a database, so that they share the moment too."""
    if catalog.one_database:
        yield connection
        return
    with reading(catalog.state_engine, what="read the ledger") as ledger:
        yield ledger
