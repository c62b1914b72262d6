"""Sensor-driven processing in this process, without a daemon: what `extraction run` does.

Where nothing is due and nothing goes on, Dagster itself is never loaded: a look at its storage says so.
"""

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from extraction_dagster.defs.instance.opening import LateInstance, opened_when_needed
from extraction_dagster.errors.runs import RangeBusyError, RunFailedError, SensorBusyError
from extraction_dagster.interrupts import check_interrupts
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.looks import Round
from extraction_dagster.ticks.memory import recall, remember
from extraction_dagster.ticks.places import History, Outcomes
from extraction_dagster.ticks.tick import Ticked, tick
from extraction_dagster.watch.progress import last_report, take_look

if TYPE_CHECKING:
    import dagster as dg

    from extraction_dagster.defs.instance.runs import InstanceRuns

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


def drain(instance: "dg.DagsterInstance | None", settings: Settings, *, follow: bool) -> Drained:
    """Tick and run, one range at a time, until no row is due; with `follow`, go on for ever.

    A range that fails as a whole does not stop the others, three in a row do; with `follow` it is tried again later.

    Args:
        instance: The Dagster instance; None for that of the settings, which is opened once it is needed.
        settings: Which ones.
        follow: Wait for new rows.

    Raises:
        SensorBusyError: A daemon ticks the sensor: two of them would work against each other.
        RunFailedError: A run failed as a whole (a store is down, say); the watermark stays below its range.
        HomeError, InstanceError, StorageError: What `open_instance` says.
        KeyboardInterrupt: Ctrl+C; finished shards are kept.
    """
    with opened_when_needed(settings, instance) as dagster:
        return _drain(dagster, settings, follow=follow)


def _drain(dagster: LateInstance, settings: Settings, *, follow: bool) -> Drained:
    ticks = _Ticks(dagster, settings, follow=follow)
    finished, in_a_row = Counter[str](), 0
    while True:
        check_interrupts()
        if dagster.is_ticking():  # with `follow`, a daemon may be started days later
            raise SensorBusyError
        ticked = ticks.tick()
        if ticked.requests:
            id_range = ticked.requests[0].id_range
            error, states = _process(dagster.instance, settings, id_range, ticked.cursor.floor_id)
            finished.update(states)
            in_a_row = 0 if error is None else in_a_row + 1
            if error is not None and not follow:
                ticks.failed[id_range] = error
                if in_a_row == _GIVE_UP_AFTER:
                    break
            _log.info("Total records processed so far: %d", finished["done"] + finished["parked"])
            _report(dagster, settings)
        elif follow:
            time.sleep(settings.sensor_interval_seconds)
        elif not ticks.goes_on(others=ticked.num_active > 0):
            break
    if ticks.failed:
        raise next(iter(ticks.failed.values()))
    _report(dagster, settings, at_once=True)
    return Drained(finished["done"], finished["parked"], ticked.num_waiting, ticked.num_active)


def _report(dagster: LateInstance, settings: Settings, *, at_once: bool = False) -> None:
    """Report to the charts how far things are, unless the same was reported a while ago."""
    if (seen := dagster.at_rest(with_rate=True)) is not None:
        now, rate = datetime.now(UTC), seen.videos_per_second
        with open_catalog(settings) as catalog:
            progress = take_look(catalog, seen.cursor, now=now, active_runs=0, videos_per_second=rate)
            last = last_report(catalog.state_engine)
        if not last.is_outdated(progress, now=now, stuck_seconds=settings.stuck_seconds):
            return
    from extraction_dagster.defs.progress import report_progress

    report_progress(dagster.instance, settings, at_once=at_once)


class _Waits:
    """Waits for runs of other machines and containers until each gives a sign of life, or is taken for dead."""

    def __init__(self, settings: Settings) -> None:
        self._dead_after, self._seen, self._alive = settings.dead_after_seconds, dict[str, float](), set[str]()

    def for_the_dead(self, instance: "dg.DagsterInstance") -> bool:
        """Wait a moment if a run has given no sign since it was first seen here; returns whether one has not."""
        from extraction_dagster.defs.instance.runs import range_of, silent_runs

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


