"""Sensor-driven processing in this process, without a daemon: what `extraction run` does."""

import logging
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import dagster as dg

from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.launching import launch
from extraction_dagster.defs.instance.runs import InstanceRuns, range_of, silent_runs
from extraction_dagster.defs.progress import report_progress
from extraction_dagster.errors.runs import RangeBusyError, RunFailedError, SensorBusyError
from extraction_dagster.interrupts import check_interrupts
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.looks import Round
from extraction_dagster.ticks.memory import recall, remember
from extraction_dagster.ticks.tick import Ticked, tick

_log = logging.getLogger(__name__)
_PAUSE_SECONDS = 5.0
_GIVE_UP_AFTER = 3  # ranges that fail one after the other: a store is down, say, and the rest would fail as well


@dataclass(frozen=True, slots=True)
class Drained:
    """What was done, and what is left, when no row is due.

    Attributes:
        num_done: Records that were done, once more those that were done before among them.
        num_parked: Records that were given up.
        num_waiting: Failed records that wait for their next try.
        num_active: Ranges on which runs of others are working.
    """

    num_done: int
    num_parked: int
    num_waiting: int
    num_active: int

    @property
    def num_processed(self) -> int:
        """Records that this command finished, one way or the other."""
        return self.num_done + self.num_parked


def drain(instance: dg.DagsterInstance, settings: Settings, *, follow: bool) -> Drained:
    """Tick and run, one range at a time, until no row is due; with `follow`, go on for ever.

    A range that fails as a whole does not stop the others, three in a row do; with `follow` it is tried again later.

    Raises:
        SensorBusyError: A daemon ticks the sensor: two of them would work against each other.
        RunFailedError: A run failed as a whole (a store is down, say); the watermark stays below its range.
        KeyboardInterrupt: Ctrl+C; finished shards are kept.
    """
    ticks = _Ticks(instance, settings, follow=follow)
    finished, in_a_row = Counter[str](), 0
    while True:
        check_interrupts()
        if ticks.store.is_ticking():  # with `follow`, a daemon may be started days later
            raise SensorBusyError
        ticked = ticks.tick()
        if ticked.requests:
            id_range = ticked.requests[0].id_range
            error, states = _process(instance, settings, id_range, ticked.cursor.floor_id)
            finished.update(states)
            in_a_row = 0 if error is None else in_a_row + 1
            if error is not None and not follow:
                ticks.failed[id_range] = error
                if in_a_row == _GIVE_UP_AFTER:
                    break
            _log.info("Total records processed so far: %d", finished["done"] + finished["parked"])
            report_progress(instance, settings)
        elif follow:
            time.sleep(settings.sensor_interval_seconds)
        elif not ticks.goes_on(others=ticked.num_active > 0):
            break
    if ticks.failed:
        raise next(iter(ticks.failed.values()))
    report_progress(instance, settings, at_once=True)
    return Drained(finished["done"], finished["parked"], ticked.num_waiting, ticked.num_active)


class _Waits:
    """Waits for runs of other machines and containers until each gives a sign of life, or is taken for dead."""

    def __init__(self, settings: Settings) -> None:
        self._dead_after, self._seen, self._alive = settings.dead_after_seconds, dict[str, float](), set[str]()

    def for_the_dead(self, instance: dg.DagsterInstance) -> bool:
        """Wait a moment if a run has given no sign since it was first seen here; returns whether one has not."""
        doubtful = False
        for run, seconds in silent_runs(instance):
            before = self._seen.setdefault(run.run_id, seconds)
            if seconds < before:
                self._alive.add(run.run_id)
            if run.run_id in self._alive:
                continue
            doubtful = True
            if seconds == before:
                _log.warning(
                    "Run %s of range %s works on another machine or in another container, and gave no sign of life for "
                    "%d s: waiting until it does, or is taken for dead after %d s (EXTRACTION_DEAD_AFTER_SECONDS)",
                    run.run_id,
                    range_of(run),
                    seconds,
                    self._dead_after,
                )
            self._seen[run.run_id] = max(before, seconds)
        if doubtful:
            time.sleep(_PAUSE_SECONDS)
        return doubtful


class _RunsBeside(InstanceRuns):
    """The runs, for a command that has no second try for a range of which its own run failed."""

    def __init__(self, instance: dg.DagsterInstance, failed: Collection[IdRange]) -> None:
        super().__init__(instance)
        self._failed = failed

    def backfilled(self) -> list[IdRange]:
        """Ranges that are taken care of, and those that failed: others are looked for."""
        return [*super().backfilled(), *self._failed]


class _Ticks:
    """The ticks of one command; what they remember is kept, so that the next command goes on there."""

    def __init__(self, instance: dg.DagsterInstance, settings: Settings, *, follow: bool) -> None:
        self.store, self.failed = CursorStore(instance), dict[IdRange, RunFailedError]()
        self.whole: Round | None = None
        self._waits = _Waits(settings)
        self._instance, self._settings, self._follow = instance, settings, follow
        with open_catalog(settings) as catalog:
            self._memory = recall(catalog.state_engine)
        _say_where(self.store, settings)

    def goes_on(self, *, others: bool) -> bool:
        """Whether to tick once more although nothing is due: the whole was not looked at, or others may be dead."""
        if self.whole is not None and not self.whole.is_over:
            return True
        if self.whole is not None and not (others and self._waits.for_the_dead(self._instance)):
            return False
        self.begin_whole()  # from here on ticks look at every row below the watermark as well
        return True

    def begin_whole(self) -> None:
        """From here on, look at the whole table; from where the last command came to in this, if it was stopped."""
        self.whole = Round(self._memory.sweep_after_id)

    def tick(self) -> Ticked:
        """Tick once, and store the cursor."""
        runs = _RunsBeside(self._instance, self.failed)
        one_at_a_time = self._settings.model_copy(update={"max_in_flight": len(runs.active()) + 1})
        with open_catalog(one_at_a_time) as catalog:
            keep = partial(remember, catalog.state_engine, self._memory)
            ticked = tick(
                catalog,
                runs,
                self.store.read(),
                self._memory,
                now=datetime.now(UTC),
                impatient=not self._follow,
                whole=self.whole,
                keep=keep,
            )
            keep()
        self.store.write(ticked.cursor.to_json())
        for notice in ticked.notices:
            _log.log(logging.getLevelNamesMapping()[notice.level.upper()], notice.text)
        return ticked


def _process(
    instance: dg.DagsterInstance, settings: Settings, id_range: IdRange, floor_id: int | None
) -> tuple[RunFailedError | None, dict[str, int]]:
    """Run a range; the error when it failed, and how many records it left in which state."""
    try:
        run = launch(instance, id_range, floor_id=floor_id)
    except RangeBusyError as busy:  # somebody else launched it a moment ago: the next tick sees that
        _log.warning("%s", busy)
        return None, {}
    with open_catalog(settings) as catalog:
        states = catalog.ledger.counts_of_run(run.run_id, id_range)
    if run.success:
        return None, states
    error = RunFailedError(id_range.partition_key, run.run_id, run.error)
    _log.error("%s", error)
    return error, states


def _say_where(store: CursorStore, settings: Settings) -> None:
    stored = store.read()
    with open_catalog(settings) as catalog:
        last = CursorState.from_json(stored, source=catalog.source.identity).last_processed_id if stored else None
    if last is None:
        _log.info("Starting from the beginning: there is no checkpoint yet")
    else:
        _log.info("Resuming from checkpoint: last processed ID = %d", last)
