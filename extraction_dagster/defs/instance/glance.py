"""What Dagster's storage says, read without Dagster, whose import costs more than all else that a look needs.

Only out of this project's own storage (`defs/storage.py`), in the layout that is known here, and only what a command
asks that has nothing to do: where the cursor is, and whether anything goes on. Whatever is otherwise than expected is
no answer, and the caller asks Dagster, which has the words for it. `test_glance.py` holds both answers equal.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import sqlalchemy as sa

from extraction_dagster.defs.instance import LOCATION_NAME, SENSOR_NAME
from extraction_dagster.errors import ExtractionError
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.database import make_engine

_REVISION = "29b539ebc72a"  # of Dagster's tables, by the name of its newest migration
_FILES = {"runs": "history/runs.db", "events": "history/runs/index.db", "sensors": "schedules/schedules.db"}
_ACTIVE = ("NOT_STARTED", "QUEUED", "STARTING", "STARTED", "CANCELING")
_HEARTBEAT_SECONDS = 180.0  # after so long without one a daemon counts as gone
_RATE_SECONDS = 900.0
_MOST_EVENTS = 200
_FEWEST_EVENTS = 5  # ranges that take long end seldom: fewer say little


@dataclass(frozen=True, slots=True)
class Glance:
    """What Dagster's storage says at one moment.

    Attributes:
        cursor: The sensor's; None when there is none.
        num_active: Runs that are queued or at work.
        goes_on: Whether anything goes on that a tick has to know of: an active run, a backfill that was asked for, a
            slot of a pool that is held, a daemon that gave a heartbeat within three minutes.
        videos_per_second: Over the newest runs; None when none has ended lately, or where it was not asked for.
    """

    cursor: str | None
    num_active: int
    goes_on: bool
    videos_per_second: float | None = None


def glance(settings: Settings, *, with_rate: bool = False) -> Glance | None:
    """Look once; None when only Dagster can tell."""
    with suppress(sa.exc.SQLAlchemyError, ExtractionError, OSError, ValueError, LookupError, TypeError, AttributeError):
        if _is_ours():
            with _storage(settings) as storage:
                return _look(storage, with_rate=with_rate)
    return None


def template(name: str) -> str:
    """The text of a configuration file that this package carries."""
    return (resources.files("extraction_dagster") / "templates" / name).read_text()


def _is_ours() -> bool:
    """Whether the instance keeps its data in this project's storage.

    DAGSTER_HOME's file may have other values than ours, of runs at a time say; another section is for Dagster to judge.
    """
    home = os.environ.get("DAGSTER_HOME")
    if not home:
        return True
    said, ours = (_sections(text) for text in (Path(home, "dagster.yaml").read_text(), template("dagster.yaml")))
    return said.keys() <= ours.keys() and said.get("storage") == ours["storage"]


def _sections(text: str) -> dict[str, list[str]]:
    """The lines of each section of a dagster.yaml in our style, without comments.

    Raises:
        ValueError: It is written otherwise.
    """
    found, section = dict[str, list[str]](), list[str]()
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not line[0].isspace():
            name, _, rest = line.partition(":")
            if not name.isidentifier() or name in found or rest.strip():
                raise ValueError(f"a section begins with {line!r}")
            section = found[name] = []
        section.append(line.rstrip())
    return found


@contextmanager
def _storage(settings: Settings) -> Iterator[Mapping[str, sa.Connection]]:
    """Connections to the tables of runs, events and sensors, each of the layout known here; nothing is made."""
    with ExitStack() as opened:
        if settings.postgres_url is not None:
            engine = make_engine(settings.postgres_url.get_secret_value(), setting="EXTRACTION_POSTGRES_URL")
            opened.callback(engine.dispose)
            connections = dict.fromkeys(_FILES, opened.enter_context(engine.connect()))
        else:
            folder = settings.home / "dagster"
            connections = {name: opened.enter_context(_read_only(folder / file)) for name, file in _FILES.items()}
        for connection in dict.fromkeys(connections.values()):
            if (found := connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()) != _REVISION:
                raise ValueError(f"Dagster's tables are of revision {found}")
        yield connections


@contextmanager
def _read_only(path: Path) -> Iterator[sa.Connection]:
    url = sa.URL.create("sqlite", database=f"file:{quote(str(path))}", query={"mode": "ro", "uri": "true"})
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        yield connection


def _look(storage: Mapping[str, sa.Connection], *, with_rate: bool) -> Glance:
    num_active = _count(storage["runs"], "runs", "status", _ACTIVE)
    goes_on = (
        num_active > 0
        or _count(storage["runs"], "bulk_actions", "status", ("REQUESTED",)) > 0
        or storage["events"].execute(sa.text("SELECT 1 FROM pending_steps LIMIT 1")).first() is not None
        or any(time.time() - beat["timestamp"] <= _HEARTBEAT_SECONDS for beat in _bodies(storage["runs"]))
    )
    made = _Materializations(storage["events"], "qdrant_points") if with_rate else None
    rate = rates(made, ("videos",), is_busy=lambda: num_active > 0) if made else {}
    return Glance(_cursor(storage["sensors"]), num_active, goes_on, rate.get("videos"))


def _count(connection: sa.Connection, table: str, column: str, values: Sequence[str]) -> int:
    query = sa.select(sa.func.count()).select_from(sa.table(table)).where(sa.column(column).in_(values))
    return int(connection.execute(query).scalar_one())


def _bodies(connection: sa.Connection) -> list[dict[str, Any]]:
    return [json.loads(body) for (body,) in connection.execute(sa.text("SELECT body FROM daemon_heartbeats"))]


def _cursor(connection: sa.Connection) -> str | None:
    """As `CursorStore.read` finds it: the state of the location of workspace.yaml comes first."""
    query = sa.text("SELECT instigator_body FROM instigators WHERE instigator_type = 'SENSOR'")
    states = [json.loads(body) for (body,) in connection.execute(query)]
    own = [(_location(state), state) for state in states if state["origin"]["job_name"] == SENSOR_NAME]
    own.sort(key=lambda item: item[0] != LOCATION_NAME)
    data = own[0][1]["job_specific_data"] if own else None
    cursor = data["cursor"] if data else None
    if not isinstance(cursor, str | None):
        raise TypeError(f"a cursor is a {type(cursor).__name__}")
    return cursor


def _location(state: Mapping[str, Any]) -> str:
    return str(state["origin"]["external_repository_origin"]["repository_location_origin"]["location_name"])


class Made(Protocol):
    """A materialization."""

    @property
    def timestamp(self) -> float:
        """When it was made, in seconds since the epoch."""

    def number(self, name: str) -> int:
        """A number of its metadata; 0 where there is none of this name."""


class Finds(Protocol):
    """Finds the newest materializations of an asset, newest first."""

    def __call__(self, limit: int, *, after: float | None = None, before: float | None = None) -> Sequence[Made]:
        """At most so many, made between two moments."""


def rates(found: Finds, names: Sequence[str], *, is_busy: Callable[[], bool]) -> dict[str, float]:
    """What was made a second over the newest runs, by the name of the number; nothing when none has ended lately."""
    now = time.time()
    records, since = _newest(found, now, is_busy)
    seconds = max(now - since, 1.0)
    return {name: round(sum(made.number(name) for made in records) / seconds, 4) for name in names if records}


def _newest(found: Finds, now: float, is_busy: Callable[[], bool]) -> tuple[Sequence[Made], float]:
    """The materializations that a rate is made of, and the moment since when they were made.

    Those of the last quarter of an hour; and where they are few, for ranges that take long, the newest five while runs
    are at work. Where nothing older than the oldest is known, that one only says since when.
    """
    start = now - _RATE_SECONDS
    records = found(_MOST_EVENTS, after=start)
    if _FEWEST_EVENTS <= len(records) < _MOST_EVENTS and found(1, before=start):
        return records, start
    if not records and not is_busy():
        return (), start
    if len(records) < _FEWEST_EVENTS:
        records = found(_FEWEST_EVENTS)
    return (records[:-1], records[-1].timestamp) if records else ((), start)


class _Event:
    """A materialization as the event log keeps it."""

    def __init__(self, text: str) -> None:
        event = json.loads(text)
        self.timestamp = float(event["timestamp"])
        self._entries = event["dagster_event"]["event_specific_data"]["materialization"]["metadata_entries"]

    def number(self, name: str) -> int:
        values = [entry["entry_data"] for entry in self._entries if entry["label"] == name]
        return next((value["value"] for value in values if value["__class__"] == "IntMetadataEntryData"), 0)


class _Materializations:
    """Those of an asset: `_MOST_EVENTS` of them, no more are asked for."""

    def __init__(self, connection: sa.Connection, asset: str) -> None:
        key = {"key": json.dumps([asset])}
        wiped = "SELECT 1 FROM asset_keys WHERE asset_key = :key AND wipe_timestamp IS NOT NULL"
        if connection.execute(sa.text(wiped), key).first() is not None:
            raise ValueError(f"{asset} was wiped: what was before does not count")
        newest = (
            "SELECT event FROM event_logs WHERE asset_key = :key AND dagster_event_type = 'ASSET_MATERIALIZATION' "
            "ORDER BY id DESC LIMIT :most"
        )
        found = connection.execute(sa.text(newest), {**key, "most": _MOST_EVENTS})
        self._events = [_Event(text) for (text,) in found]

    def __call__(self, limit: int, *, after: float | None = None, before: float | None = None) -> Sequence[_Event]:
        wanted = (
            event
            for event in self._events
            if (after is None or event.timestamp > after) and (before is None or event.timestamp < before)
        )
        return list(islice(wanted, limit))
