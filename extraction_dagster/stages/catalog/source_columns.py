"""The source table's columns: found, checked, and refused with the fix in the message."""

from __future__ import annotations

import difflib
import string
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from extraction_dagster.errors.catalog import SourceTableError
from extraction_dagster.stages.catalog.database import describe, reading

if TYPE_CHECKING:
    from extraction_dagster.settings import Settings


class SourceColumns:
    """The reflected table, asked for columns by the settings that name them.

    Opening it and each method raise SourceTableError for what can't work.
    """

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self.name = ".".join(filter(None, (settings.source_schema, settings.source_table)))
        self.table = self._reflect()

    def _reflect(self) -> sa.Table:
        schema, name = self._settings.source_schema, self._settings.source_table
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            try:
                return sa.Table(name, sa.MetaData(), schema=schema, autoload_with=connection)
            except sa.exc.NoSuchTableError:
                inspector = sa.inspect(connection)
                names = [*inspector.get_table_names(schema), *inspector.get_view_names(schema)]
        close = difflib.get_close_matches(name, names, n=1)
        raise SourceTableError(
            self.name,
            f"there is no such table in {describe(self._engine.url)}",
            f"Set EXTRACTION_SOURCE_TABLE to {f'{close[0]!r}, perhaps' if close else 'one that exists'} "
            f"(there: {', '.join(sorted(names)[:10]) or 'none'}), or run 'extraction demo' to try it without a table.",
        )

    def find(self, name: str, setting: str) -> sa.Column[Any]:
        """The column of that name; refuses a missing one and names what may be meant."""
        if name in self.table.c:
            return self.table.c[name]
        close = difflib.get_close_matches(name, self.table.c.keys(), n=1)
        raise SourceTableError(
            self.name,
            f"it has no column {name!r}",
            f"Set {setting} to {f'{close[0]!r}, perhaps' if close else 'a column that exists'} "
            f"(it has: {', '.join(self.table.c.keys())}).",
        )

    def find_optional(self, name: str | None, setting: str) -> sa.Column[Any] | None:
        """The column of that name; None for no name."""
        return self.find(name, setting) if name else None

    def find_mark(self, name: str | None, setting: str) -> sa.Column[Any] | None:
        """A mark column, which must be boolean; None for no name."""
        if self._settings.source_read_only:
            return None  # they are never set: the ledger alone says what is done
        column = self.find_optional(name, setting)
        if column is not None and not isinstance(column.type, sa.Boolean):
            raise SourceTableError(
                self.name,
                f"mark column {name!r} is of type {column.type}, expected BOOLEAN",
                f"Set {setting} to a boolean column, or to nothing to keep the marks in the ledger alone.",
            )
        return column

    def find_uri(self) -> list[sa.Column[Any]]:
        """The columns that say where the file lies."""
        template = self._settings.source_uri_template
        if not template:
            return [self.find(self._settings.source_uri_column, "EXTRACTION_SOURCE_URI_COLUMN")]
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise self._bad_template(template, str(error)) from None
        names = [name for _, name, _, _ in parts if name is not None]
        if not names or any(spec or conversion for _, _, spec, conversion in parts):
            raise self._bad_template(template, "it must name columns, each as {column} and nothing more")
        return [self.find(name, "EXTRACTION_SOURCE_URI_TEMPLATE") for name in dict.fromkeys(names)]

    def _bad_template(self, template: str, why: str) -> SourceTableError:
        fix = "Set EXTRACTION_SOURCE_URI_TEMPLATE to, for example, s3://bucket/{platform}/{code}/video.mp4."
        return SourceTableError(self.name, f"EXTRACTION_SOURCE_URI_TEMPLATE is {template!r}: {why}", fix)

    def find_id(self) -> sa.Column[int]:
        """The id column: an integer, never NULL, that belongs to one row."""
        setting = "EXTRACTION_SOURCE_ID_COLUMN"
        column = self.find(self._settings.source_id_column, setting)
        quote = self._engine.dialect.identifier_preparer
        table, name = quote.format_table(self.table), quote.quote(column.name)
        if not isinstance(column.type, sa.Integer):
            raise SourceTableError(
                self.name,
                f"id column {column.name!r} is of type {column.type}, expected an integer",
                f"Add one (PostgreSQL): ALTER TABLE {table} ADD COLUMN extraction_id BIGINT GENERATED ALWAYS AS "
                f"IDENTITY; CREATE UNIQUE INDEX ON {table} (extraction_id); then set {setting}=extraction_id.",
            )
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            if self.table.name in sa.inspect(connection).get_view_names(self.table.schema):
                return column  # a view declares neither keys nor NOT NULL: its ids are trusted
            unique = self._is_unique(column.name, sa.inspect(connection))
            null = column.nullable and connection.execute(sa.select(column).where(column.is_(None)).limit(1)).first()
        if not unique:
            fix = f"CREATE UNIQUE INDEX {self._index_name()}ON {table} ({name}), or set {setting} to a unique column."
            raise SourceTableError(self.name, f"id column {column.name!r} is not declared unique", fix)
        if null or (column.nullable and not column.primary_key):
            fix = f"ALTER TABLE {table} ALTER COLUMN {name} SET NOT NULL, or set {setting} to another."
            raise SourceTableError(self.name, f"id column {column.name!r} may be NULL", fix)
        return column

    def _index_name(self) -> str:
        """A name for an index of ids where the database makes none up."""
        return "" if self._engine.dialect.name == "postgresql" else "extraction_ids "

    def _is_unique(self, column_name: str, inspector: sa.Inspector) -> bool:
        wanted = [column_name]
        if [column.name for column in self.table.primary_key] == wanted:
            return True
        name, schema = self.table.name, self.table.schema
        unique: list[Any] = [item["column_names"] for item in inspector.get_unique_constraints(name, schema)]
        unique += [item["column_names"] for item in inspector.get_indexes(name, schema) if _covers_all(item)]
        return wanted in unique


def _covers_all(index: Any) -> bool:  # noqa: ANN401 - an index as the inspector describes it
    """Whether an index is unique over every row; a partial one is not."""
    options = index.get("dialect_options", {})
    return bool(index["unique"]) and not any(name.endswith("_where") for name in options if options[name] is not None)
