"""Mirrors of the watermark, for people and programs that look for it in a JSON file or in a table.

They are one-way: the cursor store wins, and each tick makes the mirror say the same. Only when the cursor store is lost
is a mirror's watermark adopted. At the end: the checkpoint that an earlier script left in such a file or table.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from extraction_dagster.errors import ExtractionError, one_line
from extraction_dagster.errors.runs import LegacyCheckpointError, LostCursorError, MirrorError
from extraction_dagster.files import read_small, write_atomically
from extraction_dagster.stages.catalog.database import STATE_SCHEMA, describe, quiet_reflection, reading, writing
from extraction_dagster.stages.catalog.state_tables import UtcDateTime, schema_of
from extraction_dagster.ticks.cursor import MAX_BYTES, is_id, parse_strictly

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from extraction_dagster.settings import Settings

_WRITERS_LOCK = 0x636865636B70
_MOST_ROWS = 1000
_LEGACY_NAMES = ("last_processed_id", "last_id", "id")


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


class JsonMirror:
    """A JSON file: `{"last_processed_id": 12345, "updated_at": "2025-01-31T12:00:00Z"}`; its folder is made.

    Each method raises MirrorError when the file can't be reached; what was written before stands.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = str(path)

    def read(self) -> Reading:
        """What the file says."""
        try:
            with _translated(self.name, "read"):
                data = read_small(self._path, max_bytes=MAX_BYTES)
        except ValueError as error:
            return Reading("corrupt", why=str(error))
        return Reading("missing") if data is None else _read_json(data)

    def write(self, last_processed_id: int | None, *, now: datetime) -> None:
        """Replace the file at once."""
        document = {"last_processed_id": last_processed_id, "updated_at": f"{now.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        with _translated(self.name, "written"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, (json.dumps(document) + "\n").encode())

    def quarantine(self, *, now: datetime) -> str:
        """Rename the file."""
        target = self._path.with_name(f"{self._path.name}.corrupt-{now.astimezone(UTC):%Y%m%dT%H%M%S%fZ}")
        with _translated(self.name, "moved"):
            self._path.rename(target)
        return str(target)


def _read_json(data: bytes) -> Reading:
    try:
        values = parse_strictly(data)
    except ValueError as error:
        return Reading("corrupt", why=f"it is no JSON object ({error})")
    if not isinstance(values, dict) or set(values) != {"last_processed_id", "updated_at"}:
        return Reading("corrupt", why="expected exactly the keys last_processed_id and updated_at")
    value = values["last_processed_id"]
    if value is not None and not is_id(value):
        return Reading("corrupt", why="its last_processed_id is no integer that fits BIGINT")
    try:
        datetime.fromisoformat(str(values["updated_at"]))
    except ValueError:
        return Reading("corrupt", why="its updated_at is no time")
    return Reading("ok", value)


_NAME = "extraction_checkpoint"
CHECKPOINT_TABLE = sa.Table(
    _NAME,
    sa.MetaData(schema=STATE_SCHEMA),
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("updated_at", UtcDateTime),
)
# The id is the primary key, so that a plain upsert would add a row per value. This index allows one row in all.
_ONE_ROW = f"CREATE UNIQUE INDEX IF NOT EXISTS {_NAME}_one_row ON {{table}} ((id IS NOT NULL))"
_OWN_COLUMNS = {column.name for column in CHECKPOINT_TABLE.c}


class TableMirror:
    """The table `extraction_checkpoint(id BIGINT PRIMARY KEY, updated_at TIMESTAMPTZ)`, exactly one row.

    Each method raises MirrorError when the table can't be reached; the first write makes it.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self.name = f"table extraction_checkpoint at {describe(engine.url)}"

    def read(self) -> Reading:
        """What the table says."""
        with _translated(self.name, "read"), reading(self._engine, what="read the checkpoint table") as connection:
            if not self._is_there(connection):
                return Reading("missing")
            ids = list(connection.execute(sa.select(CHECKPOINT_TABLE.c.id).limit(2)).scalars())
        if len(ids) > 1:
            return Reading("corrupt", why="it has more than one row")
        if ids and type(ids[0]) is not int:  # SQLite keeps anything in any column
            return Reading("corrupt", why="its id is no integer")
        return Reading("ok", ids[0]) if ids else Reading("missing")

    def write(self, last_processed_id: int | None, *, now: datetime) -> None:
        """Replace the row in one transaction; no row when there is no watermark."""
        with _translated(self.name, "written"), writing(self._engine, what="write the checkpoint table") as connection:
            if connection.dialect.name == "postgresql":  # two that write at once would deadlock
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS_LOCK)))
            if not self._is_there(connection):
                CHECKPOINT_TABLE.create(connection)
            connection.execute(sa.delete(CHECKPOINT_TABLE))
            quote, schema = connection.dialect.identifier_preparer.quote, schema_of(connection.engine)
            name = f"{quote(schema)}.{_NAME}" if schema else _NAME
            connection.exec_driver_sql(_ONE_ROW.format(table=name))
            if last_processed_id is not None:
                connection.execute(sa.insert(CHECKPOINT_TABLE).values(id=last_processed_id, updated_at=now))

    def _is_there(self, connection: sa.Connection) -> bool:
        """Whether there is a table of that name; one of another shape is somebody else's and stays as it is."""
        inspector, schema = sa.inspect(connection), schema_of(connection.engine)
        if not inspector.has_table(_NAME, schema=schema):
            return False
        columns = [column["name"] for column in inspector.get_columns(_NAME, schema=schema)]
        if set(columns) != _OWN_COLUMNS:
            raise MirrorError(
                self.name,
                "used",
                f"it is not ours: it has the columns {', '.join(columns)}, ours has id and updated_at. It was left as "
                "it is; 'extraction checkpoint import' reads an earlier script's",
            )
        return True

    def quarantine(self, *, now: datetime) -> str:
        """Copy the rows into a table of their own; the next write replaces them."""
        target = f"extraction_checkpoint_corrupt_{now.astimezone(UTC):%Y%m%dt%H%M%S%f}"
        with _translated(self.name, "copied"), writing(self._engine, what="copy the checkpoint table") as connection:
            copy = CHECKPOINT_TABLE.to_metadata(sa.MetaData(), name=target)
            copy.create(connection)
            connection.execute(copy.insert().from_select(["id", "updated_at"], sa.select(CHECKPOINT_TABLE)))
        return f"table {target}"


@contextmanager
def _translated(name: str, action: str) -> Iterator[None]:
    try:
        yield
    except MirrorError:
        raise
    except OSError as error:
        raise MirrorError(name, action, error.strerror or str(error)) from error
    except (ExtractionError, sa.exc.SQLAlchemyError) as error:
        raise MirrorError(name, action, str(error)) from error


Mirror = JsonMirror | TableMirror


def make_mirror(settings: Settings, state_engine: sa.Engine) -> Mirror | None:
    """The mirror that the settings ask for; None for none."""
    if settings.checkpoint_mirror == "json":
        return JsonMirror(settings.checkpoint_path or settings.home / ".checkpoint")
    return TableMirror(state_engine) if settings.checkpoint_mirror == "table" else None


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person should read in the log."""

    level: Literal["info", "warning", "error"]
    text: str


def follow(mirror: Mirror, last_processed_id: int | None, *, now: datetime) -> list[Notice]:
    """Make the mirror say what the cursor says; the cursor wins. A mirror that fails never stops a tick."""
    notices, name = list[Notice](), mirror.name
    try:
        found = mirror.read()
        mirrored = found.last_processed_id
        if found.state == "corrupt":
            kept = mirror.quarantine(now=now)
            notices.append(Notice("error", f"Checkpoint mirror {name} was corrupt: {found.why}. Kept as {kept}."))
        elif mirrored == last_processed_id and (found.state == "ok" or last_processed_id is None):
            return []
        elif mirrored is not None and (last_processed_id is None or mirrored > last_processed_id):
            text = f"Checkpoint mirror {name} said {mirrored}, ahead of the cursor: rewritten."
            notices.append(Notice("warning", text))
        mirror.write(last_processed_id, now=now)
    except MirrorError as error:
        return [Notice("warning", str(error))]
    return notices


def adopt(mirror: Mirror) -> int | None:
    """The watermark to start from when the cursor store has none.

    A mirror that can't be reached says nothing: the rows know what is done, and `follow` warns of it.

    Raises:
        LostCursorError: The mirror is corrupt: with both lost, only the operator can say where to start.
    """
    try:
        found = mirror.read()
    except MirrorError:
        return None
    if found.state == "corrupt":
        raise LostCursorError(mirror.name, found.why)
    return found.last_processed_id


@dataclass(frozen=True, slots=True)
class LegacyCheckpoint:
    """The last processed id of an earlier script, and where it was read, in words."""

    last_processed_id: int
    told: str


def read_legacy_checkpoint(file: Path | None, *engines: sa.Engine) -> LegacyCheckpoint:
    """The last processed id of an earlier script.

    Args:
        file: A file that holds a number, or a JSON object with `last_processed_id`, `last_id` or `id`; None to read
            the table.
        engines: Databases that may have the table `extraction_checkpoint`; the first that has it is asked. Of its
            columns the first of these three names counts. Several rows must agree; but of a table that has an `id` and
            no more than times beside it, each id was the watermark once, and the greatest counts.

    Raises:
        LegacyCheckpointError: There is none, or it can't be understood.
    """
    return _from_table(engines) if file is None else _from_file(file)


def _from_file(file: Path) -> LegacyCheckpoint:
    try:
        data = read_small(file, max_bytes=MAX_BYTES)
    except (OSError, ValueError) as error:
        raise LegacyCheckpointError(str(file), f"it can't be read ({error})") from None
    if data is None:
        raise LegacyCheckpointError(str(file), "there is no such file")
    try:
        value = parse_strictly(data)
    except ValueError:
        raise LegacyCheckpointError(str(file), "it is neither JSON nor a number") from None
    told = f"file {file}"
    if isinstance(value, dict):
        name = next((name for name in _LEGACY_NAMES if name in value), None)
        value, told = (value[name], f"{told}, key {name}") if name else (None, told)
    if not is_id(value):
        raise LegacyCheckpointError(str(file), "it holds no last_processed_id that is an integer")
    return LegacyCheckpoint(value, told)


def _from_table(engines: Sequence[sa.Engine]) -> LegacyCheckpoint:
    for engine in engines:
        where = f"table {_NAME} at {describe(engine.url)}"
        with reading(engine, what="read the checkpoint table") as connection, quiet_reflection():
            if not sa.inspect(connection).has_table(_NAME):
                continue
            table = sa.Table(_NAME, sa.MetaData(), autoload_with=connection)
            column = next((table.c[name] for name in _LEGACY_NAMES if name in table.c), None)
            if column is None:
                found = ", ".join(table.c.keys())
                raise LegacyCheckpointError(where, f"it has none of {', '.join(_LEGACY_NAMES)} (it has: {found})")
            shown = [item if item is column else sa.cast(item, sa.Text).label(item.name) for item in table.c]
            query = sa.select(*shown).where(column.is_not(None)).order_by(column.desc()).limit(_MOST_ROWS)
            rows = connection.execute(query).mappings().all()
        return _chosen(where, table, column, [dict(row) for row in rows])
    names = dict.fromkeys(f"table {_NAME} at {describe(engine.url)}" for engine in engines)
    raise LegacyCheckpointError(" or ".join(names), "there is no such table")


def _chosen(where: str, table: sa.Table, column: sa.Column[Any], rows: Sequence[Mapping[str, Any]]) -> LegacyCheckpoint:
    """The watermark of the rows, the greatest first; what could be read in two ways is refused."""
    if not rows:
        raise LegacyCheckpointError(where, "it has no row")
    values = list(dict.fromkeys(row[column.name] for row in rows))
    others = [other.name for other in table.c if not isinstance(other.type, sa.DateTime | sa.Date)]
    if column.name == "id" and others != ["id"] and len(rows) > 1:
        raise LegacyCheckpointError(where, f"its column id may number its rows (it has: {', '.join(table.c.keys())})")
    if column.name != "id" and len(values) > 1:
        said = ", ".join(map(str, values[:5]))
        raise LegacyCheckpointError(where, f"its rows say different values of {column.name}: {said}")
    if not is_id(values[0]):
        raise LegacyCheckpointError(where, f"it holds an {column.name} that is no integer")
    row = ", ".join(f"{name}={value}" for name, value in rows[0].items())
    return LegacyCheckpoint(values[0], f"{where}, column {column.name}, row {one_line(row, 200)}")
