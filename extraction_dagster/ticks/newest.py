"""The look at what changed lately: rows whose versions are newer than any that was seen, and late commits behind them.

           round_after_id                        order of ids: a part in each tick, the net beneath it all
    ──────────────┼──────────────────────────────────────────►

              once_more            newest   now     ahead
    ──────────────┼───────────────────┼──────┼────────┼──────► order of versions
               a page in each tick,    new             new rows that a wrong clock
               for late commits        rows            has stamped

What it finds loses its mark, so that every other look finds it as well, whoever has no place for it now. A table
without marks is compared with the ledger row by row in any case: there this look stays where rows are pending.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa

from extraction_dagster.records import fingerprint
from extraction_dagster.stages.catalog.changes import Growth, Page, Place, Version, Versions, changed, growth_of
from extraction_dagster.stages.catalog.pending import pending_among, snapshot
from extraction_dagster.ticks.memory import Order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extraction_dagster.stages.catalog.catalog import Catalog
    from extraction_dagster.ticks.cursor import CursorState
    from extraction_dagster.ticks.memory import Memory

_BUDGET = 20_000  # rows of a tick: new ones, and those of the round
_PAGE = 5_000
_BUDGET_ELSEWHERE = 2_000  # rows of the round in a tick, where the ledger is in another database than they are
_PAGE_ONCE_MORE = 1_000
_SECONDS = 5.0
_SECONDS_ONCE_MORE = 0.25  # of a command


class NewestLook:
    """The look of one tick.

    Args:
        catalog: The source table and the ledger.
        cursor: Where processing is.
        memory: Where the last look ended; where this one ends is noted in it.
    """

    def __init__(self, catalog: Catalog, cursor: CursorState, memory: Memory) -> None:
        settings = catalog.settings
        self.growth: Growth = growth_of(catalog.source, catalog.source_engine, settings.source_version_grows)
        self._catalog, self._cursor, self._memory = catalog, cursor, memory
        self.is_possible, self._has_nulls = self.growth.kind is not None, False
        key = fingerprint(column=settings.source_version_column, epoch=cursor.reset_epoch, kind=self.growth.kind)
        if memory.order.key != key:
            memory.order = Order(key)

    @property
    def is_enough(self) -> bool:
        """Whether it has seen every change, so that a command need not compare each row."""
        return self.is_possible and self.growth.is_sure and not self._has_nulls and self._memory.order.is_whole

    def changed(self, *, whole: bool) -> list[int]:
        """Rows at or below the watermark that have changed; those above it are found by the looks there.

        Args:
            whole: Look up to the end, however many rows are new.
        """
        if not self.is_possible:
            return []
        try:
            found = self._new(whole=whole)
            if self.is_possible and (whole or self._memory.ticks % 2 == 0):  # the round has the other ticks
                found += self._once_more(whole=whole)
        except (ValueError, TypeError, sa.exc.DataError):  # versions that are none: the round goes on without this
            self.is_possible, self._memory.order = False, Order(self._memory.order.key)
            return []
        return self._below(found)

    def round(self, *, seconds: float = 0.0) -> list[int]:
        """A part of the round that compares each row, as a net beneath the order of versions; returns as `changed`.

        Args:
            seconds: Of a command, how long; every other tick looks at a number of rows.
        """
        if not seconds and self._memory.ticks % 2 == 0:
            return []
        order, found, end = self._memory.order, list[int](), time.monotonic() + seconds
        source, size = self._catalog.source, _BUDGET if self._catalog.one_database else _BUDGET_ELSEWHERE
        while True:
            with snapshot(self._catalog) as connection:
                page = sa.select(source.id.label("id")).order_by(source.id).limit(size)
                if order.round_after_id is not None:
                    page = page.where(source.id > order.round_after_id)
                part = page.subquery()
                ends = sa.select(sa.func.count(), sa.func.min(part.c.id), sa.func.max(part.c.id))
                number, first, last = connection.execute(ends).one()
                condition = source.id.between(first, last)
                rows = changed(self._catalog, connection, condition, above_id=self._cursor.floor_id) if number else []
            found += self._note(rows)
            order.round_after_id = int(last) if number == size else None
            if order.round_after_id is None or time.monotonic() >= end:
                break
        if found and order.is_whole:
            order.is_whole, order.found_rows = False, True
        elif order.round_after_id is None:
            order.is_whole, order.found_rows = not order.found_rows, False
        return self._below(found)

    def note_whole(self) -> None:
        """A command has compared each row."""
        self._memory.order.is_whole, self._memory.order.found_rows = True, False

    def _below(self, found: list[int]) -> list[int]:
        """Those at or below the watermark."""
        last_id = self._cursor.last_processed_id
        return sorted({key for key in found if last_id is not None and key <= last_id})

    @contextmanager
    def _versions(self) -> Iterator[tuple[sa.Connection, Versions]]:
        with snapshot(self._catalog) as connection:
            yield connection, Versions(self._catalog, connection, self.growth, now=datetime.now(UTC))

    def _prepare(self, versions: Versions) -> None:
        order = self._memory.order
        self.is_possible = versions.is_there()
        if not self.is_possible:
            return
        self._has_nulls = versions.has_nulls()
        if order.newest is None and (begin := versions.below_newest(_PAGE)) is not None:
            order.newest = Place(begin)
        if order.ahead is not None and versions.is_past(order.ahead):
            order.newest, order.ahead = order.ahead, None

    def _new(self, *, whole: bool) -> list[int]:
        """Look at what is newer than all that was seen; a page at a time, for what is found is written in between."""
        order, found, is_ahead = self._memory.order, list[int](), False
        left, end = _BUDGET, time.monotonic() + _SECONDS
        while whole or (left > 0 and time.monotonic() < end):
            past = None
            with self._versions() as (connection, versions):
                if left == _BUDGET:
                    self._prepare(versions)
                    if not self.is_possible:
                        return []
                if order.ahead is not None and not is_ahead:
                    past = versions.newest(of_the_past=True)
                page = versions.page(order.ahead if is_ahead else order.newest, _PAGE, up_to=past)
                rows = [] if page is None else self._rows(connection, page.condition)
                if page is not None and not page.is_past:
                    past = versions.newest(of_the_past=True)
            found += self._note(rows)
            if rows and not self._catalog.source.has_marks:
                return found  # no other look finds them: this one stays here until they are done
            if page is not None:
                self._move_to(page, past)
                left -= _PAGE
            if page is None or page.is_last:
                if is_ahead or order.ahead is None:
                    return found
                is_ahead = True
            is_ahead = is_ahead or (page is not None and not page.is_past)
        return found

    def _move_to(self, page: Page, past: Version | None) -> None:
        """Go on behind a page; what is of the future does not lead the look past the present."""
        order = self._memory.order
        if page.is_past:
            order.newest = page.place
            return
        order.ahead = page.place
        if past is not None:
            order.newest = Place(past)

    def _once_more(self, *, whole: bool) -> list[int]:
        """Look at rows of a while ago again: one may have committed late, with an older time than its neighbours."""
        order, found = self._memory.order, list[int]()
        end = time.monotonic() + _SECONDS_ONCE_MORE
        while order.newest is not None:
            with self._versions() as (connection, versions):
                if order.once_more is None:
                    seconds = self._catalog.settings.source_version_overlap_seconds
                    order.once_more = versions.once_more_from(order.newest, seconds)
                up_to = order.newest.version if order.ahead is None else None
                page = versions.page(order.once_more, _PAGE_ONCE_MORE, up_to=up_to)
                rows = [] if page is None else self._rows(connection, page.condition)
            found += self._note(rows)
            order.once_more = None if page is None or page.is_last else page.place
            if order.once_more is None or not whole or time.monotonic() > end:
                break
        return found

    def _rows(self, connection: sa.Connection, condition: sa.ColumnElement[bool]) -> list[int]:
        """Those of some rows that have changed."""
        floor_id, last_id = self._cursor.floor_id, self._cursor.last_processed_id
        if self._catalog.source.has_marks:
            return changed(self._catalog, connection, condition, above_id=floor_id)
        if last_id is None:
            return []
        below = sa.and_(condition, self._catalog.source.id <= last_id)  # above it, each row is looked at in any case
        return pending_among(self._catalog, connection, below, floor_id=floor_id)

    def _note(self, record_ids: list[int]) -> list[int]:
        """Let every look find rows that have changed; those that have."""
        if not (record_ids and self._catalog.source.has_marks):
            return record_ids
        found = self._catalog.make_changed_pending(record_ids)
        self._memory.sweep_found_rows = self._memory.sweep_found_rows or bool(found)
        return sorted(found)
