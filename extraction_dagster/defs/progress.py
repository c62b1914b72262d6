"""How far everything is, charted: `extraction_progress` has no run and no partitions; a sensor reports it now and then.

It is materialized whenever something has moved or nothing is left to do, and only observed while rows wait and nothing
moves. So its freshness says whether the watermark keeps up, and its check why not.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg

from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.runs import active_runs, recent_rate
from extraction_dagster.defs.metadata import as_metadata
from extraction_dagster.defs.resources import Extraction, plain_failures
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import Catalog, open_catalog
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.watch.how_far import (
    ProgressMemory,
    Standing,
    look,
    recall_progress,
    remember_progress,
)

_settings = load_settings()
_KEY = dg.AssetKey("extraction_progress")
_CHECK = "watermark_moves"
# While nothing changes, it is reported a few times within the time after which silence counts as standing still.
_REPORTS_PER_STUCK = 4

extraction_progress = dg.AssetSpec(
    _KEY,
    group_name="extraction",
    kinds={"metrics"},
    owners=list(_settings.owners),
    freshness_policy=dg.FreshnessPolicy.time_window(
        fail_window=timedelta(seconds=_settings.stuck_seconds),
        warn_window=timedelta(seconds=_settings.stuck_seconds / 2),
    ),
    description="How far the collection is behind the table: watermark, lag, pending, failed and parked records, rate. "
    "progress_sensor reports it; *Plots* shows it over time. Overdue means that rows wait and nothing moves, or that "
    "no daemon runs.",
)

Event = dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation


@dg.sensor(
    name="progress_sensor",
    minimum_interval_seconds=_settings.progress_interval_seconds,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Charts extraction_progress and watches whether the watermark moves; starts no run.",
)
def progress_sensor(context: dg.SensorEvaluationContext, extraction: Extraction) -> dg.SensorResult:
    """Look once."""
    with extraction.catalog() as catalog:
        events = observe(context.instance, catalog, now=datetime.now(UTC))
    said = next((event.description for event in events if isinstance(event, dg.AssetCheckEvaluation)), None)
    return dg.SensorResult(asset_events=events, skip_reason=said or "Nothing has changed.")


@dg.asset_check(
    asset=_KEY,
    name=_CHECK,
    description="Rows that are due do not wait longer than EXTRACTION_STUCK_SECONDS without any record being finished.",
)
def watermark_moves(context: dg.AssetCheckExecutionContext, extraction: Extraction) -> dg.AssetCheckResult:
    """Look once more, now."""
    with plain_failures(), extraction.catalog() as catalog:
        memory = recall_progress(catalog.state_engine)
        standing = look(catalog, _cursor(context.instance, catalog), memory, now=datetime.now(UTC))
    return dg.AssetCheckResult(
        passed=not standing.is_stuck,
        description=_in_words(standing, extraction.settings),
        metadata=_waiting(standing, datetime.now(UTC)),
    )


def report(instance: dg.DagsterInstance, settings: Settings, *, at_once: bool = False) -> None:
    """What the sensor does, for a process that works without a daemon; at once, or not more often than it would."""
    now = datetime.now(UTC)
    with open_catalog(settings) as catalog:
        last = recall_progress(catalog.state_engine).reported_at
        if at_once or last is None or now - last >= timedelta(seconds=settings.progress_interval_seconds):
            for event in observe(instance, catalog, now=now):
                instance.report_runless_asset_event(event)


def observe(instance: dg.DagsterInstance, catalog: Catalog, *, now: datetime) -> Sequence[Event]:
    """The events that say how far things are; none when nothing has changed since the last ones, and not long ago."""
    memory = recall_progress(catalog.state_engine)
    standing = look(catalog, _cursor(instance, catalog), memory, now=now)
    numbers = _numbers(instance, standing)
    events: Sequence[Event] = ()
    if _is_due(memory, numbers, catalog.settings, now=now):
        events = _events(standing, numbers, memory, catalog.settings, now=now)
        memory.reported_at, memory.reported = now, numbers
    remember_progress(catalog.state_engine, memory)
    return events


def _cursor(instance: dg.DagsterInstance, catalog: Catalog) -> CursorState | None:
    stored = CursorStore(instance).read()
    return CursorState.from_json(stored, source=catalog.source.identity) if stored else None


def _numbers(instance: dg.DagsterInstance, standing: Standing) -> dict[str, float]:
    rate, pending = recent_rate(instance), standing.figures.pending_rows
    numbers: dict[str, float] = {**standing.figures.numbers(), "active_runs": len(active_runs(instance))}
    if rate is not None:
        numbers["videos_per_second"] = rate
    if rate and pending:
        numbers["eta_seconds"] = round(pending / rate)
    return numbers


def _is_due(memory: ProgressMemory, numbers: dict[str, float], settings: Settings, *, now: datetime) -> bool:
    if memory.reported_at is None or numbers != memory.reported:
        return True
    return now - memory.reported_at >= timedelta(seconds=settings.stuck_seconds / _REPORTS_PER_STUCK)


def _events(
    standing: Standing, numbers: dict[str, float], memory: ProgressMemory, settings: Settings, *, now: datetime
) -> Sequence[Event]:
    metadata = as_metadata(numbers, {})
    moved = memory.reported_at is None or standing.moved_at > memory.reported_at
    made: Event = dg.AssetMaterialization(_KEY, metadata=metadata)
    seen: Event = dg.AssetObservation(_KEY, metadata=metadata)
    verdict = dg.AssetCheckEvaluation(
        asset_key=_KEY,
        check_name=_CHECK,
        passed=not standing.is_stuck,
        metadata=_waiting(standing, now),
        description=_in_words(standing, settings),
    )
    return [made if moved else seen, verdict]


def _waiting(standing: Standing, now: datetime) -> Mapping[str, dg.MetadataValue]:
    seconds = max((now - standing.moved_at).total_seconds(), 0.0)
    return as_metadata({"pending_rows": standing.figures.pending_rows, "seconds_without_work": round(seconds)}, {})


def _in_words(standing: Standing, settings: Settings) -> str:
    figures = standing.figures
    where = "no record is done yet" if figures.last_processed_id is None else f"at ID {figures.last_processed_id}"
    if figures.pending_rows == 0:
        return f"Nothing is due ({where})."
    since = f"{standing.moved_at:%Y-%m-%d %H:%M} UTC"
    waiting = f"{figures.pending_rows} rows are due ({where}), and the last sign of work was at {since}"
    if not standing.is_stuck:
        return f"{waiting}."
    return (
        f"{waiting}, more than {settings.stuck_seconds} s ago. Look at the newest runs and at 'extraction errors'; is "
        f"extraction_sensor on, and a daemon running?"
    )
