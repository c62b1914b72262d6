"""How far everything is, charted: `extraction_progress` has no run and no partitions; a sensor reports it now and then.

It is materialized whenever something has moved or nothing is pending, and only observed while rows wait and nothing
moves. So its freshness says whether the watermark keeps up, and its check why not.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.measuring import video_rate
from extraction_dagster.defs.instance.runs import active_runs
from extraction_dagster.defs.metadata import as_metadata
from extraction_dagster.defs.resources import Extraction, plain_failures
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import Catalog, open_catalog
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.memory import recall_text, remember_text
from extraction_dagster.watch.progress_record import Progress, measure_progress, recall_progress, remember_progress

_settings = load_settings()
_KEY = dg.AssetKey("extraction_progress")
_CHECK = "watermark_moves"
_REPORTED_KEY = "progress_reported"
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
    now = datetime.now(UTC)
    with open_catalog(settings) as catalog:
        last, _ = _last_reported(catalog)
        if at_once or last is None or now - last >= timedelta(seconds=settings.progress_interval_seconds):
            for event in progress_events(instance, catalog, now=now):
                instance.report_runless_asset_event(event)


def progress_events(instance: dg.DagsterInstance, catalog: Catalog, *, now: datetime) -> Sequence[Event]:
    """The events that say how far things are; none when nothing has changed since the last ones, and not long ago."""
    progress, (reported_at, reported) = _measure(instance, catalog, now=now), _last_reported(catalog)
    numbers = progress.numbers()
    # The rate is another one at each look: it alone is no reason to report.
    steady = {name: value for name, value in numbers.items() if name not in {"videos_per_second", "eta_seconds"}}
    again_after = timedelta(seconds=catalog.settings.stuck_seconds / _REPORTS_PER_STUCK)
    if reported_at is not None and steady == reported and now - reported_at < again_after:
        return ()
    metadata = as_metadata(numbers, {})
    moved = reported_at is None or progress.moved_at > reported_at
    made: Event = dg.AssetMaterialization(_KEY, metadata=metadata)
    seen: Event = dg.AssetObservation(_KEY, metadata=metadata)
    remember_text(catalog.state_engine, _REPORTED_KEY, json.dumps({"at": now.isoformat(), "numbers": steady}))
    verdict = dg.AssetCheckEvaluation(asset_key=_KEY, check_name=_CHECK, **_verdict(progress, catalog.settings))
    return [made if moved else seen, verdict]


def _measure(instance: dg.DagsterInstance, catalog: Catalog, *, now: datetime) -> Progress:
    """Take a look, and remember it for the next one."""
    stored, memory = CursorStore(instance).read(), recall_progress(catalog.state_engine)
    cursor = CursorState.from_json(stored, source=catalog.source.identity) if stored else None
    active, rate = len(active_runs(instance)), video_rate(instance)
    progress = measure_progress(catalog, cursor, memory, now=now, active_runs=active, videos_per_second=rate)
    remember_progress(catalog.state_engine, memory)
    return progress


def _last_reported(catalog: Catalog) -> tuple[datetime | None, Mapping[str, float]]:
    """When figures were last reported, and which; nothing when that can't be read."""
    try:
        values = json.loads(recall_text(catalog.state_engine, _REPORTED_KEY) or "")
        return datetime.fromisoformat(values["at"]), dict(values["numbers"])
    except (ValueError, KeyError, TypeError):
        return None, {}


def _verdict(progress: Progress, settings: Settings) -> dict[str, Any]:
    """The parts of a check's result."""
    waiting = {"pending_rows": progress.pending_rows, "seconds_without_work": round(progress.stalled_seconds)}
    return {
        "passed": not progress.is_stuck,
        "metadata": as_metadata(waiting, {}),
        "description": _in_words(progress, settings),
    }


def _in_words(progress: Progress, settings: Settings) -> str:
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
