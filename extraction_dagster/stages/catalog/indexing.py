"""Make the partial index that finds pending rows, whatever kind of table it is on, while others write to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex, DropIndex

from extraction_dagster.errors.catalog import SourceUnreachableError
from extraction_dagster.stages.catalog.database import reading, writing
from extraction_dagster.stages.catalog.pending import pending_index

if TYPE_CHECKING:
    from extraction_dagster.stages.catalog.source_table import SourceTable


@dataclass(frozen=True, slots=True)
class PendingIndex:
    """What became of the index, and the statement that makes it."""

    state: Literal["made", "there", "refused", "not needed"]
    sql: str


def make_pending_index(source: SourceTable, engine: sa.Engine) -> PendingIndex:
    """Create the index unless it is there; PostgreSQL builds it without blocking writers.

    A build that was cut off leaves an index that no query uses: it is replaced.

    Raises:
        SourceUnreachableError: The database can't be read.
    """
    index = pending_index(source)
    if index is None or source.kind not in {"table", "partitioned table"}:
        return PendingIndex("not needed", "")
    in_postgresql = engine.dialect.name == "postgresql"
    sql = " ".join(str(CreateIndex(index).compile(dialect=engine.dialect)).split())
    with reading(engine, what=f"read source table {source.name!r}") as connection:
        known = sa.inspect(connection).get_indexes(source.table.name, source.table.schema)
        is_there = any(item["name"] == index.name for item in known)
        is_left_over = is_there and _is_left_over(connection, index)
        steps = _without_blocking(connection, source, index, sql) if in_postgresql else [sql]
    if is_there and not is_left_over:
        return PendingIndex("there", sql)
    sql = "; ".join(steps)
    try:
        if in_postgresql:  # not inside a transaction
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                if is_left_over:
                    connection.execute(DropIndex(index, if_exists=True))
                for step in steps:
                    connection.exec_driver_sql(step)
        else:
            with writing(engine, what=f"index source table {source.name!r}") as connection:
                connection.exec_driver_sql(sql)
    except (sa.exc.DatabaseError, SourceUnreachableError):
        return PendingIndex("refused", sql)
    return PendingIndex("made", sql)


def _without_blocking(connection: sa.Connection, source: SourceTable, index: sa.Index, sql: str) -> list[str]:
    """The statements by which PostgreSQL makes the index while others write: of partitions, one after the other."""
    if source.kind == "table":
        return [sql.replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1)]
    quote, table = connection.dialect.identifier_preparer, source.table
    parts = connection.execute(
        sa.text(
            "SELECT inhrelid::regclass::text, relname, relkind::text FROM pg_inherits JOIN pg_class ON oid = inhrelid"
            " WHERE inhparent = to_regclass(:name) ORDER BY 1"
        ),
        {"name": quote.format_table(table)},
    ).all()
    if any(kind != "r" for _, _, kind in parts):  # partitions of partitions: PostgreSQL cascades, and writers wait
        return [sql]
    head, _, condition = sql.partition(f" ON {quote.format_table(table)} ")
    steps = [f"{head} ON ONLY {quote.format_table(table)} {condition}"]
    own = [part for part in (table.schema, index.name) if part]
    for part, name, _ in parts:
        of_part = [part for part in (table.schema, f"extraction_pending_{name}"[:63]) if part]
        steps.append(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {quote.quote(of_part[-1])} ON {part} {condition}")
        steps.append(
            f"ALTER INDEX {'.'.join(map(quote.quote, own))} ATTACH PARTITION {'.'.join(map(quote.quote, of_part))}"
        )
    return steps


def _is_left_over(connection: sa.Connection, index: sa.Index) -> bool:
    """Whether PostgreSQL has marked the index as invalid, and no build of it is running."""
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
