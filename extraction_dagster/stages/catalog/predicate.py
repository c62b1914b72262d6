"""The operator's predicate, from text to an expression over reflected columns.

The text is parsed, never pasted: only the node kinds below are accepted, every name must be a column of the table,
and every literal becomes a bound parameter. `is_downloaded AND NOT is_removed`, `platform IN ('a', 'b')`,
`deleted_at IS NULL`, `size_bytes < 1000000` are what it is for.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from extraction_dagster.errors.catalog import PredicateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlglot import exp

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": operator.eq,
    "NEQ": operator.ne,
    "GT": operator.gt,
    "GTE": operator.ge,
    "LT": operator.lt,
    "LTE": operator.le,
}


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
            return self._flag(node)
        if kind == "Is":
            return self._value(node.this).is_(self._literal(node.expression))
        if kind == "In" and node.args.get("query") is None:
            return self._value(node.this).in_([self._literal(item) for item in node.expressions])
        if kind in _COMPARISONS:
            result: sa.ColumnElement[bool] = _COMPARISONS[kind](self._value(node.this), self._value(node.expression))
            return result
        raise self._refuse(f"{node.sql()!r} is not allowed in it")

    def _flag(self, node: exp.Expression) -> sa.ColumnElement[bool]:
        column = self._value(node)
        if isinstance(column.type, sa.Boolean):
            # A bare flag that is NULL counts as false, and NOT of it as true: no row falls between the two.
            return column.is_(sa.true())
        raise self._refuse(f"column {node.sql()} is not boolean: compare it with something")

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
            return node.this if node.is_string else _number(node.this)
        raise self._refuse(f"{node.sql()!r} is not a column, number, text, TRUE, FALSE or NULL")

    def _refuse(self, why: str) -> PredicateError:
        return PredicateError(self._text, why, sorted(self._table.c.keys()))


def _number(text: str) -> int | float:
    return int(text) if text.isascii() and text.isdigit() else float(text)
