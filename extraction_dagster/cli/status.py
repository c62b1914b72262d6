"""`extraction status`: how far things are."""

from typing import Annotated, Any

import typer
from rich.table import Table

from extraction_dagster.cli import console
from extraction_dagster.errors.ticks import CursorError
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import Catalog, open_catalog
from extraction_dagster.ticks.cursor import CursorState

_SECONDS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def command(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show the watermark, how many records are done, pending, failed and parked, the rate, and when it will be done."""
    settings = load_settings()
    with open_catalog(settings) as catalog:
        progress = _progress(settings, catalog)
        status = {**catalog.status(floor_id=progress["floor_id"]), **progress}
    rate, pending = status["videos_per_second"], status["pending"]
    status["eta_seconds"] = round(pending / rate) if rate and pending else 0 if pending == 0 else None
    if as_json:
        console.print_json(status)
        return
    table = Table(show_header=False)
    for name, value in status.items():
        shown = "-" if value is None else _duration(value) if name == "eta_seconds" else str(value)
        table.add_row(name.removesuffix("_seconds").replace("_", " "), shown)
    console.out.print(table)


def _progress(settings: Settings, catalog: Catalog) -> dict[str, Any]:
    """What Dagster's instance knows: the cursor, and the rate of the newest materializations."""
    from extraction_dagster.defs.instance.cursor_store import CursorStore
    from extraction_dagster.defs.instance.launching import open_instance
    from extraction_dagster.defs.instance.runs import active_runs, recent_rate

    progress: dict[str, Any] = dict.fromkeys(("last_processed_id", "frontier_id", "floor_id"))
    with open_instance(settings) as instance:
        stored, active, rate = CursorStore(instance).read(), len(active_runs(instance)), recent_rate(instance)
    try:
        state = CursorState.from_json(stored, source=catalog.source.identity) if stored else None
    except CursorError as error:
        console.err.print(f"warning: {error}", markup=False)
        state = None
    if state is not None:
        progress = {name: getattr(state, name) for name in progress}
    lag = catalog.source.count_above(progress["last_processed_id"])
    return {**progress, "lag_rows": lag, "active_runs": active, "videos_per_second": rate}


def _duration(seconds: float) -> str:
    """`5400` as `1 h 30 min`."""
    left, parts = int(seconds), []
    for size, unit in _SECONDS:
        if left >= size:
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2]) or "0 s"
