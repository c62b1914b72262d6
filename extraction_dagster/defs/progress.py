"""How far everything is, charted: `extraction_progress` has no run and no partitions; a sensor reports it now and then.

It is materialized whenever something has moved or nothing is pending, and only observed while rows wait and nothing
moves. So its freshness says whether the watermark keeps up, and its check why not.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg

from extraction_dagster.defs.metadata import as_metadata
from extraction_dagster.defs.resources import Extraction, plain_failures
from extraction_dagster.settings import Settings, load_settings

if TYPE_CHECKING:
    from extraction_dagster.stages.catalog.catalog import Catalog
    from extraction_dagster.watch.progress import Progress

_settings = load_settings()
_KEY = dg.AssetKey("extraction_progress")
_CHECK = "watermark_moves"

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
        events = progress_events(context.instance, catalog, now=datetime.now(UTC))
    said = next((event.description for event in events if isinstance(event, dg.AssetCheckEvaluation)), None)
    return dg.SensorResult(asset_events=events, skip_reason=said or "Nothing has changed.")


@dg.asset_check(
    asset=_KEY,
    name=_CHECK,
    description="Pending rows do not wait longer than EXTRACTION_STUCK_SECONDS without any record being finished.",
)
def watermark_moves(context: dg.AssetCheckExecutionContext, extraction: Extraction) -> dg.AssetCheckResult:
    """Look once more, now."""
    with plain_failures(), extraction.catalog() as catalog:
        progress = _measure(context.instance, catalog, now=datetime.now(UTC))
    return dg.AssetCheckResult(**_verdict(progress, extraction.settings))


def report_progress(instance: dg.DagsterInstance, settings: Settings, *, at_once: bool = False) -> None:
    """What the sensor does, for a process that works without a daemon; at once, or not more often than it would."""
    from extraction_dagster.stages.catalog.catalog import open_catalog
    from extraction_dagster.watch.progress import last_report

    now = datetime.now(UTC)
    with open_catalog(settings) as catalog:
        last = last_report(catalog.state_engine).at
        if at_once or last is None or now - last >= timedelta(seconds=settings.progress_interval_seconds):
            for event in progress_events(instance, catalog, now=now):
                instance.report_runless_asset_event(event)


def progress_events(instance: dg.DagsterInstance, catalog: "Catalog", *, now: datetime) -> Sequence[Event]:
    """The events that say how far things are; none when nothing has changed since the last ones, and not long ago."""
    from extraction_dagster.watch.progress import last_report, remember_report

    progress, last = _measure(instance, catalog, now=now), last_report(catalog.state_engine)
    if not last.is_outdated(progress, now=now, stuck_seconds=catalog.settings.stuck_seconds):
        return ()
    metadata = as_metadata(progress.numbers(), {})
    moved = last.at is None or progress.moved_at > last.at
    made: Event = dg.AssetMaterialization(_KEY, metadata=metadata)
    seen: Event = dg.AssetObservation(_KEY, metadata=metadata)
    remember_report(catalog.state_engine, progress, now=now)
    verdict = dg.AssetCheckEvaluation(asset_key=_KEY, check_name=_CHECK, **_verdict(progress, catalog.settings))
    return [made if moved else seen, verdict]


def _measure(instance: dg.DagsterInstance, catalog: "Catalog", *, now: datetime) -> "Progress":
    """Take a look, and remember it for the next one."""
    from extraction_dagster.defs.instance.cursor_store import CursorStore
    from extraction_dagster.defs.instance.runs import active_runs, video_rate
    from extraction_dagster.watch.progress import take_look

    stored, active, rate = CursorStore(instance).read(), len(active_runs(instance)), video_rate(instance)
    return take_look(catalog, stored, now=now, active_runs=active, videos_per_second=rate)


def _verdict(progress: "Progress", settings: Settings) -> dict[str, Any]:
    """The parts of a check's result."""
    waiting = {"pending_rows": progress.pending_rows, "seconds_without_work": round(progress.stalled_seconds)}
    return {
        "passed": not progress.is_stuck,
        "metadata": as_metadata(waiting, {}),
        "description": _in_words(progress, settings),
    }


def _in_words(progress: "Progress", settings: Settings) -> str:
    last = progress.last_processed_id
    where = "no record is done yet" if last is None else f"at ID {last}"
    if progress.pending_rows == 0:
        return f"No row is pending ({where})."
    since = f"{progress.moved_at:%Y-%m-%d %H:%M} UTC"
    waiting = f"{progress.pending_rows} rows are pending ({where}), and the last sign of work was at {since}"
    if not progress.is_stuck:
        return f"{waiting}."
    return (
        f"{waiting}, more than {settings.stuck_seconds} s ago. Look at the newest runs and at 'extraction errors'; is "
        f"extraction_sensor on, and a daemon running?"
    )
