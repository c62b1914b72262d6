"""The state tables: what is kept of every record, in tables of our own beside the source's or elsewhere.

    version 1   the tables of release 0.1.0, which wrote no version down
    version 2   an index over the requests that no tick has consumed: each tick asks for them
    version 3   of each record: the claim that may write it, and whose; the address of its file; what its points are
                made from; which records were gone, when, and when removed; the number after which claims begin

`extraction_meta` holds the version, and the release that wrote it. Tables of an older version are migrated when they
are opened: in one transaction, so that a killed process leaves the old version or the new one, and under a lock, so
that of processes that start at once one migrates and the others find it done. A newer version is refused.

A new version: change `METADATA`, and add a step to `STEPS` that changes tables of the version before.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from extraction_dagster import __version__
from extraction_dagster.errors.catalog import StateError
from extraction_dagster.stages.catalog.database import STATE_SCHEMA, describe, file_is_there, reading, writing
from extraction_dagster.stages.catalog.identity import SourceMark

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from alembic.operations import Operations

_log = logging.getLogger(__name__)
_SOURCE, _VERSION, _RELEASE, _CLAIM_BASE = "source", "state_version", "state_release", "claim_base"
_TOLD, _FORMER = "source_told", "source_former"
_LOCK = 0x657874726163
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
METADATA = sa.MetaData(schema=STATE_SCHEMA)
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
    sa.Column("claim", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("claimed_by", sa.String(64)),
    sa.Column("address", sa.String(16)),
    sa.Column("generation", sa.String(64)),
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
    sa.Column("record_id", sa.BigInteger, nullable=False),
    sa.Column("stage", sa.String(16), nullable=False),
    sa.Column("error_type", sa.String(128), nullable=False),
    sa.Column("error_message", sa.Text, nullable=False),
    sa.Column("error_details", sa.Text, nullable=False, server_default=""),
    sa.Column("occurred_at", UtcDateTime, nullable=False),
    sa.Column("run_id", sa.String(64), nullable=False, server_default=""),
    sa.Index("ix_extraction_errors_record_id", "record_id"),
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
# Records that a reconciliation found to be gone: only what a later one finds gone as well is removed. What was removed
# stays listed for a while: its row may come back with its marks, as from a backup, and the ledger has forgotten it.
GONE_TABLE = sa.Table(
    "extraction_gone",
    METADATA,
    sa.Column("record_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("seen_at", UtcDateTime, nullable=False),
    sa.Column("purged_at", UtcDateTime),
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


def _index_waiting_requests(operations: Operations) -> None:
    """Index what a tick looks for; a role that may write rows and make no index goes on without it."""
    table, condition = REQUESTS_TABLE.name, NOT_CONSUMED
    try:
        with operations.get_bind().begin_nested():
            operations.create_index(
                "extraction_requests_waiting",
                table,
                ["id"],
                schema=schema_of(operations.get_bind().engine),
                postgresql_where=condition,
                sqlite_where=condition,
            )
    except sa.exc.ProgrammingError as error:
        _log.warning("Going on without the index extraction_requests_waiting: %s", type(error.orig).__name__)


def _add_claims(operations: Operations) -> None:
    """Add what fences the writers of a record, and what tells its file and its points from others."""
    for column in (
        sa.Column("claim", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("claimed_by", sa.String(64)),
        sa.Column("address", sa.String(16)),
        sa.Column("generation", sa.String(64)),
    ):
        operations.add_column(LEDGER_TABLE.name, column, schema=schema_of(operations.get_bind().engine))
    GONE_TABLE.create(operations.get_bind())
    write_meta(operations.get_bind(), {_CLAIM_BASE: "0"})


STEPS: dict[int, Callable[[Operations], None]] = {2: _index_waiting_requests, 3: _add_claims}


_WORK = (LEDGER_TABLE, ERRORS_TABLE)


def newest_version() -> int:
    """The version of the state tables that this release makes and reads."""
    return max(STEPS)


def schema_of(engine: sa.Engine) -> str | None:
    """The schema in which an engine's state tables lie; None for the database's default."""
    schemas: dict[str, str | None] = engine.get_execution_options().get("schema_translate_map") or {}
    return schemas.get(STATE_SCHEMA)


def state_version(engine: sa.Engine) -> int | None:
    """The version of the state tables that are there; None where there are none."""
    if not file_is_there(engine.url):
        return None
    with reading(engine, what="read the state tables") as connection:
        kept = _read(connection)
    return _version(kept) if kept else None


def prepare(engine: sa.Engine, source: str, *, told: str = "", creates: bool = True) -> SourceMark:
    """Make a source table's state tables where there are none, and migrate older ones; those of today stay untouched.

    Tables of another source in which no record was ever begun are what a trial left: they become this one's.

    Args:
        engine: The state database.
        source: The source's mark.
        told: The source in words.
        creates: Make, migrate and take over; otherwise only look, and find nothing wrong in what is still to be made.

    Returns:
        The mark, equal to those that the source had before it was taken over.

    Raises:
        StateError: They belong to another source table, or a newer release wrote them.
        RightsError: The database's user has no right to make or migrate them.
        SourceUnreachableError: The database can't be reached.
    """
    source = source if isinstance(source, SourceMark) else SourceMark(source)
    if not creates and not file_is_there(engine.url):
        return source
    with reading(engine, what="read the state tables") as connection:
        kept = _read(connection)
    is_current = bool(kept) and _is_current(engine, kept, source, told)
    if not creates or (is_current and source.with_former(_former(kept)) == kept.get(_SOURCE)):
        return source.with_former(_former(kept))
    newest = newest_version()
    what = f"migrate the state tables from version {_version(kept)} to {newest}" if kept else "create the state tables"
    with writing(engine, what=what) as connection:
        if engine.dialect.name == "postgresql":  # SQLite's writers wait for each other anyway
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        kept = _read(connection)
        if not kept:
            _make_schema(connection, schema_of(engine))
            METADATA.create_all(connection)
            # A fresh ledger over shards of an earlier one: its claims are newer than theirs.
            base = str(int(datetime.now(UTC).timestamp() * 1000))
            own = {_SOURCE: str(source), _TOLD: told, _VERSION: str(newest), _RELEASE: __version__, _CLAIM_BASE: base}
            write_meta(connection, own)
        elif not _is_current(engine, kept, source, told):  # else another process was first
            _migrate(connection, _version(kept), newest)
        elif source != kept.get(_SOURCE):
            _log.warning("The state tables of a trial, in which no record was begun, are now those of %s", told)
            write_meta(connection, {_SOURCE: str(source), _TOLD: told})
    return source.with_former(_former(kept))


def take_over(engine: sa.Engine, source: SourceMark, *, told: str) -> list[str]:
    """Let the state tables of a source that moved go on as those of its new address; safe to repeat.

    Returns:
        The marks that it had before; nothing where there are no tables yet.
    """
    with writing(engine, what="take over the state tables") as connection:
        kept = _read(connection)
        if not kept:
            return []
        former = sorted({*_former(kept), kept.get(_SOURCE, "")} - {str(source), ""})
        write_meta(connection, {_SOURCE: str(source), _TOLD: told, _FORMER: json.dumps(former)})
    return former


def _former(kept: dict[str, str]) -> list[str]:
    """The marks that the source had before it was taken over."""
    try:
        return [str(mark) for mark in json.loads(kept.get(_FORMER, "[]"))]
    except (ValueError, TypeError):
        return []


def _make_schema(connection: sa.Connection, schema: str | None) -> None:
    if schema is not None and schema not in sa.inspect(connection).get_schema_names():
        connection.execute(sa.schema.CreateSchema(schema, if_not_exists=True))


def _read(connection: sa.Connection) -> dict[str, str]:
    """What the tables say of themselves; nothing where there are none."""
    if not sa.inspect(connection).has_table(META_TABLE.name, schema=schema_of(connection.engine)):
        return {}
    own = (_SOURCE, _VERSION, _RELEASE, _TOLD, _FORMER)
    query = sa.select(META_TABLE.c.key, META_TABLE.c.value).where(META_TABLE.c.key.in_(own))
    return {row.key: row.value for row in connection.execute(query)}


def _is_empty(engine: sa.Engine) -> bool:
    """Whether no record was ever begun under these tables, and none failed."""
    with reading(engine, what="read the ledger") as connection:
        there = (connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() for table in _WORK)
        return not any(there)


def _place(engine: sa.Engine) -> str:
    """The database of the state tables, and their schema."""
    schema = schema_of(engine)
    return describe(engine.url) + (f", schema {schema}" if schema else "")


def _version(kept: dict[str, str]) -> int:
    text = kept.get(_VERSION, "1")
    if not text.isdecimal():
        raise StateError(f"their version is {text!r}, expected a number", "Restore them from a backup.")
    return int(text)


def _is_current(engine: sa.Engine, kept: dict[str, str], source: SourceMark, told: str) -> bool:
    """Whether the tables are of today's version; those that never can be used are refused."""
    is_own = source.with_former(_former(kept)) == kept.get(_SOURCE)
    if not is_own and not (_version(kept) == newest_version() and _is_empty(engine)):
        whose = kept.get(_TOLD) or "another source table or another address"
        raise StateError(
            f"those in {_place(engine)} belong to {whose}, not to {told or 'this one'}",
            "If it is the same table and its database moved, run 'extraction init --take-over'. If it is another "
            "table, give it state tables of its own: EXTRACTION_STATE_SCHEMA (PostgreSQL), or EXTRACTION_STATE_URL to "
            "another database.",
        )
    version, newest = _version(kept), newest_version()
    if version > newest:
        release = kept.get(_RELEASE, "unknown")
        raise StateError(
            f"those in {_place(engine)} have version {version}, written by release {release}; this release, "
            f"{__version__}, reads versions up to {newest}",
            f"Nothing was changed. Install extraction-dagster {release} or newer.",
        )
    return version == newest


