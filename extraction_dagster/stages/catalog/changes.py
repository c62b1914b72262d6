"""Rows that are done and were changed since, found by their versions: the newest ones first of all.

A version column that grows (a time, a number) and leads an index shows what changed lately at its end, whatever the
table's size. It is read in pages, in the order of versions; rows of one version stay together, unless they alone fill a
page: then each goes on after an id.

    version   10:00:07   10:00:09   10:00:09 │ 10:00:12   10:00:12   10:00:12 …
    page      ───────────────────────────────►           (four rows: the last version would be torn apart)
    place     after 10:00:09

Versions are never read as Python's times, which have fewer of them than databases: PostgreSQL's pass as text, SQLite's
as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex

from extraction_dagster.stages.catalog.database import chunks, fetch_all, reading, storable
from extraction_dagster.stages.catalog.pending import is_other_version
from extraction_dagster.stages.catalog.state_tables import LEDGER_TABLE

if TYPE_CHECKING:
    from extraction_dagster.stages.catalog.pending import Rows
    from extraction_dagster.stages.catalog.source_table import SourceTable


class _Stored(sa.types.UserDefinedType[Any]):
    """A value as SQLite has it, which is not what its column is declared as."""

    cache_ok = True


Version = str | int | float
_MIN_ID = -(2**63)
_LONGEST = 1000  # characters of a version that is remembered
_NUMBER_OF_NEWEST = 10_000  # rows that are looked at once more where versions are no times
# Of epochs in seconds, milliseconds, microseconds and nanoseconds, between 2001 and 2286.
_EPOCHS = [(10 ** (9 + power), 10**power) for power in (9, 6, 3, 0)]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a look in the order of versions goes on.

    Attributes:
        version: Rows of later versions are still to be looked at.
        record_id: With an id, rows of this version above that id are too.
    """

    version: Version
    record_id: int | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows in the order of their versions.

    Attributes:
        condition: Which they are.
        place: Where the next page begins.
        is_last: Whether no more rows followed when it was read.
        is_past: Whether all of their versions are of now or earlier.
    """

    condition: sa.ColumnElement[bool]
    place: Place
    is_last: bool
    is_past: bool


@dataclass(frozen=True, slots=True)
class Growth:
    """Whether the version column says by its order which rows have changed lately.

    Attributes:
        kind: Of its values; None where it does not.
        index_name: The index that it leads; None where an operator says that it grows.
        is_sure: Whether the order is relied upon: numbers may count for each row by itself.
        told: For people.
        sql: The index that would help; None for none.
    """

    kind: Literal["time", "number", "text"] | None
    index_name: str | None
    is_sure: bool
    told: str
    sql: str | None = None


def growth_of(source: SourceTable, engine: sa.Engine, setting: Literal["auto", "on", "off"]) -> Growth:
    """Judge by type and indexes, as they were reflected; the setting overrides."""
    column = source.version_column
    if column is None:
        return _unusable("there is no version column: a changed file is not noticed (EXTRACTION_SOURCE_VERSION_COLUMN)")
    kind: Literal["time", "number", "text"] = "text"
    if isinstance(column.type, sa.DateTime | sa.Date):
        kind = "time"
    elif isinstance(column.type, sa.Integer):
        kind = "number"
    if setting == "off":
        return _unusable(f"rows are compared with the ledger one after the other, {column.name} or not (set so)")
    if setting == "on":
        return Growth(kind, None, is_sure=True, told=f"a changed {column.name} is found at once (set so)")
    if kind == "text":
        why = f"{column.name} is of type {column.type}, which is not taken to grow"
        return _unusable(f"{why}: a changed row is found when its turn comes; if it grows, set {_SETTING}=on")
    index = _index_led_by(column, source.table)
    if index is None or engine.dialect.name not in {"postgresql", "sqlite"}:
        why = f"no index begins with {column.name}: a changed row is found when its turn comes"
        sql = None if source.kind not in {"table", "partitioned table"} else _index_sql(source, column, engine)
        return Growth(None, None, is_sure=False, told=f"{why}; this index shows it at once:" if sql else why, sql=sql)
    told = f"a changed {column.name} is found at once, through the index {index}"
    if kind == "number":
        told += f"; 'extraction run' still compares every row, since numbers may not grow (if they do, {_SETTING}=on)"
    return Growth(kind, index, is_sure=kind == "time", told=told)


_SETTING = "EXTRACTION_SOURCE_VERSION_GROWS"


def _unusable(told: str) -> Growth:
    return Growth(None, None, is_sure=False, told=told)


def _index_led_by(column: sa.Column[Any], table: sa.Table) -> str | None:
    """The name of an index over all rows that begins with a column, and can be read in its order."""
    for index in sorted(table.indexes, key=lambda index: str(index.name)):
        first = next(iter(index.expressions), None)
        options = [dict(index.dialect_options[name]) for name in ("postgresql", "sqlite")]
        is_partial = any(option.get("where") is not None for option in options)
        is_tree = not options[0].get("using") or options[0]["using"] == "btree"
        if getattr(first, "element", first) is column and is_tree and not is_partial:
            return str(index.name)
    keys = [item for item in table.constraints if isinstance(item, sa.PrimaryKeyConstraint | sa.UniqueConstraint)]
    return next((str(key.name or "its key") for key in keys if next(iter(key.columns), None) is column), None)


def _index_sql(source: SourceTable, column: sa.Column[Any], engine: sa.Engine) -> str:
    """The statement that makes the index; on PostgreSQL without blocking writers."""
    table = source.table.to_metadata(sa.MetaData())  # an index belongs to a table; the reflected one stays as it is
    index = sa.Index(f"extraction_versions_{table.name}"[:63], table.c[column.name], table.c[source.id.name])
    sql = " ".join(str(CreateIndex(index).compile(dialect=engine.dialect)).split())
    if engine.dialect.name != "postgresql" or source.kind != "table":  # of partitions PostgreSQL can't do it at once
        return sql
    return sql.replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1)


class Versions:
    """The rows of a source in the order of their versions, as one connection sees them.

    Args:
        rows: The source table and the ledger.
        connection: To the source.
        growth: What is known of the order.
        now: Later versions are of the future: a clock was wrong.
    """

    def __init__(self, rows: Rows, connection: sa.Connection, growth: Growth, *, now: datetime) -> None:
        assert rows.source.version_column is not None  # noqa: S101 - for mypy: it grows
        self._column, self._source, self._connection = rows.source.version_column, rows.source, connection
        self._kind, self._index_name, self._moment = growth.kind, growth.index_name, now
        self._as_text = connection.dialect.name != "sqlite"
        self._now: Version | None = None

    def is_there(self) -> bool:
        """Whether the index can be used: PostgreSQL leaves one that queries pass over while it is built."""
        if self._index_name is None or self._connection.dialect.name != "postgresql":
            return True
        quote = self._connection.dialect.identifier_preparer.quote
        name = ".".join(quote(part) for part in (self._source.table.schema, self._index_name) if part)
        statement = sa.text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")
        return self._connection.execute(statement, {"name": name}).scalar() is not False

    def has_nulls(self) -> bool:
        """Whether a row has no version: one that lost it is at no end of the order."""
        if not self._column.nullable:
            return False
        query = sa.select(self._source.id).where(self._column.is_(None)).limit(1)
        return self._connection.execute(query).first() is not None

    def newest(self, *, of_the_past: bool = False) -> Version | None:
        """The greatest version, or the greatest of now or earlier; None when there is none.

        Raises:
            ValueError: It can't be remembered.
        """
        query = sa.select(self._read(sa.func.max(self._column)))
        if of_the_past and (now := self._present()) is not None:
            query = query.where(self._column <= self._write(now))
        return self._value(query)

    def below_newest(self, number: int) -> Version | None:
        """The version so many rows below the greatest of now or earlier; None when there are fewer."""
        query = sa.select(self._read(self._column)).where(self._column.is_not(None))
        if (now := self._present()) is not None:
            query = query.where(self._column <= self._write(now))
        return self._value(query.order_by(self._column.desc()).offset(number).limit(1))

    def once_more_from(self, place: Place, seconds: float) -> Place | None:
        """Where the look for late commits begins: so many seconds before a place, or some rows; None for the start."""
        earlier = _earlier(place.version, seconds, is_date=isinstance(self._column.type, sa.Date))
        if earlier is not None and self._kind == "time":
            return Place(earlier, _MIN_ID)
        query = sa.select(self._read(self._column)).where(self._column <= self._write(place.version))
        found = self._value(query.order_by(self._column.desc()).offset(_NUMBER_OF_NEWEST).limit(1))
        return None if found is None else Place(found, _MIN_ID)

    def is_past(self, place: Place) -> bool:
        """Whether the present has come to a place."""
        now = _present(place.version, self._moment, self._kind)
        if now is None:
            return True
        if not (self._as_text and self._kind == "time"):
            return float(place.version) <= float(now) if isinstance(now, int) else str(place.version) <= str(now)
        return bool(self._connection.scalar(sa.select(self._write(place.version) <= self._write(now))))

    def page(self, after: Place | None, size: int, *, up_to: Version | None = None) -> Page | None:
        """The rows after a place, at most `size` of them; None when there are none.

        Raises:
            ValueError: A version can't be remembered.
        """
        column, source = self._column, self._source
        if after is not None and after.record_id is not None:
            group = sa.and_(column == self._write(after.version), source.id > after.record_id)
            ids = sa.select(source.id.label("id")).where(group).order_by(source.id).limit(size).subquery()
            number, last = self._connection.execute(sa.select(sa.func.count(), sa.func.max(ids.c.id))).one()
            if number:
                place = Place(after.version, int(last) if number == size else None)
                return Page(sa.and_(group, source.id <= last), place, is_last=False, is_past=self.is_past(place))
        beyond = column.is_not(None) if after is None else column > self._write(after.version)
        if up_to is not None:
            beyond = sa.and_(beyond, column <= self._write(up_to))
        rows = sa.select(column.label("version")).where(beyond).order_by(column).limit(size).subquery()
        query = sa.select(sa.func.count(), self._read(sa.func.max(rows.c.version)))
        number, end = self._connection.execute(query).one()
        if not number:
            return None
        if (end := _checked(end)) is None:
            return None
        if number == size:  # others of the last version may follow
            before = sa.select(self._read(sa.func.max(column))).where(beyond, column < self._write(end))
            if (whole := self._value(before)) is None:
                return self.page(Place(end, _MIN_ID), size, up_to=up_to)
            end = whole
        condition = sa.and_(beyond, column <= self._write(end))
        return Page(condition, Place(end), is_last=number < size, is_past=self.is_past(Place(end)))

    def _value(self, query: sa.Select[Any]) -> Version | None:
        return _checked(self._connection.execute(query).scalar())

    def _present(self) -> Version | None:
        """The present, as the column has it; None where nobody can say."""
        if self._now is None:
            newest = self._value(sa.select(self._read(sa.func.max(self._column))))
            self._now = None if newest is None else _present(newest, self._moment, self._kind)
        return self._now

    def _read(self, value: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        return sa.cast(value, sa.Text) if self._as_text else sa.type_coerce(value, _Stored())

    def _write(self, version: Version) -> sa.ColumnElement[Any]:
        if self._as_text:
            return sa.cast(sa.literal(str(version), sa.Text), self._column.type)
        return sa.bindparam(None, version, type_=_Stored())


def _checked(version: Any) -> Version | None:  # noqa: ANN401 - what the database has
    if version is None or isinstance(version, int | float):
        return version
    if isinstance(version, str) and len(version) <= _LONGEST and storable(version) == version:
        return version
    raise ValueError(f"a version of type {type(version).__name__} can't be remembered")


def _earlier(version: Version, seconds: float, *, is_date: bool) -> str | None:
    """The text of a time some seconds earlier; None where it can't be said."""
    delta = timedelta(seconds=seconds) if not is_date else max(timedelta(seconds=seconds), timedelta(days=1))
    try:
        moment = datetime.fromisoformat(str(version)) - delta
    except (ValueError, OverflowError):
        return None
    text = str(version)
    if is_date:
        return moment.date().isoformat()
    return moment.isoformat(sep=text[10] if len(text) > 10 else " ")  # noqa: PLR2004 - behind the date


