"""`extraction status`, `errors` and `retry`: how far records are, which failed and why, and their tries given back."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from extraction_dagster.cli import console
from extraction_dagster.errors.runs import CursorError
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import Catalog, open_catalog
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.watch.progress import Progress, eta_seconds, measure_progress, recall_progress

_SECONDS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def status(*, as_json: console.AsJson = False) -> None:
    """Show the watermark, how many records are done, pending, failed and parked, the rate, and when it will be done."""
    settings = load_settings()
    with open_catalog(settings) as catalog:
        progress = _progress(settings, catalog)
        lag = progress.lag_rows if progress.is_lag_counted else catalog.source.count_above(progress.after_id)
        document: dict[str, Any] = catalog.status(floor_id=progress.floor_id)
    document |= {name: getattr(progress, name) for name in ("last_processed_id", "frontier_id", "floor_id")}
    document |= {"lag_rows": lag, "active_runs": progress.active_runs, "videos_per_second": progress.videos_per_second}
    document["eta_seconds"] = eta_seconds(document["pending"], progress.videos_per_second)
    if as_json:
        console.print_json(document)
        return
    eta = document.pop("eta_seconds")
    shown = document | {"eta": None if eta is None else _duration(eta)}
    console.print_values((name.replace("_", " "), value) for name, value in shown.items())


def _progress(settings: Settings, catalog: Catalog) -> Progress:
    """The record that the charts and the metrics show as well; a cursor that can't be used is left out."""
    from extraction_dagster.defs.instance.cursor_store import CursorStore
    from extraction_dagster.defs.instance.launching import open_instance
    from extraction_dagster.defs.instance.runs import active_runs, video_rate

    with open_instance(settings) as instance:
        stored, active, rate = CursorStore(instance).read(), len(active_runs(instance)), video_rate(instance)
    try:
        cursor = CursorState.from_json(stored, source=catalog.source.identity) if stored else None
    except CursorError as error:
        console.err.print(f"warning: {error}", markup=False)
        cursor = None
    memory = recall_progress(catalog.state_engine)
    return measure_progress(catalog, cursor, memory, now=datetime.now(UTC), active_runs=active, videos_per_second=rate)


def _duration(seconds: float) -> str:
    """`5400` as `1 h 30 min`."""
    left, parts = int(seconds), []
    for size, unit in _SECONDS:
        if left >= size:
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2]) or "0 s"


def errors(
    *,
    error_type: Annotated[str | None, typer.Option("--type", help="Only errors of this type.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Most errors shown, newest first.")] = 50,
    history: Annotated[bool, typer.Option("--history", help="Every error ever, not only the unresolved.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """List the records that failed and wait for another try, or are parked."""
    with open_catalog(load_settings()) as catalog:
        rows = catalog.ledger.errors(limit=limit, error_type=error_type, current_only=not history)
    if as_json:
        console.print_json({"errors": [{**asdict(row), "occurred_at": row.occurred_at.isoformat()} for row in rows]})
        return
    if not rows:
        console.out.print("No record has failed." if not history else "No error was ever recorded.")
        return
    for row in rows:
        when = f"{row.occurred_at:%Y-%m-%d %H:%M:%S} UTC"
        console.out.print(f"[bold]{row.record_id}[/] {row.state}, {row.stage}, {row.error_type}, {when}")
        console.out.print(f"  {row.error_message}", markup=False)


def retry(
    *,
    record_ids: Annotated[list[int] | None, typer.Argument(metavar="[ID]...", help="These records.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every failed or parked record.")] = False,
    error_type: Annotated[str | None, typer.Option("--error", help="Those whose last error is of this type.")] = None,
) -> None:
    """Make failed and parked records pending at once: the next tick, run or launch takes them."""
    if sum((bool(record_ids), everything, error_type is not None)) != 1:
        raise typer.BadParameter("give record ids, or --all, or --error TYPE: exactly one of them")
    with open_catalog(load_settings()) as catalog:
        brought_back = catalog.ledger.retry(record_ids=record_ids, error_type=error_type)
    console.out.print(f"{len(brought_back)} records are pending now.")
    if missed := sorted(set(record_ids or ()) - set(brought_back)):
        console.err.print(f"Not failed or parked, left as they are: {', '.join(map(str, missed))}")
        raise typer.Exit(1)
