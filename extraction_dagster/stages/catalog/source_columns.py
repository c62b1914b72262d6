"""The source table's columns, found and checked, and the operator's predicate over them.

The predicate's text is parsed, never pasted: only the node kinds below are accepted, every name must be a column of the
table, and every literal becomes a bound parameter. `is_downloaded AND NOT is_removed`, `platform IN ('a', 'b')`,
`deleted_at IS NULL`, `size_bytes BETWEEN 1 AND 1000000`, `path LIKE '%.mp4'` are what it is for.
"""

from __future__ import annotations

import difflib
import operator
import string
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from extraction_dagster.errors import one_line
from extraction_dagster.errors.catalog import PredicateError, SourceTableError
from extraction_dagster.stages.catalog.database import describe, file_is_there, quiet_reflection, reading

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlglot import exp

    from extraction_dagster.settings import Settings

_OWN = "extraction_"
_KINDS = {"p": "partitioned table", "v": "view", "m": "materialized view", "f": "foreign table"}
_WITHOUT_KEYS = ("view", "materialized view", "foreign table")
_KEPT_ELSEWHERE = (
    "Set EXTRACTION_SOURCE_READ_ONLY=true and EXTRACTION_STATE_URL to a database that may be written: the ledger then "
    "says what is done."
)
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
        self.kind = "table"
        self.table = self._reflect()

    def _reflect(self) -> sa.Table:
        schema, name = self._settings.source_schema, self._settings.source_table
        if name.lower().startswith(_OWN):
            why = "tables of that name are this project's own"
            raise SourceTableError(self.name, why, "Set EXTRACTION_SOURCE_TABLE to the table of videos.")
        if not file_is_there(self._engine.url):
            fix = "Correct EXTRACTION_SOURCE_URL, or run 'extraction demo' to try it without a table."
            raise SourceTableError(self.name, f"there is no file {describe(self._engine.url)}", fix)
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            try:
                with quiet_reflection():
                    table = sa.Table(name, sa.MetaData(), schema=schema, autoload_with=connection)
            except sa.exc.NoSuchTableError:
                fix = self._where_it_is(connection)
            else:
                self.kind = kind_of(connection, table)
                for column in table.c:
                    _look_through(column)
                return table
        raise SourceTableError(self.name, f"there is no such table in {describe(self._engine.url)}", fix)

    def _where_it_is(self, connection: sa.Connection) -> str:
        """What to set, where there is no table of that name: perhaps it has another schema, or nearly that name."""
        schema, name = self._settings.source_schema, self._settings.source_table
        inspector, (before, _, after) = sa.inspect(connection), name.rpartition(".")
        if before and after in _names(inspector, before):
            return f"Set EXTRACTION_SOURCE_SCHEMA={before} and EXTRACTION_SOURCE_TABLE={after}."
        if connection.dialect.name == "postgresql":
            for other in sorted(inspector.get_schema_names()):
                if other not in {schema, "information_schema"} and name in _names(inspector, other):
                    return f"There is one in schema {other!r}: set EXTRACTION_SOURCE_SCHEMA={other}."
        names = _names(inspector, schema)
        close = difflib.get_close_matches(name, names, n=1)
        return (
            f"Set EXTRACTION_SOURCE_TABLE to {f'{close[0]!r}, perhaps' if close else 'one that exists'} "
            f"(there: {', '.join(sorted(names)[:10]) or 'none'}), EXTRACTION_SOURCE_SCHEMA where it is in another "
            "schema, or run 'extraction demo' to try it without a table."
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
        if column is not None and self.kind == "materialized view":
            why = "it is a materialized view, whose rows can't be marked"
            raise SourceTableError(self.name, why, _KEPT_ELSEWHERE)
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
        if self.kind in _WITHOUT_KEYS:
            return column  # it declares neither keys nor NOT NULL: its ids are trusted
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            unique = self._is_unique(column.name, sa.inspect(connection))
            null = column.nullable and connection.execute(sa.select(column).where(column.is_(None)).limit(1)).first()
        if not unique:
            fix = self._how_to_be_unique(table, name)
            raise SourceTableError(self.name, f"id column {column.name!r} is not declared unique", fix)
        if null or (column.nullable and not column.primary_key):
            fix = f"ALTER TABLE {table} ALTER COLUMN {name} SET NOT NULL, or set {setting} to another."
            raise SourceTableError(self.name, f"id column {column.name!r} may be NULL", fix)
        return column

    def _how_to_be_unique(self, table: str, name: str) -> str:
        """What makes ids unique; PostgreSQL can't promise it across partitions that are not cut by the id."""
        setting = "EXTRACTION_SOURCE_ID_COLUMN"
        if self.kind == "partitioned table":
            view = f"{self.table.name}_by_id"
            quote = self._engine.dialect.identifier_preparer
            shown = quote.format_table(sa.Table(view, sa.MetaData(), schema=self.table.schema))
            return (
                f"It is partitioned by another column, so PostgreSQL takes no index that would say so. Where no id "
                f"stands twice, read it through a view: CREATE VIEW {shown} AS SELECT * FROM {table}; then set "
                f"EXTRACTION_SOURCE_TABLE={view} (an index on {name} in each partition keeps it quick: CREATE INDEX ON "
                f"{table} ({name}))."
            )
        index_name = "" if self._engine.dialect.name == "postgresql" else "extraction_ids "  # PostgreSQL makes one up
        return f"CREATE UNIQUE INDEX {index_name}ON {table} ({name}), or set {setting} to a unique column."

    def _is_unique(self, column_name: str, inspector: sa.Inspector) -> bool:
        wanted = [column_name]
        if [column.name for column in self.table.primary_key] == wanted:
            return True
        name, schema = self.table.name, self.table.schema
        unique: list[Any] = [item["column_names"] for item in inspector.get_unique_constraints(name, schema)]
        unique += [item["column_names"] for item in inspector.get_indexes(name, schema) if _covers_all(item)]
        return wanted in unique


def kind_of(connection: sa.Connection, table: sa.Table) -> str:
    """What a relation is: table, partitioned table, view, materialized view, foreign table."""
    if connection.dialect.name == "postgresql":
        name = connection.dialect.identifier_preparer.format_table(table)
        query = sa.text("SELECT relkind::text FROM pg_class WHERE oid = to_regclass(:name)")
        return _KINDS.get(str(connection.execute(query, {"name": name}).scalar()), "table")
    return "view" if table.name in sa.inspect(connection).get_view_names(table.schema) else "table"


def _names(inspector: sa.Inspector, schema: str | None) -> list[str]:
    """The tables and views of a schema, but for those that this project makes."""
    try:
        names = [*inspector.get_table_names(schema), *inspector.get_view_names(schema)]
        if inspector.dialect.name == "postgresql":
            names += inspector.get_materialized_view_names(schema)
            names += inspector.get_foreign_table_names(schema)  # type: ignore[attr-defined]  # PostgreSQL's own
    except sa.exc.SQLAlchemyError:  # no such schema
        return []
    return [name for name in names if not name.startswith(_OWN)]


def _look_through(column: sa.Column[Any]) -> None:
    """Let a column of a domain count as one of the type that the domain is made of, and TINYINT(1) as a boolean."""
    if _is_small_number(column.type):
        column.type = sa.Boolean()
    while isinstance(column.type, postgresql.DOMAIN):
        if column.type.not_null:
            column.nullable = False
        column.type = column.type.data_type


def _is_small_number(kind: sa.types.TypeEngine[Any]) -> bool:
    return type(kind).__name__ == "TINYINT" and getattr(kind, "display_width", None) == 1


def _covers_all(index: Any) -> bool:  # noqa: ANN401 - an index as the inspector describes it
    """Whether an index is unique over every row; a partial one is not."""
    options = index.get("dialect_options", {})
    return bool(index["unique"]) and not any(name.endswith("_where") for name in options if options[name] is not None)


def check_predicate(text: str, table: sa.Table, predicate: sa.ColumnElement[bool], engine: sa.Engine) -> None:
    """Have the database read the predicate: a value that does not fit its column is refused before any work.

    Raises:
        PredicateError: The database, or the column's type, refuses a value.
        SourceUnreachableError: The database can't be reached or read.
    """
    query = sa.select(sa.literal(1)).select_from(table).where(predicate).limit(1)
    try:
        with engine.connect() as connection:
            connection.execute(query).first()
    except sa.exc.DBAPIError as error:
        if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
            with reading(engine, what=f"read source table {table.name!r}"):
                raise
        raise PredicateError(text, _said(error.orig), sorted(table.c.keys())) from None
    except (sa.exc.StatementError, ValueError, TypeError, ArithmeticError, AttributeError) as error:
        raise PredicateError(text, _said(getattr(error, "orig", None) or error), sorted(table.c.keys())) from None


def _said(error: BaseException | None) -> str:
    """What a database or a type says of a value, in one line."""
    said = str(error).strip().partition("\n")[0]
    return one_line(f"a value does not fit its column ({said})", 300)


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
        return self._comparison(node, kind)

    def _comparison(self, node: exp.Expression, kind: str) -> sa.ColumnElement[bool]:
        if kind in {"Like", "ILike", "Escape"}:
            return self._like(node)
        if kind in _COMPARISONS:
            result: sa.ColumnElement[bool] = _COMPARISONS[kind](self._value(node.this), self._value(node.expression))
            return result
        if kind == "Is":
            return self._value(node.this).is_(self._literal(node.expression))
        if kind == "In" and node.args.get("query") is None:
            return self._value(node.this).in_([self._literal(item) for item in node.expressions])
        if kind == "Between" and not node.args.get("symmetric"):
            low, high = self._literal(node.args["low"]), self._literal(node.args["high"])
            return self._value(node.this).between(low, high)
        raise self._refuse(f"{node.sql()!r} is not allowed in it")

    def _like(self, node: exp.Expression) -> sa.ColumnElement[bool]:
        escape = None
        if type(node).__name__ == "Escape":
            node, escape = node.this, self._literal(node.expression)
            if not isinstance(escape, str) or len(escape) != 1:
                raise self._refuse("ESCAPE takes one character")
        pattern = self._literal(node.expression)
        if not isinstance(pattern, str):
            raise self._refuse(f"LIKE takes a text, not {node.expression.sql()}")
        value = self._value(node.this)
        if not isinstance(value.type, sa.String | sa.types.NullType):
            raise self._refuse(f"LIKE is for texts, and {node.this.sql()} is of type {value.type}")
        ignores_case = type(node).__name__ == "ILike"
        found = value.ilike(pattern, escape=escape) if ignores_case else value.like(pattern, escape=escape)
        return sa.not_(found) if node.args.get("negate") else found

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