def _present(newest: Version, now: datetime, kind: str | None) -> Version | None:
    """The present in the form of other versions."""
    if isinstance(newest, str) and not (newest.isdecimal() and kind == "number"):
        if kind != "time" and _earlier(newest, 0, is_date=False) is None:
            return None
        return now.astimezone(UTC).replace(tzinfo=None).isoformat(sep="T" if newest[10:11] == "T" else " ")
    number = float(newest)
    scale = next((scale for least, scale in _EPOCHS if least <= number < 10 * least), None)
    return None if scale is None else int(now.timestamp() * scale)


def changed(
    rows: Rows, connection: sa.Connection, condition: sa.ColumnElement[bool], *, above_id: int | None
) -> list[int]:
    """Rows that are marked as done, eligible or not, in another version than the ledger has.

    Where both tables are in one database, that compares them.
    """
    source, entries = rows.source, LEDGER_TABLE.c
    is_marked = sa.not_(source.unmarked) if source.unmarked is not None else sa.true()
    conditions = [condition, is_marked] + ([] if above_id is None else [source.id > above_id])
    if rows.one_database:
        both = sa.join(source.table, LEDGER_TABLE, entries.record_id == source.id)
        query = sa.select(source.id).select_from(both).where(*conditions, is_other_version(source, connection))
        return sorted(int(key) for key in connection.execute(query).scalars())
    found = fetch_all(connection, sa.select(source.id, source.version_text).where(*conditions))
    versions = {int(key): storable(version) for key, version in found}
    query = sa.select(entries.record_id, entries.source_version)
    with reading(rows.ledger.engine, what="read the ledger") as ledger:
        known = dict[int, str]()
        for chunk in chunks(sorted(versions)):
            known.update(
                (int(key), str(text)) for key, text in fetch_all(ledger, query.where(entries.record_id.in_(chunk)))
            )
    return sorted(key for key, version in known.items() if version != versions[key])