def _migrate(connection: sa.Connection, version: int, newest: int) -> None:
    from alembic.migration import MigrationContext  # noqa: PLC0415 - 0.2 CPU s, and needed once in a database's life
    from alembic.operations import Operations  # noqa: PLC0415

    # First what needs the least rights, so that a user who may only read is refused before the line is logged.
    write_meta(connection, {_VERSION: str(newest), _RELEASE: __version__})
    where = describe(connection.engine.url)
    _log.warning("Migrating the state tables in %s from version %d to %d", where, version, newest)
    operations = Operations(MigrationContext.configure(connection))
    for number in range(version + 1, newest + 1):
        STEPS[number](operations)


def write_meta(connection: sa.Connection, values: Mapping[str, str]) -> None:
    """Keep texts in `extraction_meta`, each under its key; two processes may do so at once."""
    rows = insert_of(connection.engine)(META_TABLE).values([{"key": key, "value": values[key]} for key in values])
    connection.execute(rows.on_conflict_do_update(index_elements=["key"], set_={"value": rows.excluded.value}))


def lock_claim_base(connection: sa.Connection, *, to_raise: bool = False) -> int:
    """The number after which the claims of new entries begin; nobody raises it until the transaction ends."""
    query = sa.select(META_TABLE.c.value).where(META_TABLE.c.key == _CLAIM_BASE)
    return int(connection.execute(query.with_for_update(read=not to_raise)).scalar_one_or_none() or 0)


def raise_claim_base(connection: sa.Connection, number: int) -> None:
    """Let the claims of new entries begin above a number."""
    write_meta(connection, {_CLAIM_BASE: str(number)})


def note_purged(connection: sa.Connection, record_ids: Sequence[int], moment: datetime) -> None:
    """Note in the list of gone records that these are removed, whether it has them or not."""
    insert = insert_of(connection.engine)(GONE_TABLE)
    update = insert.on_conflict_do_update(index_elements=["record_id"], set_={"purged_at": insert.excluded.purged_at})
    rows = [{"record_id": key, "seen_at": moment, "purged_at": moment} for key in sorted(record_ids)]
    if rows:
        connection.execute(update, rows)
