"""The figures of the metrics, and what takes them: the cheap ones at each scrape, the census now and then.

`measure` costs the same whatever the table's size; its `Progress` is the one of `extraction status` and of the charts
in Dagster's UI. `count` reads the whole table and ledger, and is paced so that it takes two per cent of the time.
`exposition.py` gives the figures their names.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from extraction_dagster.errors import ExtractionError
from extraction_dagster.errors.index import CollectionMissingError, StoreBusyError
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.catalog import Catalog
from extraction_dagster.stages.catalog.error_retention import removed_errors
from extraction_dagster.stages.index.stage import open_point_store
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.memory import recall_text, remember_text
from extraction_dagster.ticks.mirrors import make_mirror
from extraction_dagster.watch.progress import Progress, measure_progress, recall_progress, remember_progress, whole_lag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import sqlalchemy as sa

    from extraction_dagster.settings import Settings

_log = logging.getLogger(__name__)
_CENSUS_KEY = "metrics_census"
_EVERY_ID = IdRange(-(2**63), 2**63 - 1)
_MOST_SECONDS_A_CALL = 10.0  # to a Qdrant server: what can't be counted now is counted another time
_REMEMBER_EVERY = timedelta(minutes=1)  # not at each scrape
_LEAST_CENSUS_SECONDS = 60.0
_CENSUS_SHARE = 50  # a census that takes a second is taken every 50 s at most


@dataclass(frozen=True, slots=True)
class InstanceFigures:
    """What Dagster's instance says.

    Attributes:
        cursor: The sensor's cursor as it is stored; None before the first tick.
        runs: Runs that have not ended, by status.
        ended_runs: Runs that ended within the last hour, by status.
        last_tick_at: When the sensor last ticked, in seconds since the epoch; None before the first tick.
        is_switched_on: Whether the sensor is on: it was not stopped.
        daemons: Whether each daemon that is needed lives.
        rates: Videos, frames and points a second, of those that were made lately.
    """

    cursor: str | None
    runs: Mapping[str, int]
    ended_runs: Mapping[str, int]
    last_tick_at: float | None
    is_switched_on: bool
    daemons: Mapping[str, bool]
    rates: Mapping[str, float]


class MirrorFigures(NamedTuple):
    """The mirror of the checkpoint: ok, missing, behind, ahead, corrupt or unreachable; and its last processed id."""

    state: str
    last_processed_id: int | None


@dataclass(frozen=True, slots=True)
class Census:
    """Every row counted.

    Attributes:
        taken_at: When, in seconds since the epoch.
        seconds: How long it took.
        rows: Eligible rows by state: done, pending.
        lag_rows: Eligible rows above the watermark and the floor that are neither done nor parked.
        frames: Stored frames of the rows that are done.
        points: Verified points of the rows that are done.
        errors: Errors ever recorded, by stage and type.
        collection_points: What the collection holds; None when it could not be asked.
        collection_counted_at: When it was last asked; None when it never could be.
        collection_is_up: Whether the collection could be asked, or is merely held by a run.
    """

    taken_at: float
    seconds: float
    rows: Mapping[str, int]
    lag_rows: int
    frames: int
    points: int
    errors: Mapping[tuple[str, str], int] = field(default_factory=dict)
    collection_points: int | None = None
    collection_counted_at: float | None = None
    collection_is_up: bool = True


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that one scrape shows; what could not be read is None.

    Attributes:
        at: When, in seconds since the epoch.
        seconds: How long it took, without the census.
        parts: Whether each part could be read: table, dagster, cursor, and mirror where there is one.
        instance: Dagster's part.
        progress: The part of the table, the ledger and the cursor.
        mirror: The mirror's part.
    """

    at: float
    seconds: float
    parts: Mapping[str, bool]
    instance: InstanceFigures | None = None
    progress: Progress | None = None
    mirror: MirrorFigures | None = None


def census_seconds(census: Census) -> float:
    """For how long a census need not be repeated."""
    return max(_LEAST_CENSUS_SECONDS, _CENSUS_SHARE * census.seconds)


def recall_census(engine: sa.Engine) -> Census | None:
    """The newest census, for a cron job has no other memory; None when there is none that can be read."""
    try:
        values = json.loads(recall_text(engine, _CENSUS_KEY) or "")
        errors = {(str(stage), str(kind)): int(number) for stage, kind, number in values.pop("errors")}
        return Census(**values, errors=errors)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def remember_census(engine: sa.Engine, census: Census) -> None:
    """Keep a census for the next call."""
    errors = [[stage, kind, number] for (stage, kind), number in census.errors.items()]
    remember_text(engine, _CENSUS_KEY, json.dumps({**asdict(census), "errors": errors}))


def _all_errors(catalog: Catalog) -> dict[tuple[str, str], int]:
    """How many errors were ever recorded, by stage and type: those that are there, and those removed since."""
    return dict(removed_errors(catalog.state_engine) + Counter(catalog.ledger.error_counts()))


