"""The source table: which rows are eligible, which are pending by their marks, and where each row's file lies."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from extraction_dagster.addresses import address_hash
from extraction_dagster.errors.catalog import UnreadableRowError
from extraction_dagster.records import IdRange, VideoRow, fingerprint
from extraction_dagster.stages.catalog.database import chunks, describe, is_text, parse_url, reading, storable
from extraction_dagster.stages.catalog.source_columns import SourceColumns, build_predicate

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from extraction_dagster.settings import Settings

Step = Literal["extracted", "embedded"]
_CHUNK_OF_RANGES = 100  # parts of one query: SQLite takes no more than 500, and few keep its planner quick
_MAX_ID = 2**63 - 1
_VERSION_LABEL = "extraction_version"
_PAGE = 1000
_DEEPEST = 32  # levels of JSON; each takes three of the 100 that a message to Qdrant may have
# What drivers and types raise for a value that they can't read; a database that fails raises something else.
_UNREADABLE = (ValueError, TypeError, ArithmeticError, LookupError, RecursionError, sa.exc.DataError)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row with the source's own version as its content_version; a mark is None where there is no such column.

    Attributes:
        video: Where a value can't be read, without it.
        extracted: The first mark.
        embedded: The last mark.
        problem: What is wrong with a value that can't be read or used; None for nothing. Such a row fails alone.
    """

    video: VideoRow
    extracted: bool | None
    embedded: bool | None
    problem: UnreadableRowError | None = None

    @property
    def marked_done(self) -> bool | None:
        """Whether every mark column says done; None when the table has none."""
        marks = [mark for mark in (self.extracted, self.embedded) if mark is not None]
        return all(marks) if marks else None


