"""Sensor-driven processing in this process, without a daemon: what `extraction run` does."""

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import dagster as dg

from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.launching import launch
from extraction_dagster.defs.instance.runs import InstanceRuns
from extraction_dagster.defs.progress import report_progress
from extraction_dagster.errors.runs import RunFailedError, SensorBusyError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.memory import Memory
from extraction_dagster.ticks.tick import Ticked, tick

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Drained:
    """What is left when no row is due.

    Attributes:
        num_processed: Records that are done or parked now and were not before.
        num_waiting: Failed records that wait for their next try.
        num_active: Ranges on which runs of others are working.
    """

    num_processed: int
    num_waiting: int
    num_active: int


def drain(instance: dg.DagsterInstance, settings: Settings, *, follow: bool) -> Drained:
    """Tick and run, one range at a time, until no row is due; with `follow`, go on for ever.

    A range that fails as a whole ends the command; with `follow` it is tried again later.

    Raises:
        SensorBusyError: A daemon ticks the sensor: two of them would work against each other.
        RunFailedError: A run failed as a whole (a store is down, say); the watermark stays below its range.
        KeyboardInterrupt: Ctrl+C; finished shards are kept.
    """
    store = CursorStore(instance)
    _say_where(store, settings)
    memory, processed, idle = Memory(), 0, False
    while True:
        if store.is_ticking():  # with `follow`, a daemon may be started days later
            raise SensorBusyError
        ticked = _tick(instance, settings, store, memory, follow=follow, sweep_all=idle and not follow)
        if ticked.requests:
            id_range = ticked.requests[0].id_range
            before = _num_finished(settings, id_range)
            run = launch(instance, id_range, floor_id=ticked.cursor.floor_id)
            if not run.success:
                error = RunFailedError(id_range.partition_key, run.run_id, run.error)
                if not follow:
                    raise error
                _log.error("%s", error)
            processed += _num_finished(settings, id_range) - before
            _log.info("Total records processed so far: %d", processed)
            report_progress(instance, settings)
            idle = False
        elif follow:
            time.sleep(settings.sensor_interval_seconds)
        elif idle:
            report_progress(instance, settings, at_once=True)
            return Drained(processed, ticked.num_waiting, ticked.num_active)
        else:
            idle = True  # the last tick looks at every row below the watermark as well


def _tick(  # noqa: PLR0913 - a tick, and how it is asked
    instance: dg.DagsterInstance,
    settings: Settings,
    store: CursorStore,
    memory: Memory,
    *,
    follow: bool,
    sweep_all: bool,
) -> Ticked:
    one_at_a_time = settings.model_copy(update={"max_in_flight": len(InstanceRuns(instance).active()) + 1})
    with open_catalog(one_at_a_time) as catalog:
        ticked = tick(
            catalog,
            InstanceRuns(instance),
            store.read(),
            memory,
            now=datetime.now(UTC),
            impatient=not follow,
            sweep_all=sweep_all,
        )
    store.write(ticked.cursor.to_json())
    for notice in ticked.notices:
        _log.log(logging.getLevelNamesMapping()[notice.level.upper()], notice.text)
    return ticked


def _num_finished(settings: Settings, id_range: IdRange) -> int:
    with open_catalog(settings) as catalog:
        counts = catalog.ledger.counts(id_range)
    return counts.get("done", 0) + counts.get("parked", 0)


def _say_where(store: CursorStore, settings: Settings) -> None:
    stored = store.read()
    with open_catalog(settings) as catalog:
        last = CursorState.from_json(stored, source=catalog.source.identity).last_processed_id if stored else None
    if last is None:
        _log.info("Starting from the beginning: there is no checkpoint yet")
    else:
        _log.info("Resuming from checkpoint: last processed ID = %d", last)
