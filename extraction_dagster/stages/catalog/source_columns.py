"""The source table's columns, found and checked, and the operator's predicate over them.

The predicate's text is parsed, never pasted: only the node kinds below are accepted, every name must be a column of the
table, and every literal becomes a bound parameter. `is_downloaded AND NOT is_removed`, `platform IN ('a', 'b')`,
`deleted_at IS NULL`, `size_bytes < 1000000` are what it is for.
"""

from __future__ import annotations

import difflib
import operator
import string
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from extraction_dagster.errors.catalog import PredicateError, SourceTableError
from extraction_dagster.stages.catalog.database import describe, reading

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlglot import exp

    from extraction_dagster.settings import Settings

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": operator.eq,
    "NEQ": operator.ne,
    "GT": operator.gt,
    "GTE": operator.ge,
    "LT": operator.lt,
    "LTE": operator.le,
}


class SourceColumns:
    """The reflected table, asked for columns by the settings that name them.

    Opening it and each method raise SourceTableError for what can't work.
    """

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self.name = ".".join(filter(None, (settings.source_schema, settings.source_table)))
        self.is_view = False
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
            return None  # marks that we may not set say nothing of what we did: the ledger alone knows
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
                self.is_view = True
                return column  # a view declares neither keys nor NOT NULL: its ids are trusted
            unique = self._is_unique(column.name, sa.inspect(connection))
            null = column.nullable and connection.execute(sa.select(column).where(column.is_(None)).limit(1)).first()
        if not unique:
            index_name = (
                "" if self._engine.dialect.name == "postgresql" else "extraction_ids "
            )  # PostgreSQL makes one up
            fix = f"CREATE UNIQUE INDEX {index_name}ON {table} ({name}), or set {setting} to a unique column."
            raise SourceTableError(self.name, f"id column {column.name!r} is not declared unique", fix)
        if null or (column.nullable and not column.primary_key):
            fix = f"ALTER TABLE {table} ALTER COLUMN {name} SET NOT NULL, or set {setting} to another."
            raise SourceTableError(self.name, f"id column {column.name!r} may be NULL", fix)
        return column

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


def build_predicate(text: str, table: sa.Table) -> sa.ColumnElement[bool]:
    """Build the expression that says which rows are eligible.

    Raises:
        PredicateError: The text is no boolean expression over the table's columns.
    """
    import sqlglot  # noqa: PLC0415 - 60 ms, only needed when a predicate is set
    from sqlglot.errors import SqlglotError  # noqa: PLC0415

    try:
        tree: Any = sqlglot.parse_one(text, into=sqlglot.exp.Condition)
    except SqlglotError:
        raise PredicateError(text, "it is no boolean expression", sorted(table.c.keys())) from None
    return _Builder(text, table).boolean(tree)


class _Builder:
    def __init__(self, text: str, table: sa.Table) -> None:
        self._text, self._table = text, table

    def boolean(self, node: exp.Expression) -> sa.ColumnElement[bool]:
        kind = type(node).__name__
        if kind == "Paren":
            return self.boolean(node.this)
        if kind in {"And", "Or"}:
            sides = (self.boolean(node.this), self.boolean(node.expression))
            return sa.and_(*sides) if kind == "And" else sa.or_(*sides)
        if kind == "Not":
            return sa.not_(self.boolean(node.this))
        if kind == "Column":
            column = self._value(node)
            if isinstance(column.type, sa.Boolean):
                # A bare flag that is NULL counts as false, and NOT of it as true: no row falls between the two.
                return column.is_(sa.true())
            raise self._refuse(f"column {node.sql()} is not boolean: compare it with something")
        if kind == "Is":
            return self._value(node.this).is_(self._literal(node.expression))
        if kind == "In" and node.args.get("query") is None:
            return self._value(node.this).in_([self._literal(item) for item in node.expressions])
        if kind in _COMPARISONS:
            result: sa.ColumnElement[bool] = _COMPARISONS[kind](self._value(node.this), self._value(node.expression))
            return result
        raise self._refuse(f"{node.sql()!r} is not allowed in it")

    def _value(self, node: exp.Expression) -> sa.ColumnElement[Any]:
        if type(node).__name__ != "Column":
            return sa.literal(self._literal(node))
        if node.args.get("table") is not None or node.name not in self._table.c:
            raise self._refuse(f"the table has no column {node.sql()}")
        return self._table.c[node.name]

    def _literal(self, node: exp.Expression) -> Any:  # noqa: ANN401 - whatever the literal is
        kind = type(node).__name__
        if kind == "Null":
            return None
        if kind == "Boolean":
            return bool(node.this)
        if kind == "Neg":
            return -self._literal(node.this)
        if kind == "Literal":
            text: str = node.this
            return text if node.is_string else int(text) if text.isascii() and text.isdigit() else float(text)
        raise self._refuse(f"{node.sql()!r} is not a column, number, text, TRUE, FALSE or NULL")

    def _refuse(self, why: str) -> PredicateError:
        return PredicateError(self._text, why, sorted(self._table.c.keys()))
