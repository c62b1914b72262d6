"""The state tables: what is kept of every record, in tables of our own beside the source's or elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from extraction_dagster.errors.catalog import StateError

_INSERTS = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """A point in time: TIMESTAMPTZ where there is one, UTC text on SQLite; always timezone-aware in Python."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002
        """Store UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002
        """Read UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# Literal text: databases use a partial index only for a query that repeats its condition to the letter.
UNFINISHED = sa.text("state <> 'done' AND state <> 'parked'")
FAILED_OR_PARKED = sa.text("(state = 'failed' OR state = 'parked')")
NOT_CONSUMED = sa.text("consumed_at IS NULL")
_COUNTED = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite counts up ids of this type alone
METADATA = sa.MetaData()
META_TABLE = sa.Table(
    "extraction_meta",
    METADATA,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
LEDGER_TABLE = sa.Table(
    "extraction_ledger",
    METADATA,
    sa.Column("record_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("source_version", sa.Text, nullable=False, server_default=""),
    sa.Column("content_version", sa.Text, nullable=False, server_default=""),
    sa.Column("revision", sa.Integer, nullable=False, server_default="0"),
    sa.Column("frames_fingerprint", sa.String(64)),
    sa.Column("embedding_fingerprint", sa.String(64)),
    sa.Column("num_frames", sa.Integer),
    sa.Column("num_points", sa.Integer),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("not_before", UtcDateTime),
    sa.Column("last_error", sa.Text),
    sa.Column("updated_at", UtcDateTime, nullable=False),
    # Few records are begun or wait: this index stays small whatever the ledger's size.
    sa.Index("extraction_ledger_unfinished", "record_id", postgresql_where=UNFINISHED, sqlite_where=UNFINISHED),
    sa.Index(
        "extraction_ledger_stopped", "record_id", postgresql_where=FAILED_OR_PARKED, sqlite_where=FAILED_OR_PARKED
    ),
)
ERRORS_TABLE = sa.Table(
    "extraction_errors",
    METADATA,
    sa.Column("id", _COUNTED, sa.Identity(), primary_key=True, autoincrement=True),
    sa.Column("record_id", sa.BigInteger, nullable=False, index=True),
    sa.Column("stage", sa.String(16), nullable=False),
    sa.Column("error_type", sa.String(128), nullable=False),
    sa.Column("error_message", sa.Text, nullable=False),
    sa.Column("error_details", sa.Text, nullable=False, server_default=""),
    sa.Column("occurred_at", UtcDateTime, nullable=False),
    sa.Column("run_id", sa.String(64), nullable=False, server_default=""),
)
REQUESTS_TABLE = sa.Table(
    "extraction_requests",
    METADATA,
    sa.Column("id", _COUNTED, sa.Identity(), primary_key=True, autoincrement=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("value", sa.BigInteger),
    sa.Column("requested_at", UtcDateTime, nullable=False),
    sa.Column("applied_epoch", sa.Integer),
    sa.Column("consumed_at", UtcDateTime),
    sa.Index("extraction_requests_waiting", "id", postgresql_where=NOT_CONSUMED, sqlite_where=NOT_CONSUMED),
)


def insert_of(engine: sa.Engine) -> Any:  # noqa: ANN401 - each dialect has a type of its own
    """The database's INSERT that knows what to do `on_conflict`; called with a table.

    Raises:
        StateError: State can't be kept in this kind of database.
    """
    insert = _INSERTS.get(engine.dialect.name)
    if insert is None:
        raise StateError(
            f"{engine.dialect.name} can't keep them", "Set EXTRACTION_STATE_URL to a PostgreSQL or SQLite database."
        )
    return insert
