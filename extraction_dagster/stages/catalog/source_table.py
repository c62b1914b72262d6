"""The source table: which rows are eligible, which are pending by their marks, and where each row's file lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from extraction_dagster.records import IdRange, VideoRow, fingerprint
from extraction_dagster.stages.catalog.database import chunks, describe, parse_url, reading
from extraction_dagster.stages.catalog.source_columns import SourceColumns, build_predicate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from extraction_dagster.settings import Settings

Step = Literal["extracted", "embedded"]
_CHUNK_OF_RANGES = 100  # parts of one query: SQLite takes no more than 500, and few keep its planner quick
_MAX_ID = 2**63 - 1
_VERSION_LABEL = "extraction_version"


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row with the source's own version as its content_version; a mark is None where there is no such column."""

    video: VideoRow
    extracted: bool | None
    embedded: bool | None

    @property
    def marked_done(self) -> bool | None:
        """Whether every mark column says done; None when the table has none."""
        marks = [mark for mark in (self.extracted, self.embedded) if mark is not None]
        return all(marks) if marks else None


def source_identity(settings: Settings) -> str:
    """A source's identity from the settings alone; see `SourceTable.identity`.

    Raises:
        DatabaseUrlError: The source's URL is malformed.
    """
    url = parse_url(settings.resolved_source_url, setting="EXTRACTION_SOURCE_URL")
    table = ".".join(filter(None, (settings.source_schema, settings.source_table)))
    return fingerprint(url=describe(url), table=table, id_column=settings.source_id_column)


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
        return source_identity(self._settings)

    @property
    def has_marks(self) -> bool:
        """Whether the table says by itself which rows are done."""
        return bool(self._marks)

    def rows(self, id_range: IdRange) -> Iterator[SourceRow]:
        """Every eligible row of the range, in ascending order of ids."""
        query = self._select().where(self.id.between(id_range.first_id, id_range.last_id)).order_by(self.id)
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            for row in connection.execution_options(yield_per=1000).execute(query).mappings():
                yield self._source_row(row)

    def rows_of(self, record_ids: Iterable[int]) -> Iterator[SourceRow]:
        """The eligible ones of these rows."""
        query = self._select()
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            for chunk in chunks(list(record_ids)):
                for row in connection.execute(query.where(self.id.in_(chunk))).mappings():
                    yield self._source_row(row)

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

    def mark(self, connection: sa.Connection, versions: Mapping[int, str], *, step: Step) -> dict[int, str]:
        """Set the mark of a step on rows with these versions, unless a row's version changed since it was read.

        Returns:
            The version of each marked row as it is now: a trigger may have stamped the update.
        """
        column = self._extracted if step == "extracted" else self._embedded
        if column is None:
            return dict(versions)
        statement = sa.update(self.table).values({column.name: True})
        if self._version is None:
            for chunk in chunks(list(versions)):
                connection.execute(statement.where(self.id.in_(chunk)))
            return dict(versions)
        marked = [
            record_id
            for record_id, version in versions.items()
            if connection.execute(statement.where(self.id == record_id, self._version == version)).rowcount
        ]
        now: dict[int, str] = {}
        for chunk in chunks(marked):
            query = sa.select(self.id, self._version).where(self.id.in_(chunk))
            now.update({int(record_id): version for record_id, version in connection.execute(query)})
        return now

    def clear_marks(self, connection: sa.Connection, after_id: int) -> None:
        """Clear the marks of every row above an id."""
        if self._marks:
            marks = {column.name: False for column in self._marks}
            connection.execute(sa.update(self.table).where(self.id > after_id).values(marks))

    def unmark(self, connection: sa.Connection, record_ids: Sequence[int]) -> None:
        """Clear the last mark of these rows: their points are not there, their frames may be."""
        if not self._marks:
            return
        statement = sa.update(self.table).values({self._marks[-1].name: False})
        for chunk in chunks(record_ids):
            connection.execute(statement.where(self.id.in_(chunk)))

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

    def _source_row(self, row: sa.RowMapping) -> SourceRow:
        return SourceRow(
            video=VideoRow(
                record_id=int(row[self.id.name]),
                uri=self._uri(row),
                platform=_text(row[self._platform.name]) if self._platform is not None else None,
                code=_text(row[self._code.name]) if self._code is not None else None,
                content_version=row[_VERSION_LABEL],
                payload={column.name: row[column.name] for column in self._payload},
            ),
            extracted=None if self._extracted is None else bool(row[self._extracted.name]),
            embedded=None if self._embedded is None else bool(row[self._embedded.name]),
        )

    def _uri(self, row: sa.RowMapping) -> str:
        """Where the file lies; empty when a column that it needs is NULL (fetching then says so)."""
        values = {column.name: row[column.name] for column in self._uri_columns}
        if any(value is None for value in values.values()):
            return ""
        template = self._settings.source_uri_template
        return template.format_map(values) if template else str(next(iter(values.values())))


def _text(value: object) -> str | None:
    return None if value is None else str(value)