class SourceTable:
    """The configured table, reflected and checked.

    Raises:
        SourceTableError: The table or a column is missing, or the id column can't identify records.
        SourceUnreachableError: The database can't be reached or read.
        PredicateError: The predicate is no condition over the table's columns.
    """

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        columns = SourceColumns(engine, settings)
        self.name, self.table = columns.name, columns.table
        self.id = columns.find_id()
        self._uri_columns = columns.find_uri()
        self._platform = columns.find_optional(settings.source_platform_column, "EXTRACTION_SOURCE_PLATFORM_COLUMN")
        self._code = columns.find_optional(settings.source_code_column, "EXTRACTION_SOURCE_CODE_COLUMN")
        self._payload = [
            columns.find(name, "EXTRACTION_SOURCE_PAYLOAD_COLUMNS") for name in settings.source_payload_columns
        ]
        version = columns.find_optional(settings.source_version_column, "EXTRACTION_SOURCE_VERSION_COLUMN")
        # As text, made by the database: one form for reading and for comparing.
        self._version = None if version is None else sa.func.coalesce(sa.cast(version, sa.Text), "")
        self._extracted = columns.find_mark(settings.source_extracted_column, "EXTRACTION_SOURCE_EXTRACTED_COLUMN")
        self._embedded = columns.find_mark(settings.source_embedded_column, "EXTRACTION_SOURCE_EMBEDDED_COLUMN")
        self._marks = [column for column in (self._extracted, self._embedded) if column is not None]
        # Rows of a table can be locked by PostgreSQL; those of a view may be of many tables, or of none.
        self._locks = engine.dialect.name == "postgresql" and not columns.is_view
        self._stays_as_read = self._locks or engine.dialect.name == "sqlite"  # within the transaction that writes
        optional = [column for column in (self._platform, self._code) if column is not None]
        self._checked = {column.name: column for column in (*self._uri_columns, *optional, *self._payload)}.values()
        self._first_root = str(settings.resolved_allowed_roots[0])
        self.eligible: sa.ColumnElement[bool] = (
            build_predicate(settings.source_predicate, self.table) if settings.source_predicate else sa.true()
        )

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
        version = sa.literal("") if self._version is None else self._version
        query = sa.select(self.id, version.label("version"), done.label("done")).where(self.eligible)
        return (query if only is None else query.where(only)).order_by(self.id)

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
    def identity(self) -> str:
        """16 hex digits that tell this source from another: the database without its credentials, table, id column."""
        url = parse_url(self._settings.resolved_source_url, setting="EXTRACTION_SOURCE_URL")
        return fingerprint(url=describe(url), table=self.name, id_column=self.id.name)

    @property
    def has_marks(self) -> bool:
        """Whether the table says by itself which rows are done."""
        return bool(self._marks)

    def has_mark(self, step: Step) -> bool:
        """Whether there is a column for the mark of a step."""
        return self._column_of(step) is not None

    def _column_of(self, step: Step) -> sa.Column[Any] | None:
        return self._extracted if step == "extracted" else self._embedded

    def rows(self, id_range: IdRange) -> Iterator[SourceRow]:
        """Every eligible row of the range, in ascending order of ids; one that can't be read says so."""
        first = id_range.first_id
        while True:
            query = self._select().where(self.id.between(first, id_range.last_id)).order_by(self.id)
            try:
                with reading(self._engine, what=f"read source table {self.name!r}") as connection:
                    for row in connection.execution_options(yield_per=_PAGE).execute(query).mappings():
                        found = self._source_row(row)
                        yield found
                        first = found.video.record_id + 1
            except _UNREADABLE as error:
                _log.debug("Reading rows of %s from id %d one by one: %s", self.name, first, type(error).__name__)
            else:
                return
            page = self._ids(sa.select(self.id).where(self.eligible, self.id.between(first, id_range.last_id)))
            for found in self._halved(page):
                yield found
                first = found.video.record_id + 1
            if len(page) < _PAGE or page[-1] >= id_range.last_id:
                return
            first = page[-1] + 1

    def rows_of(self, record_ids: Iterable[int]) -> Iterator[SourceRow]:
        """The eligible ones of these rows."""
        for chunk in chunks(list(record_ids)):
            yield from self._halved(chunk)

    def next_rows(self, after_id: int | None, most: int, *, up_to_id: int | None = None) -> list[SourceRow]:
        """The next eligible rows above an id, at most `most`."""
        first = -_MAX_ID - 1 if after_id is None else after_id + 1
        last = _MAX_ID if up_to_id is None else up_to_id
        if first > last:
            return []
        return list(itertools.islice(self.rows(IdRange(first, last)), most))

    def addresses_of(self, record_ids: Sequence[int]) -> dict[int, str]:
        """The addresses of those of these rows that have one which can be read."""
        query = sa.select(*{column.name: column for column in (self.id, *self._uri_columns)}.values())
        found: dict[int, str] = {}
        for chunk in chunks(record_ids):
            try:
                with reading(self._engine, what=f"read source table {self.name!r}") as connection:
                    for row in connection.execute(query.where(self.id.in_(chunk))).mappings():
                        found[int(row[self.id.name])] = address_hash(self._uri(row), self._first_root)
            except _UNREADABLE:
                found |= {row.video.record_id: row.video.address for row in self._halved(chunk)}
        return found

    def _ids(self, query: sa.Select[int]) -> list[int]:
        """The ids of the first page of a query of ids."""
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            return [int(key) for key in connection.execute(query.order_by(self.id).limit(_PAGE)).scalars()]

    def _halved(self, record_ids: Sequence[int]) -> Iterator[SourceRow]:
        """The eligible ones of these rows; where one of them can't be read, each half by itself, down to that row."""
        if not record_ids:
            return
        query = self._select().where(self.id.in_(record_ids)).order_by(self.id)
        try:
            with reading(self._engine, what=f"read source table {self.name!r}") as connection:
                found = [self._source_row(row) for row in connection.execute(query).mappings()]
        except _UNREADABLE:
            if len(record_ids) == 1:
                yield from self._by_columns(record_ids[0])
                return
            middle = len(record_ids) // 2
            yield from self._halved(record_ids[:middle])
            yield from self._halved(record_ids[middle:])
            return
        yield from found

    def _by_columns(self, record_id: int) -> Iterator[SourceRow]:
        """A row that can't be read as a whole: without the values that can't be read, and with what is wrong."""
        values: dict[str, Any] = {}
        problem: UnreadableRowError | None = None
        for column in self._select().selected_columns:
            query = sa.select(column).where(self.id == record_id, self.eligible)
            try:
                with reading(self._engine, what=f"read source table {self.name!r}") as connection:
                    found = connection.execute(query).first()
            except _UNREADABLE as error:
                values[column.name] = None
                problem = problem or self._unreadable(record_id, column, f"{type(error).__name__}: {error}")
                continue
            if found is None:  # it is gone since
                return
            values[column.name] = found[0]
        values[_VERSION_LABEL] = values[_VERSION_LABEL] or ""
        try:
            row = self._source_row(values)
        except _UNREADABLE as error:  # each value can be read, and not be used
            why = f"{type(error).__name__}: {error}"
            blank = values | {column.name: None for column in self._uri_columns}
            row = self._source_row(blank)
            problem = problem or self._unreadable(record_id, self._uri_columns[0], why)
        yield replace(row, problem=problem or row.problem)

    def _unreadable(self, record_id: int, column: sa.ColumnElement[Any], why: str) -> UnreadableRowError:
        name = column.name
        label = (self._settings.source_version_column or name) if name == _VERSION_LABEL else name
        kind = "text" if name == _VERSION_LABEL else str(column.type)
        return UnreadableRowError(self.name, record_id, label, why, expected=kind)

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
        """The number of eligible rows among the next `most` rows above an id, so that counting never takes long."""
        rows = sa.select(sa.case((self.eligible, 1), else_=0)).select_from(self.table).order_by(self.id).limit(most)
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
                connection.execute(statement.where(self.id.in_(chunk)))
        after = before if self._version is None else self._read_versions(connection, ids)
        return {key: (before[key], after[key]) for key in ids if key in after}

    def _read_versions(self, connection: sa.Connection, record_ids: Sequence[int]) -> dict[int, str]:
        """The versions of these rows, which are locked, in ascending order, where they can be."""
        if self._version is None and not self._locks:
            return dict.fromkeys(record_ids, "")
        version = sa.literal("") if self._version is None else self._version
        query = sa.select(self.id, version).order_by(self.id)
        if self._locks:
            query = query.with_for_update(key_share=True)
        return {
            int(key): storable(found)
            for chunk in chunks(record_ids)
            for key, found in connection.execute(query.where(self.id.in_(chunk)))
        }

    def clear_marks(self, connection: sa.Connection, after_id: int) -> None:
        """Clear the marks of every row above an id."""
        if not self._marks:
            return
        marks = {column.name: False for column in self._marks}
        above: sa.ColumnElement[bool] = self.id > after_id
        if self._locks:
            inner = sa.alias(self.table)
            key = inner.c[self.id.name]
            above = self.id.in_(sa.select(key).where(key > after_id).order_by(key).with_for_update(key_share=True))
        connection.execute(sa.update(self.table).where(above).values(marks))

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

    def _select(self) -> sa.Select[*tuple[Any, ...]]:
        """What a `SourceRow` needs of the eligible rows."""
        optional = (self._platform, self._code, self._extracted, self._embedded)
        columns = [self.id, *self._uri_columns, *self._payload, *(column for column in optional if column is not None)]
        version = sa.literal("") if self._version is None else self._version
        once = {column.name: column for column in columns}
        return sa.select(*once.values(), version.label(_VERSION_LABEL)).where(self.eligible)

    def _source_row(self, row: Mapping[str, Any]) -> SourceRow:
        uri = self._uri(row)
        video = VideoRow(
            record_id=int(row[self.id.name]),
            uri=uri,
            platform=_text(row[self._platform.name]) if self._platform is not None else None,
            code=_text(row[self._code.name]) if self._code is not None else None,
            content_version=storable(row[_VERSION_LABEL]),
            payload={column.name: row[column.name] for column in self._payload},
            address=address_hash(uri, self._first_root),
        )
        return SourceRow(
            video=video,
            extracted=None if self._extracted is None else bool(row[self._extracted.name]),
            embedded=None if self._embedded is None else bool(row[self._embedded.name]),
            problem=self._problem_of(video.record_id, row),
        )

    def _problem_of(self, record_id: int, row: Mapping[str, Any]) -> UnreadableRowError | None:
        """What is wrong with a value that could be read and can't be used."""
        for column in self._checked:
            value = row[column.name]
            if value is None or (type(value) is str and value.isascii()) or type(value) is int:
                continue
            if not is_text(value):
                return self._unreadable(record_id, column, "it is no UTF-8")
            if isinstance(value, dict | list) and _is_deep(value):
                return self._unreadable(record_id, column, f"it is nested deeper than {_DEEPEST} levels")
            if isinstance(value, bytes | memoryview) and column not in self._payload:
                return self._unreadable(record_id, column, "it is binary")
        return None

    def _uri(self, row: Mapping[str, Any]) -> str:
        """Where the file lies; empty when a column that it needs is NULL (fetching then says so)."""
        values = {column.name: row[column.name] for column in self._uri_columns}
        if any(value is None for value in values.values()):
            return ""
        template = self._settings.source_uri_template
        return template.format_map(values) if template else str(next(iter(values.values())))


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _is_deep(value: object) -> bool:
    """Whether a value of JSON is nested deeper than what takes it further can follow."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            item
            for part in level
            for item in (part.values() if isinstance(part, dict) else part)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True
