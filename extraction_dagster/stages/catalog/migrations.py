"""The version of the state tables, and the steps from each version to the next.

    version 1   the tables of release 0.1.0, which wrote no version down
    version 2   an index over the requests that no tick has consumed: each tick asks for them

`extraction_meta` holds the version, and the release that wrote it. Tables of an older version are migrated when they
are opened: in one transaction, so that a killed process leaves the old version or the new one, and under a lock, so
that of processes that start at once one migrates and the others find it done. A newer version is refused.

A new version: change `state_tables.METADATA`, and add a step to `STEPS` that changes tables of the version before.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import sqlalchemy as sa

from extraction_dagster import __version__
from extraction_dagster.errors.catalog import StateError
from extraction_dagster.stages.catalog.database import describe, reading, writing
from extraction_dagster.stages.catalog.state_tables import META_TABLE, METADATA, NOT_CONSUMED, insert_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from alembic.operations import Operations

_log = logging.getLogger(__name__)
_SOURCE, _VERSION, _RELEASE = "source", "state_version", "state_release"
_LOCK = 0x657874726163


def _index_waiting_requests(operations: Operations) -> None:
    operations.create_index(
        "extraction_requests_waiting",
        "extraction_requests",
        ["id"],
        postgresql_where=NOT_CONSUMED,
        sqlite_where=NOT_CONSUMED,
    )


STEPS: dict[int, Callable[[Operations], None]] = {2: _index_waiting_requests}


def newest_version() -> int:
    """The version of the state tables that this release makes and reads."""
    return max(STEPS)


def prepare(engine: sa.Engine, source_identity: str) -> None:
    """Make the state tables where there are none, and migrate older ones; nothing is written to those of today.

    Args:
        engine: Of the state's database.
        source_identity: Which source table they are to belong to.

    Raises:
        StateError: They belong to another source table, or a newer release wrote them.
        SourceUnreachableError: The database can't be reached, or its user has no right to make or migrate them.
    """
    with reading(engine, what="read the state tables") as connection:
        kept = _read(connection)
    if _is_current(engine, kept, source_identity):
        return
    newest = newest_version()
    what = f"migrate the state tables from version {_version(kept)} to {newest}" if kept else "create the state tables"
    with writing(engine, what=what) as connection:
        if engine.dialect.name == "postgresql":  # SQLite's writers wait for each other anyway
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        kept = _read(connection)
        if _is_current(engine, kept, source_identity):  # another process was first
            return
        if kept:
            _migrate(connection, _version(kept), newest)
        else:
            METADATA.create_all(connection)
            _keep(connection, {_SOURCE: source_identity, _VERSION: str(newest), _RELEASE: __version__})


def _read(connection: sa.Connection) -> dict[str, str]:
    """What the tables say of themselves; nothing where there are none."""
    if not sa.inspect(connection).has_table(META_TABLE.name):
        return {}
    query = sa.select(META_TABLE.c.key, META_TABLE.c.value).where(META_TABLE.c.key.in_((_SOURCE, _VERSION, _RELEASE)))
    return {row.key: row.value for row in connection.execute(query)}


def _version(kept: dict[str, str]) -> int:
    text = kept.get(_VERSION, "1")
    if not text.isdecimal():
        raise StateError(f"their version is {text!r}, expected a number", "Restore them from a backup.")
    return int(text)


def _is_current(engine: sa.Engine, kept: dict[str, str], source_identity: str) -> bool:
    """Whether the tables can be used as they are; those that never can be are refused."""
    if not kept:
        return False
    if kept.get(_SOURCE) != source_identity:
        raise StateError(
            f"those in {describe(engine.url)} belong to another source table (its mark is {kept.get(_SOURCE)}, this "
            f"one's is {source_identity})",
            "Set EXTRACTION_STATE_URL to a database of its own for each source table.",
        )
    version, newest = _version(kept), newest_version()
    if version > newest:
        release = kept.get(_RELEASE, "unknown")
        raise StateError(
            f"those in {describe(engine.url)} have version {version}, written by release {release}; this release, "
            f"{__version__}, reads versions up to {newest}",
            f"Nothing was changed. Install extraction-dagster {release} or newer.",
        )
    return version == newest


def _migrate(connection: sa.Connection, version: int, newest: int) -> None:
    from alembic.migration import MigrationContext  # noqa: PLC0415 - 0.2 CPU s, and needed once in a database's life
    from alembic.operations import Operations  # noqa: PLC0415

    # First what needs the least rights, so that a user who may only read is refused before the line is logged.
    _keep(connection, {_VERSION: str(newest), _RELEASE: __version__})
    where = describe(connection.engine.url)
    _log.warning("Migrating the state tables in %s from version %d to %d", where, version, newest)
    operations = Operations(MigrationContext.configure(connection))
    for number in range(version + 1, newest + 1):
        STEPS[number](operations)


def _keep(connection: sa.Connection, values: dict[str, str]) -> None:
    rows = insert_of(connection.engine)(META_TABLE).values([{"key": key, "value": values[key]} for key in values])
    connection.execute(rows.on_conflict_do_update(index_elements=["key"], set_={"value": rows.excluded.value}))
