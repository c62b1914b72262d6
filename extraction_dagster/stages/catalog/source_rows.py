"""Rows of the source table as they are read: a value that can't be read or used fails its row, and no other.

A page is read at once. Where that fails, its eighths are read by themselves, down to the row that is to blame, and of
that row one column after the other:

    rows 1 ─────────────── 500      year 10000 is out of range
    rows 1 ── 63                    read
               rows 64 ── 126       … down to row 73
    row 73     path, code, …        read; uploaded_at can't be: the row comes with that, and without the value
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from extraction_dagster.addresses import address_hash, shown_address
from extraction_dagster.errors import one_line
from extraction_dagster.errors.catalog import UnreadableRowError
from extraction_dagster.records import IdRange, VideoRow
from extraction_dagster.stages.catalog.database import chunks, fetch_all, is_text, is_undecodable, reading, storable
from extraction_dagster.stages.catalog.lengths import OVERLONG_LABEL, BoundedColumns, Cap, size_bytes
from extraction_dagster.stages.catalog.source_columns import SourceColumns, build_predicate, check_predicate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from extraction_dagster.settings import Settings

_VERSION_LABEL = "extraction_version"
_PAGE = 1000
_PARTS = 8
_DEEPEST = 32  # levels of JSON; each takes three of the 100 that a message to Qdrant may have
# What drivers and types raise for a value that they can't read; a database that fails raises something else.
_UNREADABLE = (ValueError, TypeError, ArithmeticError, LookupError, RecursionError, sa.exc.DataError)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row with the source's own version as its content_version; a mark is None where there is no such column.

    Attributes:
        video: Where a value can't be read, without it.
        extracted: The first mark.
        embedded: The last mark.
        problem: What is wrong with a value that can't be read or used; None for nothing. Such a row fails alone.
    """

    video: VideoRow
    extracted: bool | None
    embedded: bool | None
    problem: UnreadableRowError | None = None

    @property
    def marked_done(self) -> bool | None:
        """Whether every mark column says done; None when the table has none."""
        marks = [mark for mark in (self.extracted, self.embedded) if mark is not None]
        return all(marks) if marks else None


