"""The source table: which rows are eligible, which are pending by their marks, and where each row's file lies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from extraction_dagster.errors.catalog import MarksRefusedError
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.database import chunks, fetch_all, reading, storable, writing
from extraction_dagster.stages.catalog.identity import source_identity
from extraction_dagster.stages.catalog.source_rows import SourceRow, SourceRows

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from extraction_dagster.settings import Settings

Step = Literal["extracted", "embedded"]
_CHUNK_OF_RANGES = 100  # parts of one query: SQLite takes no more than 500, and few keep its planner quick
_MAX_ID = 2**63 - 1
_LOCKED = ("table", "partitioned table")
__all__ = ["SourceRow", "SourceTable", "Step"]


class SourceTable(SourceRows):
    """The configured table, reflected and checked.

    Attributes:
        identity: Tells this source from another; equal to the marks under which it was known before.

    Raises:
        SourceTableError: The table or a column is missing, or the id column can't identify records.
        SourceUnreachableError: The database can't be reached or read.
        PredicateError: The predicate is no condition over the table's columns.
    """

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        super().__init__(engine, settings)
        self.identity = source_identity(settings)
        # Rows of a table can be locked by PostgreSQL; those of a view may be of many tables, or of none.
        self._locks = engine.dialect.name == "postgresql" and self.kind in _LOCKED
        self._lock_key: sa.Column[int] = sa.alias(self.table).c[self.id.name] if self._locks else self.id
        self._stays_as_read = self._locks or engine.dialect.name == "sqlite"  # within the transaction that writes

    @property
    def unmarked(self) -> sa.ColumnElement[bool] | None:
        """That a mark is not set, spelled exactly as the partial index spells it; None without mark columns.

        Databases use a partial index only for a query that repeats its condition to the letter.
        """
        is_not_set = [column.op("IS NOT", is_comparison=True)(sa.text("TRUE")) for column in self._marks]
        return sa.or_(*is_not_set) if is_not_set else None

    def heads(self, *, only: sa.ColumnElement[bool] | None = None) -> sa.Select[int, str, bool | None]:
        """A query of (id, version, marked done) of the eligible rows, in ascending order of ids."""
        done = sa.and_(*(column.is_(sa.true()) for column in self._marks)) if self._marks else sa.null()
        query = sa.select(self.id, self.version_text.label("version"), done.label("done")).where(self.eligible)
        return (query if only is None else query.where(only)).order_by(self.id)

    @property
    def version_text(self) -> sa.ColumnElement[str]:
        """The version as the ledger has it, but for bytes that no database takes; empty where there is no column."""
        return sa.literal("") if self._version is None else self._version

    @property
    def has_version(self) -> bool:
        """Whether a version column says that a row's file has changed."""
        return self._version is not None

    def recent_density(self, sample: int) -> float:
        """Ids to a record, over the newest records; 1.0 for ids without gaps and for an empty table."""
        newest = sa.select(self.id).where(self.eligible).order_by(self.id.desc()).limit(sample).subquery()
        query = sa.select(sa.func.min(newest.c[0]), sa.func.max(newest.c[0]), sa.func.count())
        first, last, number = self._one(query)
        return 1.0 if number < 2 else (last - first) / (number - 1)  # noqa: PLR2004 - two ids make a distance

    @property
    def has_marks(self) -> bool:
        """Whether the table says by itself which rows are done."""
        return bool(self._marks)

    def has_mark(self, step: Step) -> bool:
        """Whether there is a column for the mark of a step."""
        return self._column_of(step) is not None

    def _column_of(self, step: Step) -> sa.Column[Any] | None:
        return self._extracted if step == "extracted" else self._embedded

    def existing(self, record_ids: Iterable[int]) -> set[int]:
        """Which of these rows there are, eligible or not."""
        query = sa.select(self.id)
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            return {
                int(record_id)
                for chunk in chunks(list(record_ids))
                for record_id in connection.execute(query.where(self.id.in_(chunk))).scalars()
            }

    def extent(self) -> tuple[int, int] | None:
        """The least and the greatest id of the eligible rows; None when there is none."""
        first, last = self._one(sa.select(sa.func.min(self.id), sa.func.max(self.id)).where(self.eligible))
        return None if first is None else (int(first), int(last))

    def count(self, id_range: IdRange | None = None) -> int:
        """The number of eligible rows, of the whole table or of a range."""
        return self._count(self.eligible, id_range)

    def count_above(self, record_id: int | None) -> int:
        """The number of eligible rows above an id; of all for None."""
        return self.count(None if record_id is None else IdRange(min(record_id + 1, _MAX_ID), _MAX_ID))

    def count_next(self, record_id: int | None, most: int) -> int:
        """The number of eligible rows among the next `most` rows above an id, so that counting never takes long.

        Where there are marks, rows that are marked as done are left out, by the index over the others.
        """
        rows = sa.select(sa.case((self.eligible, 1), else_=0)).select_from(self.table).order_by(self.id).limit(most)
        rows = rows if self.unmarked is None else rows.where(self.unmarked)
        looked_at = (rows if record_id is None else rows.where(self.id > record_id)).subquery()
        return int(self._one(sa.select(sa.func.coalesce(sa.func.sum(looked_at.c[0]), 0)))[0])

    def newest_id(self) -> int | None:
        """The greatest id of the eligible rows; None when there is none."""
        return self._first(sa.select(self.id).where(self.eligible).order_by(self.id.desc()))

    def count_unmarked(self, id_range: IdRange | None = None) -> int | None:
        """The number of eligible rows, of all or of a range, that are not marked as done; None without mark columns."""
        return None if self.unmarked is None else self._count(sa.and_(self.unmarked, self.eligible), id_range)

    def counts(self, ranges: Sequence[IdRange], *, at_most: int) -> list[int]:
        """The number of eligible rows of each range; of one that holds more than `at_most`, `at_most`."""
        counts: list[int] = []
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            for chunk in chunks(ranges, _CHUNK_OF_RANGES):
                parts = []
                for position, id_range in enumerate(chunk):
                    within = self.id.between(id_range.first_id, id_range.last_id)
                    rows = sa.select(self.id).where(within, self.eligible).limit(at_most).subquery()
                    number = sa.func.count(rows.c[0]).label("number")
                    parts.append(sa.select(sa.literal(position).label("position"), number))
                counted = {row.position: int(row.number) for row in connection.execute(sa.union_all(*parts))}
                counts += (counted[position] for position in range(len(chunk)))
        return counts

    def batch_end(
        self, after_id: int | None, batch_size: int, *, up_to_id: int | None = None
    ) -> tuple[int, int, bool] | None:
        """The ids of the first and the last record of the batch after an id, and whether it is a full batch."""
        query = sa.select(self.id).where(self.eligible).order_by(self.id).limit(batch_size)
        if after_id is not None:
            query = query.where(self.id > after_id)
        if up_to_id is not None:
            query = query.where(self.id <= up_to_id)
        batch = query.subquery()
        first, last, number = self._one(sa.select(sa.func.min(batch.c[0]), sa.func.max(batch.c[0]), sa.func.count()))
        return None if first is None else (int(first), int(last), number == batch_size)

    def reach(self, first_id: int, last_id: int, most: int) -> int:
        """The last id up to which the eligible rows from `first_id` on are no more than `most`; at most `last_id`."""
        rows = sa.select(self.id).where(self.eligible, self.id.between(first_id, last_id)).order_by(self.id)
        found = self._first(rows.offset(most - 1))
        return last_id if found is None else found

    def mark(self, connection: sa.Connection, versions: Mapping[int, str], *, step: Step) -> dict[int, tuple[str, str]]:
        """Set the mark of a step on rows with these versions, unless a row's version changed since it was read.

        Returns:
            The version of each marked row, before and after: a trigger may have stamped the update.
        """
        column = self._column_of(step)
        if column is None:
            return {key: (version, version) for key, version in versions.items()}
        return self._write_marks(connection, {column.name: True}, sorted(versions), versions)

    def unmark(self, connection: sa.Connection, record_ids: Collection[int]) -> dict[int, tuple[str, str]]:
        """Clear the last mark of these rows: their points are not there, their frames may be; returns as `mark`."""
        if not self._marks:
            return {}
        return self._write_marks(connection, {self._marks[-1].name: False}, sorted(record_ids), None)

    def unmark_others(self, connection: sa.Connection, versions: Mapping[int, str]) -> set[int]:
        """Clear the last mark of rows that have another version than this one; returns them."""
        now = self._read_versions(connection, sorted(versions))
        others = {key: version for key, version in now.items() if version != versions[key]}
        return set(self._write_marks(connection, {self._marks[-1].name: False}, sorted(others), others))

    def _write_marks(
        self,
        connection: sa.Connection,
        marks: Mapping[str, bool],
        record_ids: Sequence[int],
        versions: Mapping[int, str] | None,
    ) -> dict[int, tuple[str, str]]:
        """Write marks in ascending order of ids, of rows in these versions; their versions before and after."""
        before = self._read_versions(connection, record_ids)
        ids = [key for key in before if versions is None or before[key] == versions[key]]
        statement = sa.update(self.table).values(marks)
        if self._version is not None and versions is not None and not self._stays_as_read:
            one = [statement.where(self.id == key, self._version == versions[key]) for key in ids]
            ids = [key for key, update in zip(ids, one, strict=True) if connection.execute(update).rowcount]
        else:
            for chunk in chunks(ids):
                connection.execute(statement.where(self._in_order(self._lock_key.in_(chunk))))
        self._see_marked(connection, marks, ids)
        after = before if self._version is None else self._read_versions(connection, ids)
        return {key: (before[key], after[key]) for key in ids if key in after}

    def _see_marked(self, connection: sa.Connection, marks: Mapping[str, bool], record_ids: Sequence[int]) -> None:
        """See that rows have the marks that were written: a policy, a rule or a trigger may have kept them back.

        The number of rows that the database says it changed is no proof: a trigger on a view may count and write none.

        Raises:
            MarksRefusedError: A row that is there has not.
        """
        for name, mark in marks.items():
            is_otherwise = self.table.c[name].op("IS NOT", is_comparison=True)(sa.true() if mark else sa.false())
            query = sa.select(self.id).where(is_otherwise).order_by(self.id)
            for chunk in chunks(record_ids):
                refused = [int(key) for key in connection.execute(query.where(self.id.in_(chunk))).scalars()]
                if refused:
                    raise MarksRefusedError(self.name, refused, name)

    def rehearse(self, record_id: int) -> None:
        """Mark a row and take it back at once: whether marks can be set is seen before any work is done for them.

        Raises:
            MarksRefusedError: The database takes the UPDATE and changes nothing.
            RightsError: This user may not.
        """
        if not self._marks:
            return
        marks = {column.name: True for column in self._marks}
        with writing(self._engine, what=f"mark rows of {self.name!r}") as connection:
            self._write_marks(connection, marks, [record_id], None)
            connection.rollback()

    def _read_versions(self, connection: sa.Connection, record_ids: Sequence[int]) -> dict[int, str]:
        """The versions of these rows, which are locked, in ascending order, where they can be."""
        if self._version is None:
            return dict.fromkeys(record_ids, "")
        query = sa.select(self.id, self._version).order_by(self.id)
        if self._locks:
            query = query.with_for_update(key_share=True)
        return {
            int(key): storable(found)
            for chunk in chunks(record_ids)
            for key, found in fetch_all(connection, query.where(self.id.in_(chunk)))
        }

    def clear_marks(self, connection: sa.Connection, after_id: int) -> None:
        """Clear the marks of every row above an id."""
        if not self._marks:
            return
        marks = {column.name: False for column in self._marks}
        above = self._in_order(self._lock_key > after_id)
        if connection.execute(sa.update(self.table).where(above).values(marks)).rowcount:
            return
        for column in self._marks:  # no row was changed: either there is none, or it was not to be
            query = sa.select(self.id).where(self.id > after_id, column.is_(sa.true())).limit(1)
            if (refused := connection.execute(query).scalar()) is not None:
                raise MarksRefusedError(self.name, [int(refused)], column.name)

    def _in_order(self, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        """A condition on `_lock_key` for an update, which then locks rows in ascending order of ids where it can."""
        if not self._locks:
            return condition
        rows = sa.select(self._lock_key).where(condition).order_by(self._lock_key)
        return self.id.in_(rows.with_for_update(key_share=True))

    def _first(self, ids: sa.Select[int]) -> int | None:
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            return connection.execute(ids.limit(1)).scalar_one_or_none()

    def _one(self, query: sa.Select[*tuple[Any, ...]]) -> sa.Row[*tuple[Any, ...]]:
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            return connection.execute(query).one()

    def _count(self, condition: sa.ColumnElement[bool], id_range: IdRange | None) -> int:
        query = sa.select(sa.func.count()).select_from(self.table).where(condition)
        if id_range is not None:
            query = query.where(self.id.between(id_range.first_id, id_range.last_id))
        return int(self._one(query)[0])
