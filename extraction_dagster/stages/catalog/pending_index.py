"""The partial index over the rows that are not done: finding them costs the same in a table of any size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex, DropIndex

from extraction_dagster.errors.catalog import SourceUnreachableError
from extraction_dagster.stages.catalog.database import reading, writing

if TYPE_CHECKING:
    from extraction_dagster.stages.catalog.source_table import SourceTable


@dataclass(frozen=True, slots=True)
class PendingIndex:
    """What became of the index, and the statement that makes it."""

    state: Literal["made", "there", "refused", "not needed"]
    sql: str


def pending_index(source: SourceTable) -> sa.Index | None:
    """The index that a table needs; None for a table without mark columns."""
    if source.unmarked is None:
        return None
    name = f"extraction_pending_{source.table.name}"[:63]
    table = source.table.to_metadata(sa.MetaData())  # an index belongs to a table; the reflected one stays as it is
    return sa.Index(name, table.c[source.id.name], postgresql_where=source.unmarked, sqlite_where=source.unmarked)


def make_pending_index(source: SourceTable, engine: sa.Engine) -> PendingIndex:
    """Create the index unless it is there; PostgreSQL builds it without blocking writers.

    A build that was cut off leaves an index there that no query uses: it is made anew.

    Raises:
        SourceUnreachableError: The database can't be read.
    """
    index = pending_index(source)
    if index is None:
        return PendingIndex("not needed", "")
    sql = " ".join(str(CreateIndex(index).compile(dialect=engine.dialect)).split())
    with reading(engine, what=f"read source table {source.name!r}") as connection:
        known = sa.inspect(connection).get_indexes(source.table.name, source.table.schema)
        is_there = any(item["name"] == index.name for item in known)
        is_left_over = is_there and _is_left_over(connection, index)
    if is_there and not is_left_over:
        return PendingIndex("there", sql)
    if engine.dialect.name == "postgresql":
        sql = sql.replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1)
    try:
        if engine.dialect.name == "postgresql":  # not inside a transaction
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                if is_left_over:
                    connection.execute(DropIndex(index, if_exists=True))
                connection.exec_driver_sql(sql)
        else:
            with writing(engine, what=f"index source table {source.name!r}") as connection:
                connection.exec_driver_sql(sql)
    except (sa.exc.ProgrammingError, sa.exc.OperationalError, SourceUnreachableError):
        return PendingIndex("refused", sql)
    return PendingIndex("made", sql)


def _is_left_over(connection: sa.Connection, index: sa.Index) -> bool:
    """Whether PostgreSQL has marked the index as invalid, and nobody is building it at this moment."""
    if connection.dialect.name != "postgresql" or index.table is None:
        return False
    quote = connection.dialect.identifier_preparer.quote
    name = ".".join(quote(part) for part in (index.table.schema, index.name) if part)
    statement = sa.text(
        "SELECT NOT indisvalid AND NOT EXISTS"
        " (SELECT 1 FROM pg_stat_progress_create_index AS build WHERE build.index_relid = indexrelid)"
        " FROM pg_index WHERE indexrelid = to_regclass(:name)"
    )
    return bool(connection.execute(statement, {"name": name}).scalar())