class SourceRows:
    """The configured table's columns, and its rows.

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
        self._uri_names, self._uri_template = (
            [column.name for column in self._uri_columns],
            settings.source_uri_template,
        )
        self._platform = columns.find_optional(settings.source_platform_column, "EXTRACTION_SOURCE_PLATFORM_COLUMN")
        self._code = columns.find_optional(settings.source_code_column, "EXTRACTION_SOURCE_CODE_COLUMN")
        self._payload = [
            columns.find(name, "EXTRACTION_SOURCE_PAYLOAD_COLUMNS") for name in settings.source_payload_columns
        ]
        version = columns.find_optional(settings.source_version_column, "EXTRACTION_SOURCE_VERSION_COLUMN")
        self.version_column = version
        self._extracted = columns.find_mark(settings.source_extracted_column, "EXTRACTION_SOURCE_EXTRACTED_COLUMN")
        self._embedded = columns.find_mark(settings.source_embedded_column, "EXTRACTION_SOURCE_EMBEDDED_COLUMN")
        self._marks = [column for column in (self._extracted, self._embedded) if column is not None]
        self.kind = columns.kind
        optional = [column for column in (self._platform, self._code) if column is not None]
        checked = {column.name: column for column in (*self._payload, *self._uri_columns, *optional)}
        self._checked = list(checked.items())
        self._set_caps(settings, optional)
        # As text, made by the database: one form for reading and for comparing.
        whole = None if version is None else sa.func.coalesce(sa.cast(version, sa.Text), "")
        self._version = None if whole is None else self._bounded.version(whole, self._label_cap)
        self._whole_versions = {} if whole is None else {_VERSION_LABEL: (whole, self._label_cap)}
        # As it is configured: a folder that moves with all that lies in it makes no file another.
        self._first_root = settings.allowed_roots[0] if settings.allowed_roots else "videos"
        self.eligible: sa.ColumnElement[bool] = sa.true()
        if predicate := settings.source_predicate:
            self.eligible = build_predicate(predicate, self.table)
            check_predicate(predicate, self.table, self.eligible, engine)

    def _set_caps(self, settings: Settings, labels: Sequence[sa.Column[Any]]) -> None:
        """How long each column may be; one that is part of an address and a label, as long as a label."""
        self._label_cap = Cap(settings.max_label_bytes, "EXTRACTION_MAX_LABEL_BYTES")
        self._payload_cap = Cap(settings.max_payload_bytes, "EXTRACTION_MAX_PAYLOAD_BYTES")
        self._uri_cap = Cap(settings.max_address_bytes, "EXTRACTION_MAX_ADDRESS_BYTES")
        self._caps = {
            **{column.name: self._payload_cap for column in self._payload},
            **{column.name: self._uri_cap for column in self._uri_columns},
            **{column.name: self._label_cap for column in (*labels, *self._marks)},
            _VERSION_LABEL: self._label_cap,
        }
        self._bounded = BoundedColumns(self._engine, self._caps)

    def rows(self, id_range: IdRange) -> Iterator[SourceRow]:
        """Every eligible row of the range, in ascending order of ids; one that can't be read says so."""
        first = id_range.first_id
        while True:
            query = self._query.where(self.id.between(first, id_range.last_id)).order_by(self.id)
            try:
                with reading(self._engine, what=f"read source table {self.name!r}") as connection:
                    for row in connection.execution_options(yield_per=_PAGE).execute(query).mappings():
                        found = self._source_row(row)
                        yield found
                        first = found.video.record_id + 1
            except _UNREADABLE as error:
                _log.debug("Reading rows of %s from id %d one by one: %s", self.name, first, type(error).__name__)
            else:
                return
            within = self.id.between(first, id_range.last_id)
            page = self._ids(sa.select(self.id).where(self.eligible, within), _PAGE)
            yield from (row for chunk in chunks(page) for row in self._in_parts(chunk))
            if len(page) < _PAGE or page[-1] >= id_range.last_id:
                return
            first = page[-1] + 1

    def rows_of(self, record_ids: Iterable[int]) -> Iterator[SourceRow]:
        """The eligible ones of these rows, in ascending order of ids."""
        for chunk in chunks(sorted(record_ids)):
            yield from self._in_parts(chunk)

    def next_ids(self, after_id: int | None, most: int, *, up_to_id: int | None = None) -> list[int]:
        """The ids of the next eligible rows above an id, at most `most`."""
        query = sa.select(self.id).where(self.eligible)
        if after_id is not None:
            query = query.where(self.id > after_id)
        return self._ids(query if up_to_id is None else query.where(self.id <= up_to_id), most)

    def eligible_of(self, record_ids: Sequence[int]) -> list[int]:
        """The eligible ones of a few rows, in ascending order of ids."""
        return self._ids(sa.select(self.id).where(self.eligible, self.id.in_(record_ids)), len(record_ids))

    def addresses_of(self, record_ids: Sequence[int]) -> dict[int, str]:
        """The addresses of those of these rows that have one which can be read."""
        uri_columns = [self._bounded.select(column) for column in self._uri_columns if column.name != self.id.name]
        query = sa.select(self.id, *uri_columns)
        found: dict[int, str] = {}
        for chunk in chunks(record_ids):
            try:
                with reading(self._engine, what=f"read source table {self.name!r}") as connection:
                    for row in connection.execute(query.where(self.id.in_(chunk))).mappings():
                        found[int(row[self.id.name])] = address_hash(self._uri(row), self._first_root)
            except _UNREADABLE:
                found |= {row.video.record_id: row.video.address for row in self._in_parts(chunk)}
        return found

    def shown_addresses(self, record_ids: Iterable[int]) -> dict[int, str]:
        """The addresses of those of these rows that are there, as they may be shown."""
        return {row.video.record_id: one_line(shown_address(row.video.uri)) for row in self.rows_of(set(record_ids))}

    def _ids(self, query: sa.Select[int], most: int) -> list[int]:
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            return [int(key) for key in connection.execute(query.order_by(self.id).limit(most)).scalars()]

    def _in_parts(self, record_ids: Sequence[int]) -> list[SourceRow]:
        """The eligible ones of these rows; where one of them can't be read, part by part, down to that row."""
        with reading(self._engine, what=f"read source table {self.name!r}") as connection:
            return self._part(connection, record_ids)

    def _part(self, connection: sa.Connection, record_ids: Sequence[int]) -> list[SourceRow]:
        query = self._query.where(self.id.in_(record_ids)).order_by(self.id)
        try:
            return [self._source_row(row) for row in _mappings(connection, query)]
        except _UNREADABLE:
            connection.rollback()  # one that failed in the database takes no further question
        if len(record_ids) == 1:
            return self._by_columns(connection, record_ids[0])
        size = -(-len(record_ids) // _PARTS)
        return [row for part in chunks(record_ids, size) for row in self._part(connection, part)]

    def _by_columns(self, connection: sa.Connection, record_id: int) -> list[SourceRow]:
        """A row that can't be read as a whole: without the values that can't be read, and with what is wrong."""
        values: dict[str, Any] = {}
        problem: UnreadableRowError | None = None
        for column in self._query.selected_columns:
            query = sa.select(column).where(self.id == record_id, self.eligible)
            try:
                found = fetch_all(connection, query)
            except _UNREADABLE as error:
                connection.rollback()
                values[column.name] = None
                problem = problem or self._unreadable(record_id, column, f"{type(error).__name__}: {error}")
                continue
            if not found:  # it is gone since
                return []
            values[column.name] = found[0][0]
        values[_VERSION_LABEL] = values[_VERSION_LABEL] or ""
        try:
            row = self._source_row(values)
        except _UNREADABLE as error:  # each value can be read, and not be used
            why = f"{type(error).__name__}: {error}"
            blank = values | {column.name: None for column in self._uri_columns}
            row = self._source_row(blank)
            problem = problem or self._unreadable(record_id, self._uri_columns[0], why)
        return [replace(row, problem=problem or row.problem)]

    def _unreadable(self, record_id: int, column: sa.ColumnElement[Any], why: str) -> UnreadableRowError:
        name = column.name
        label = (self._settings.source_version_column or name) if name == _VERSION_LABEL else name
        kind = "text" if name == _VERSION_LABEL else str(column.type)
        return UnreadableRowError(self.name, record_id, label, why, expected=kind)

    @functools.cached_property
    def _query(self) -> sa.Select[*tuple[Any, ...]]:
        """What a `SourceRow` needs of the eligible rows."""
        optional = (self._platform, self._code, self._extracted, self._embedded)
        columns = [*self._uri_columns, *self._payload, *(column for column in optional if column is not None)]
        version = sa.literal("") if self._version is None else self._version
        once = {column.name: column for column in columns if column.name != self.id.name}
        read = [self._bounded.select(column) for column in once.values()]
        overlong = self._bounded.overlong(once.values(), self._whole_versions)
        return sa.select(self.id, *read, version.label(_VERSION_LABEL), overlong).where(self.eligible)

    def _source_row(self, row: Mapping[Any, Any]) -> SourceRow:
        uri = self._uri(row)
        video = VideoRow(
            record_id=int(row[self.id.name]),
            uri=uri,
            platform=_text(row[self._platform.name]) if self._platform is not None else None,
            code=_text(row[self._code.name]) if self._code is not None else None,
            content_version=storable(row[_VERSION_LABEL]),
            payload={column.name: row[column.name] for column in self._payload},
            address=address_hash(uri, self._first_root),
        )
        return SourceRow(
            video=video,
            extracted=None if self._extracted is None else bool(row[self._extracted.name]),
            embedded=None if self._embedded is None else bool(row[self._embedded.name]),
            problem=self._problem_of(video.record_id, row) or self._problem_with_lengths(video, row),
        )

    def _problem_of(self, record_id: int, row: Mapping[Any, Any]) -> UnreadableRowError | None:
        """What is wrong with a value that could be read and can't be used."""
        for name, column in self._checked:
            value = row[name]
            if value is None or (type(value) is str and value.isascii()) or type(value) is int:
                continue
            if not is_text(value):
                return self._unreadable(record_id, column, "it is no UTF-8")
            if isinstance(value, dict | list) and is_deep(value):
                return self._unreadable(record_id, column, f"it is nested deeper than {_DEEPEST} levels")
            if isinstance(value, bytes | memoryview) and column not in self._payload:
                return self._unreadable(record_id, column, "it is binary")
        return None

    def _problem_with_lengths(self, video: VideoRow, row: Mapping[Any, Any]) -> UnreadableRowError | None:
        """What is longer than it may be: first what was not even read, then what was, then what is made of it."""
        name, _, length = (row[OVERLONG_LABEL] or "").rpartition(":")
        if name:
            return self._too_long(video.record_id, name, length, self._caps[name])
        for name, _ in self._checked:
            value = row[name]
            if value is not None and type(value) is not int and size_bytes(value) > self._caps[name].num_bytes:
                return self._too_long(video.record_id, name, size_bytes(value), self._caps[name])
        version = row[_VERSION_LABEL]
        if len(version) > self._label_cap.num_bytes // 4 and size_bytes(version) > self._label_cap.num_bytes:
            return self._too_long(video.record_id, _VERSION_LABEL, size_bytes(version), self._label_cap)
        if size_bytes(video.uri) > self._uri_cap.num_bytes:
            return self._too_long(video.record_id, self._uri_names[0], size_bytes(video.uri), self._uri_cap)
        if video.payload and (size := size_bytes(dict(video.payload))) > self._payload_cap.num_bytes:
            return self._too_long(video.record_id, ", ".join(video.payload), size, self._payload_cap)
        return None

    def _too_long(self, record_id: int, name: str, length: object, cap: Cap) -> UnreadableRowError:
        label = (self._settings.source_version_column or name) if name == _VERSION_LABEL else name
        return UnreadableRowError(self.name, record_id, label, f"it has {length} bytes", expected=cap.expected)

    def _uri(self, row: Mapping[Any, Any]) -> str:
        """Where the file lies; empty when a column that it needs is NULL (fetching then says so)."""
        values = {name: row[name] for name in self._uri_names}
        if None in values.values():
            return ""
        return self._uri_template.format_map(values) if self._uri_template else str(row[self._uri_names[0]])


def _mappings(connection: sa.Connection, query: sa.Select[*tuple[Any, ...]]) -> Sequence[sa.RowMapping]:
    try:
        return connection.execute(query).mappings().all()
    except sa.exc.OperationalError as error:
        if is_undecodable(error):
            raise UnicodeError(" ".join(str(error.orig).split())) from error
        raise


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def is_deep(value: object) -> bool:
    """Whether a value of JSON is nested deeper than what takes it further can follow."""
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [
            item
            for part in level
            for item in (part.values() if isinstance(part, dict) else part)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True
