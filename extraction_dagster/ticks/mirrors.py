"""Mirrors of the watermark, for people and programs that look for it in a JSON file or in a table.

They are one-way: the cursor store wins. Only when the cursor store is lost does a mirror speak.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, Protocol

import sqlalchemy as sa

from extraction_dagster.errors.base import ExtractionError
from extraction_dagster.errors.ticks import MirrorError
from extraction_dagster.files import read_small, write_atomically
from extraction_dagster.stages.catalog.database import describe, reading, writing
from extraction_dagster.stages.catalog.state_tables import UtcDateTime
from extraction_dagster.ticks.strict_json import parse_strictly

if TYPE_CHECKING:
    from pathlib import Path

    from extraction_dagster.settings import Settings

_MAX_BYTES = 64 * 1024
_MIN_ID, _MAX_ID = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class Reading:
    """What a mirror says.

    Attributes:
        state: `missing`, `ok`, or `corrupt`.
        last_processed_id: The watermark; None unless ok, and None for "before the first" too.
        why: What is wrong with a corrupt one.
    """

    state: Literal["missing", "ok", "corrupt"]
    last_processed_id: int | None = None
    why: str = ""


class Mirror(Protocol):
    """A copy of the watermark somewhere else."""

    @property
    def name(self) -> str:
        """Where it is, as it may be printed."""

    def read(self) -> Reading:
        """What it says.

        Raises:
            MirrorError: It can't be reached.
        """

    def write(self, last_processed_id: int | None, *, now: datetime) -> None:
        """Make it say something else, forwards or backwards.

        Raises:
            MirrorError: It can't be written; the old value stands.
        """

    def quarantine(self, *, now: datetime) -> str:
        """Move what is corrupt out of the way and say where it is.

        Raises:
            MirrorError: It can't be moved.
        """


class JsonMirror:
    """A JSON file: `{"last_processed_id": 12345, "updated_at": "2025-01-31T12:00:00Z"}`."""

    def __init__(self, path: Path) -> None:
        """Mirror to a file; its folder is made when it is missing."""
        self._path = path
        self.name = str(path)

    def read(self) -> Reading:
        """What the file says."""
        try:
            data = read_small(self._path, max_bytes=_MAX_BYTES)
        except ValueError as error:
            return Reading("corrupt", why=str(error))
        except OSError as error:
            raise MirrorError(self.name, "read", error.strerror or str(error)) from error
        return Reading("missing") if data is None else _read_json(data)

    def write(self, last_processed_id: int | None, *, now: datetime) -> None:
        """Replace the file at once."""
        document = {"last_processed_id": last_processed_id, "updated_at": f"{now.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, (json.dumps(document) + "\n").encode())
        except OSError as error:
            raise MirrorError(self.name, "written", error.strerror or str(error)) from error

    def quarantine(self, *, now: datetime) -> str:
        """Rename the file."""
        target = self._path.with_name(f"{self._path.name}.corrupt-{now.astimezone(UTC):%Y%m%dT%H%M%S%fZ}")
        try:
            self._path.rename(target)
        except OSError as error:
            raise MirrorError(self.name, "moved", error.strerror or str(error)) from error
        return str(target)


def _read_json(data: bytes) -> Reading:
    try:
        values = parse_strictly(data)
    except ValueError as error:
        return Reading("corrupt", why=f"it is no JSON object ({error})")
    if not isinstance(values, dict) or set(values) != {"last_processed_id", "updated_at"}:
        return Reading("corrupt", why="expected exactly the keys last_processed_id and updated_at")
    value = values["last_processed_id"]
    if value is not None and (type(value) is not int or not _MIN_ID <= value <= _MAX_ID):
        return Reading("corrupt", why="its last_processed_id is no integer that fits BIGINT")
    try:
        datetime.fromisoformat(str(values["updated_at"]))
    except ValueError:
        return Reading("corrupt", why="its updated_at is no time")
    return Reading("ok", value)


CHECKPOINT_TABLE = sa.Table(
    "extraction_checkpoint",
    sa.MetaData(),
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("updated_at", UtcDateTime),
)
# The id is the primary key, so that a plain upsert would add a row per value. This index allows one row in all.
_ONE_ROW = sa.text(
    "CREATE UNIQUE INDEX IF NOT EXISTS extraction_checkpoint_one_row ON extraction_checkpoint ((id IS NOT NULL))"
)


_WRITERS_LOCK = 0x636865636B70


class TableMirror:
    """The table `extraction_checkpoint(id BIGINT PRIMARY KEY, updated_at TIMESTAMPTZ)`, exactly one row."""

    def __init__(self, engine: sa.Engine) -> None:
        """Mirror to a table of this database; it is created when it is missing."""
        self._engine = engine
        self.name = f"table extraction_checkpoint at {describe(engine.url)}"

    def read(self) -> Reading:
        """What the table says."""
        try:
            with reading(self._engine, what="read the checkpoint table") as connection:
                if not sa.inspect(connection).has_table(CHECKPOINT_TABLE.name):
                    return Reading("missing")
                ids = list(connection.execute(sa.select(CHECKPOINT_TABLE.c.id).limit(2)).scalars())
        except ExtractionError as error:
            raise MirrorError(self.name, "read", str(error)) from error
        if len(ids) > 1:
            return Reading("corrupt", why="it has more than one row")
        if ids and type(ids[0]) is not int:  # SQLite keeps anything in any column
            return Reading("corrupt", why="its id is no integer")
        return Reading("ok", ids[0]) if ids else Reading("missing")

    def write(self, last_processed_id: int | None, *, now: datetime) -> None:
        """Replace the row in one transaction; no row when there is no watermark."""
        try:
            with writing(self._engine, what="write the checkpoint table") as connection:
                if connection.dialect.name == "postgresql":  # two that write at once would wait for each other for ever
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS_LOCK)))
                CHECKPOINT_TABLE.create(connection, checkfirst=True)
                connection.execute(sa.delete(CHECKPOINT_TABLE))
                connection.execute(_ONE_ROW)
                if last_processed_id is not None:
                    connection.execute(sa.insert(CHECKPOINT_TABLE).values(id=last_processed_id, updated_at=now))
        except (ExtractionError, sa.exc.SQLAlchemyError) as error:
            raise MirrorError(self.name, "written", str(error)) from error

    def quarantine(self, *, now: datetime) -> str:
        """Copy the rows into a table of their own; the next write replaces them."""
        target = f"extraction_checkpoint_corrupt_{now.astimezone(UTC):%Y%m%dt%H%M%S%f}"
        try:
            with writing(self._engine, what="quarantine the checkpoint table") as connection:
                copy = CHECKPOINT_TABLE.to_metadata(sa.MetaData(), name=target)
                copy.create(connection)
                connection.execute(copy.insert().from_select(["id", "updated_at"], sa.select(CHECKPOINT_TABLE)))
        except (ExtractionError, sa.exc.SQLAlchemyError) as error:
            raise MirrorError(self.name, "copied", str(error)) from error
        return f"table {target}"


def make_mirror(settings: Settings, state_engine: sa.Engine) -> Mirror | None:
    """The mirror that the settings ask for; None for none."""
    if settings.checkpoint_mirror == "json":
        return JsonMirror(settings.checkpoint_path or settings.home / ".checkpoint")
    return TableMirror(state_engine) if settings.checkpoint_mirror == "table" else None