class Meter:
    """Takes figures; keeps its connections from one time to the next, and opens none before the first.

    Args:
        settings: Where everything is.
        read_instance: Asks Dagster's instance.
    """

    def __init__(self, settings: Settings, read_instance: Callable[[], InstanceFigures]) -> None:
        self._settings, self._read_instance = settings, read_instance
        limit = min(settings.qdrant_timeout_seconds, _MOST_SECONDS_A_CALL)
        self._hasty_settings = settings.model_copy(update={"qdrant_timeout_seconds": limit})
        self._catalog: Catalog | None = None
        self._faults: dict[str, str] = {}

    def close(self) -> None:
        """Give the connections back."""
        if self._catalog is not None:
            self._catalog.close()
            self._catalog = None

    def measure(self) -> Figures:
        """Take the cheap figures; never fails, whatever is down."""
        started, now = time.perf_counter(), time.time()
        parts: dict[str, bool] = {}
        instance = catalog = cursor = progress = mirror = None
        with self._part("dagster", parts):
            instance = self._read_instance()
        with self._part("table", parts):
            self._opened().source.counts([_EVERY_ID], at_most=1)
            catalog = self._opened()
        if instance is not None and catalog is not None:
            with self._part("cursor", parts):
                source, stored = catalog.source.identity, instance.cursor  # None before the first tick
                cursor = CursorState.from_json(stored, source=source) if stored else CursorState(source)
        if instance is not None and catalog is not None and cursor is not None:
            with self._part("table", parts):
                progress = self._progress(catalog, cursor, instance, now)
            mirror = self._mirror(catalog, cursor.last_processed_id, parts)
        return Figures(now, time.perf_counter() - started, parts, instance, progress, mirror)

    def count(self, after_id: int | None, floor_id: int | None) -> Census:
        """Count every row, unless that was done a while ago.

        Args:
            after_id: Above which id rows lag.
            floor_id: The operator's floor: rows at or below are not pending.

        Raises:
            ExtractionError: The table or the ledger can't be read.
        """
        catalog = self._opened()
        before = recall_census(catalog.state_engine)
        now, started = time.time(), time.perf_counter()
        if before is not None and 0 <= now - before.taken_at < census_seconds(before):
            return before
        status = catalog.status(floor_id=floor_id)
        rows = {name: int(status[name] or 0) for name in ("done", "pending")}
        frames, points = catalog.ledger.totals()
        lag, errors = whole_lag(catalog, after_id, status), _all_errors(catalog)
        held, is_up = self._count_points()
        counted_at = None if held is None else now
        if held is None and before is not None:  # a run holds the store: what was counted before is the best there is
            held, counted_at = before.collection_points, before.collection_counted_at
        census = Census(now, 0.0, rows, lag, frames, points, errors, held, counted_at, is_up)
        census = replace(census, seconds=time.perf_counter() - started)
        with contextlib.suppress(ExtractionError):
            remember_census(catalog.state_engine, census)
        return census

    @contextlib.contextmanager
    def _part(self, name: str, parts: dict[str, bool]) -> Iterator[None]:
        """Take a part; what goes wrong is logged once, until it changes."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a database or Dagster throws, the other parts are shown
            parts[name] = False
            why = str(error).partition("\n")[0]
            if self._faults.get(name) != why:
                _log.warning("The figures of part %r can't be read: %s", name, why)
            self._faults[name] = why
            self.close()  # opened again next time
        else:
            parts[name] = True
            self._faults.pop(name, None)

    def _opened(self) -> Catalog:
        if self._catalog is None:
            self._catalog = Catalog(self._settings)
        return self._catalog

    def _progress(self, catalog: Catalog, cursor: CursorState, instance: InstanceFigures, now: float) -> Progress:
        memory = recall_progress(catalog.state_engine)  # of the sensor's looks as well
        last, moved_at = memory.last_processed_id, memory.moved_at
        progress = measure_progress(
            catalog,
            cursor,
            memory,
            now=datetime.fromtimestamp(now, UTC),
            active_runs=sum(instance.runs.values()),
            videos_per_second=instance.rates.get("videos"),
        )
        if moved_at is None or last != progress.last_processed_id or progress.moved_at - moved_at >= _REMEMBER_EVERY:
            with contextlib.suppress(ExtractionError):
                remember_progress(catalog.state_engine, memory)
        return progress

    def _mirror(self, catalog: Catalog, last_processed_id: int | None, parts: dict[str, bool]) -> MirrorFigures | None:
        mirror, found = make_mirror(self._settings, catalog.state_engine), None
        if mirror is None:
            return None
        with self._part("mirror", parts):
            found = mirror.read()
        if found is None:
            return MirrorFigures("unreachable", None)
        mirrored = found.last_processed_id
        if found.state != "ok" or mirrored == last_processed_id:
            return MirrorFigures(found.state, mirrored)
        is_ahead = mirrored is not None and (last_processed_id is None or mirrored > last_processed_id)
        return MirrorFigures("ahead" if is_ahead else "behind", mirrored)

    def _count_points(self) -> tuple[int | None, bool]:
        """The collection's points, None when they can't be counted now; and whether that is as it should be."""
        try:
            with open_point_store(self._hasty_settings, attempts=2) as store:
                store.open_collection(self._settings.collection_name)
                return store.count(), True
        except CollectionMissingError:
            return 0, True
        except StoreBusyError:  # the embedded engine, in the hands of a run
            return None, True
        except ExtractionError as error:
            _log.warning("The collection can't be asked: %s", error)
            return None, False
