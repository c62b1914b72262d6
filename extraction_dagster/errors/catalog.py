"""Errors of the databases: the source table, the state tables, the predicate."""

from __future__ import annotations

from extraction_dagster.errors.base import ExtractionError


class DatabaseUrlError(ExtractionError):
    """A database URL can't be used."""

    def __init__(self, setting: str, *, driver: str | None = None) -> None:
        got = f"names the driver {driver!r}, which is not installed" if driver else "is not a database URL"
        super().__init__(
            f"Setting {setting} {got}, expected for example postgresql://USER:PASSWORD@HOST:5432/DATABASE or "
            f"sqlite:////path/to/file.db (value not shown)."
        )


class SourceUnreachableError(ExtractionError):
    """A database can't be reached, read or written."""

    def __init__(self, what: str, url: str, reason: str) -> None:
        super().__init__(
            f"Cannot {what} at {url}: {' '.join(reason.split())}. Nothing was changed. "
            f"Check that the database runs and that its user has the rights, then try again."
        )


class SourceTableError(ExtractionError):
    """The source table is missing, or lacks what is needed of it."""

    def __init__(self, table: str, why: str, fix: str) -> None:
        super().__init__(f"Source table {table!r} can't be used: {why}. {fix}")


class PredicateError(ExtractionError):
    """EXTRACTION_SOURCE_PREDICATE can't be used."""

    def __init__(self, text: str, why: str, columns: list[str]) -> None:
        super().__init__(
            f"Setting EXTRACTION_SOURCE_PREDICATE is {text!r}: {why}. Expected a condition such as "
            f"is_downloaded AND NOT is_removed over the columns {', '.join(columns)}."
        )


class StateError(ExtractionError):
    """The state tables belong to another source, or to another version of this project."""

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(f"The state tables can't be used: {why}. {fix}")


class EmptyRangeError(ExtractionError):
    """A range was asked for that holds no eligible row."""

    def __init__(self, key: str, table: str, extent: tuple[int, int] | None) -> None:
        rows = f"its eligible rows have ids {extent[0]} to {extent[1]}" if extent else "it has no eligible row at all"
        super().__init__(
            f"Range {key} holds no eligible row of {table!r}: {rows}. Nothing was done. "
            f"Choose a range that overlaps the table's ids, or wait until rows arrive."
        )