class _RunsBeside:
    """The runs, for a command that has no second try for a range of which its own run failed."""

    def __init__(self, dagster: LateInstance, failed: Collection[IdRange]) -> None:
        self._dagster, self._failed = dagster, failed

    @property
    def _runs(self) -> "InstanceRuns":
        from extraction_dagster.defs.instance.runs import InstanceRuns

        return InstanceRuns(self._dagster.instance)

    def active(self) -> list[IdRange]:
        """Ranges that have an active run."""
        return self._runs.active() if self._dagster.at_rest() is None else []

    def backfilled(self) -> list[IdRange]:
        """Ranges that are taken care of, and those that failed: others are looked for."""
        others = self._runs.backfilled() if self._dagster.at_rest() is None else ()
        return [*others, *self._failed]

    def partitions(self, record_ids: Sequence[int]) -> Iterable[IdRange]:
        """The ranges that hold any of these ids."""
        return self._runs.partitions(record_ids)

    def history(self, id_range: IdRange) -> History:
        """The ended runs of a range."""
        return self._runs.history(id_range)

    def outcomes(self) -> Outcomes:
        """How the newest runs of all ranges ended."""
        return self._runs.outcomes()


class _Ticks:
    """The ticks of one command; what they remember is kept, so that the next command goes on there."""

    def __init__(self, dagster: LateInstance, settings: Settings, *, follow: bool) -> None:
        self.failed = dict[IdRange, RunFailedError]()
        self.whole: Round | None = None
        self._waits = _Waits(settings)
        self._dagster, self._settings, self._follow = dagster, settings, follow
        with open_catalog(settings) as catalog:
            self._memory = recall(catalog.state_engine)
            _say_where(dagster.cursor(), catalog.source.identity)

    def goes_on(self, *, others: bool) -> bool:
        """Whether to tick once more although nothing is due: the whole was not looked at, or others may be dead."""
        if self.whole is not None and not self.whole.is_over:
            return True
        if self.whole is not None and not (others and self._waits.for_the_dead(self._dagster.instance)):
            return False
        self.begin_whole()  # from here on ticks look at every row below the watermark as well
        return True

    def begin_whole(self) -> None:
        """From here on, look at the whole table; from where the last command came to in this, if it was stopped."""
        self.whole = Round(self._memory.sweep_after_id)

    def tick(self) -> Ticked:
        """Tick once, and store the cursor."""
        runs, stored = _RunsBeside(self._dagster, self.failed), self._dagster.cursor()
        one_at_a_time = self._settings.model_copy(update={"max_in_flight": len(runs.active()) + 1})
        with open_catalog(one_at_a_time) as catalog:
            keep = partial(remember, catalog.state_engine, self._memory)
            ticked = tick(
                catalog,
                runs,
                stored,
                self._memory,
                now=datetime.now(UTC),
                impatient=not self._follow,
                whole=self.whole,
                keep=keep,
            )
            keep()
        if (cursor := ticked.cursor.to_json()) != stored:
            self._dagster.store.write(cursor)
        for notice in ticked.notices:
            _log.log(logging.getLevelNamesMapping()[notice.level.upper()], notice.text)
        return ticked


def _process(
    instance: "dg.DagsterInstance", settings: Settings, id_range: IdRange, floor_id: int | None
) -> tuple[RunFailedError | None, dict[str, int]]:
    """Run a range; the error when it failed, and how many records it left in which state."""
    from extraction_dagster.defs.instance import launching

    try:
        run = launching.launch(instance, id_range, floor_id=floor_id)
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


def _say_where(stored: str | None, source: str) -> None:
    last = CursorState.from_json(stored, source=source).last_processed_id if stored else None
    if last is None:
        _log.info("Starting from the beginning: there is no checkpoint yet")
    else:
        _log.info("Resuming from checkpoint: last processed ID = %d", last)
