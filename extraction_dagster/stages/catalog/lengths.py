"""How long the values of a row may be; of a longer one the database gives its length, never the value.

A text in SQLite may have a gigabyte, and a page has a thousand rows: what is far too long must not be read at all.

    path     x.mp4     read
    code     9,000     read: at most twice the 1,024 bytes that it may have would be; the database says `code:9000`
    payload  {"a":1}   read; all of a row's payload together is measured as JSON
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

OVERLONG_LABEL = "extraction_overlong"
# A database may count in another encoding than UTF-8, in which a text has up to twice the bytes.
_SLACK = 2
# What PostgreSQL keeps in few bytes whatever is written there.
_SHORT_TYPES = (sa.Integer, sa.Float, sa.Boolean, sa.Date, sa.DateTime, sa.Time, sa.Interval, sa.Uuid, sa.Enum)


@dataclass(frozen=True, slots=True)
class Cap:
    """The most bytes of a value, and the setting that says so."""

    num_bytes: int
    setting: str

    @property
    def expected(self) -> str:
        """What an error says was expected."""
        return f"at most {self.num_bytes} bytes ({self.setting})"


class BoundedColumns:
    """Columns of one table as they are selected, each within its cap.

    Args:
        engine: Of which database.
        caps: By name of the column.
    """

    def __init__(self, engine: sa.Engine, caps: Mapping[str, Cap]) -> None:
        self._dialect, self._caps = engine.dialect.name, caps

    def select(self, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        """The column, as NULL where it is far too long to be read."""
        length = self._length(column)
        if length is None:
            return column
        return sa.case((length <= self._most(column), column), else_=sa.null()).label(column.name)

    def overlong(
        self, columns: Iterable[sa.Column[Any]], texts: Mapping[str, tuple[sa.ColumnElement[str], Cap]]
    ) -> sa.ColumnElement[Any]:
        """`name:length` of the first column, or text by its name, that is far too long to be read; NULL for none."""
        found = [(column.name, self._length(column), self._most(column)) for column in columns]
        found += [(name, self._length_of_text(text), _SLACK * cap.num_bytes) for name, (text, cap) in texts.items()]
        cases = [
            (length > most, sa.literal(f"{name}:") + sa.cast(length, sa.Text))
            for name, length, most in found
            if length is not None
        ]
        return (sa.case(*cases, else_=sa.null()) if cases else sa.null()).label(OVERLONG_LABEL)

    def version(self, column: sa.ColumnElement[str], cap: Cap) -> sa.ColumnElement[str]:
        """A version; one that is far too long to be read or kept is told by its length alone.

        That it is such a one is said by `overlong`: a version may be any text.
        """
        length = self._length_of_text(column)
        if length is None:
            return column
        told = sa.literal("too long: ") + sa.cast(length, sa.Text)
        return sa.case((length <= _SLACK * cap.num_bytes, column), else_=told)

    def _most(self, column: sa.Column[Any]) -> int:
        return _SLACK * self._caps[column.name].num_bytes

    def _length(self, column: sa.Column[Any]) -> sa.ColumnElement[int] | None:
        """The bytes of a value; None where it is short anyway, or the database can't be asked."""
        if self._dialect == "sqlite":  # any column holds anything
            return self._length_of_text(column)
        if self._dialect != "postgresql" or column.name not in self._caps or isinstance(column.type, _SHORT_TYPES):
            return None
        plain = isinstance(column.type, sa.String | sa.LargeBinary)
        return sa.func.octet_length(column if plain else sa.cast(column, sa.Text))

    def _length_of_text(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[int] | None:
        if self._dialect == "sqlite":
            return sa.func.length(sa.cast(column, sa.LargeBinary))
        return sa.func.octet_length(column) if self._dialect == "postgresql" else None


def size_bytes(value: object) -> int:
    """The bytes of a value: of a text as UTF-8, of anything else as JSON."""
    if isinstance(value, bytes | memoryview):
        return len(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
