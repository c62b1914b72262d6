"""What a database's user may do, asked before any work: PostgreSQL says it without trying.

The least rights are SELECT on the source table and UPDATE of its mark columns for who runs, and SELECT, INSERT, UPDATE
and DELETE on the state tables; once, CREATE on their schema. What is missing is told as the GRANT that gives it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from extraction_dagster.errors.catalog import RightsError
from extraction_dagster.stages.catalog.database import describe, make_engine, reading
from extraction_dagster.stages.catalog.identity import is_same_database
from extraction_dagster.stages.catalog.state_tables import METADATA

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extraction_dagster.settings import Settings

_WRITES = ("SELECT", "INSERT", "UPDATE", "DELETE")


def require_rights(settings: Settings) -> None:
    """See that the user may read the source table, mark its rows, and keep the state; only PostgreSQL is asked.

    Raises:
        RightsError: A right is missing; the message has the GRANT for each.
        SourceUnreachableError, DatabaseUrlError: What they say.
    """
    source = make_engine(settings.resolved_source_url, setting="EXTRACTION_SOURCE_URL")
    if source.dialect.name == "postgresql":
        _require(source, "use the source table", list(_missing_of_source(source, settings)))
    source.dispose()
    is_one = is_same_database(settings.resolved_state_url, settings.resolved_source_url)
    state = source if is_one else make_engine(settings.resolved_state_url, setting="EXTRACTION_STATE_URL")
    if state.dialect.name == "postgresql":
        _require(state, "keep the state tables", list(_missing_of_state(state, settings)))
    state.dispose()


def _require(engine: sa.Engine, what: str, missing: list[tuple[str, str]]) -> None:
    if missing:
        why = f"its user has no right to {', '.join(right for right, _ in missing)}"
        raise RightsError(what, describe(engine.url), why, grants=" ".join(grant for _, grant in missing))


def _missing_of_source(engine: sa.Engine, settings: Settings) -> Iterator[tuple[str, str]]:
    """What is missing, in words and as a GRANT; nothing where there is no such table, which others say."""
    quote = engine.dialect.identifier_preparer
    table = quote.format_table(sa.Table(settings.source_table, sa.MetaData(), schema=settings.source_schema))
    with reading(engine, what="ask for rights on the source table") as connection:
        schema = settings.source_schema
        if schema and _says(
            connection,
            "SELECT NOT has_schema_privilege(oid, 'USAGE') FROM pg_namespace WHERE nspname = :schema",
            schema=schema,
        ):
            yield f"use schema {schema}", f"GRANT USAGE ON SCHEMA {quote.quote(schema)} TO {_user(connection)};"
            return
        if not _says(connection, "SELECT to_regclass(:table) IS NOT NULL", table=table):
            return
        if not _says(
            connection,
            "SELECT has_table_privilege(:table, 'SELECT') OR has_any_column_privilege(:table, 'SELECT')",
            table=table,
        ):
            yield f"SELECT from {table}", f"GRANT SELECT ON {table} TO {_user(connection)};"
        if settings.source_read_only:
            return
        columns = (settings.source_extracted_column, settings.source_embedded_column)
        for column in dict.fromkeys(name for name in columns if name):
            is_there = (
                "SELECT count(*) > 0 FROM pg_attribute WHERE attrelid = to_regclass(:table) AND attname = :column"
            )
            may = "SELECT has_column_privilege(:table, :column, 'UPDATE')"
            if not _says(connection, is_there, table=table, column=column):
                continue
            if not _says(connection, may, table=table, column=column):
                grant = f"GRANT UPDATE ({quote.quote(column)}) ON {table} TO {_user(connection)};"
                yield f"UPDATE {column} of {table}", grant


def _missing_of_state(engine: sa.Engine, settings: Settings) -> Iterator[tuple[str, str]]:
    quote, schema = engine.dialect.identifier_preparer, settings.state_schema
    with reading(engine, what="ask for rights on the state tables") as connection:
        where = schema or str(connection.execute(sa.text("SELECT coalesce(current_schema(), 'public')")).scalar())
        there = set(sa.inspect(connection).get_table_names(where))
        own = [table.name for table in METADATA.sorted_tables]
        if not there.issuperset(own):
            is_made = _says(connection, "SELECT count(*) > 0 FROM pg_namespace WHERE nspname = :s", s=where)
            if not is_made and not _says(connection, "SELECT has_database_privilege(current_database(), 'CREATE')"):
                database = quote.quote(str(engine.url.database))
                yield f"create schema {where}", f"GRANT CREATE ON DATABASE {database} TO {_user(connection)};"
            if is_made and not _says(connection, "SELECT has_schema_privilege(:s, 'CREATE')", s=where):
                grant = f"GRANT CREATE, USAGE ON SCHEMA {quote.quote(where)} TO {_user(connection)};"
                yield f"create tables in schema {where}", grant
        for name in own:
            table = f"{quote.quote(where)}.{quote.quote(name)}"
            lacks = [
                right
                for right in _WRITES
                if name in there
                and not _says(connection, "SELECT has_table_privilege(:table, :right)", table=table, right=right)
            ]
            if lacks:
                grant = f"GRANT {', '.join(lacks)} ON {table} TO {_user(connection)};"
                yield f"{', '.join(lacks)} on {name}", grant


def _says(connection: sa.Connection, query: str, **values: str) -> bool:
    return bool(connection.execute(sa.text(query), values).scalar())


def _user(connection: sa.Connection) -> str:
    user = str(connection.execute(sa.text("SELECT current_user")).scalar())
    return connection.dialect.identifier_preparer.quote(user)
