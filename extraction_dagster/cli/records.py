"""`extraction status`, `errors` and `retry`: how far records are, which failed and why, and their tries given back."""

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from extraction_dagster.cli import console
from extraction_dagster.errors.runs import CursorError
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import Catalog, open_catalog
from extraction_dagster.stages.catalog.ledger import ErrorRow
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.watch.progress import Progress, eta_seconds, measure_progress, recall_progress, whole_lag

_ERRORS_LOOKED_AT = 1000
_MOST_SHOWN = 20
_SECONDS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def status(*, as_json: console.AsJson = False) -> None:
    """Show the watermark, how many records are done, pending, failed and parked, the rate, and when it will be done.

    For example: extraction status --json
    """
    settings = load_settings()
    with open_catalog(settings) as catalog:
        progress = _progress(settings, catalog)
        document: dict[str, Any] = catalog.status(floor_id=progress.floor_id)
        lag = progress.lag_rows if progress.is_lag_counted else whole_lag(catalog, progress.after_id, document)
    document |= {name: getattr(progress, name) for name in ("last_processed_id", "frontier_id", "floor_id")}
    document |= {"lag_rows": lag, "active_runs": progress.active_runs, "videos_per_second": progress.videos_per_second}
    is_due = document["pending"] or not lag  # else rows wait for something, and nobody knows how long
    document["eta_seconds"] = eta_seconds(document["pending"], progress.videos_per_second) if is_due else None
    if as_json:
        console.print_json(document)
        return
    eta = document.pop("eta_seconds")
    shown = document | {"eta": None if eta is None else _duration(eta)}
    console.print_values((name.replace("_", " "), value) for name, value in shown.items())


def _progress(settings: Settings, catalog: Catalog) -> Progress:
    """The record that the charts and the metrics show as well; a cursor that can't be used is left out."""
    from extraction_dagster.defs.instance.opening import ask

    seen = ask(settings)
    try:
        cursor = CursorState.from_json(seen.cursor, source=catalog.source.identity) if seen.cursor else None
    except CursorError as error:
        console.err.print(f"warning: {error}", markup=False)
        cursor = None
    memory = recall_progress(catalog.state_engine)
    of_runs: dict[str, Any] = {"active_runs": seen.num_active, "videos_per_second": seen.videos_per_second}
    return measure_progress(catalog, cursor, memory, now=datetime.now(UTC), **of_runs)


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
    """List the records that failed and wait for another try, or are parked: tries, next try, address, reason.

    For example: extraction errors --type VideoDecodeError --limit 10
    """
    with open_catalog(load_settings()) as catalog:
        rows = catalog.ledger.errors(limit=limit, error_type=error_type, current_only=not history)
        others = [] if rows or error_type is None else _types(catalog, current_only=not history)
        addresses = catalog.source.shown_addresses([row.record_id for row in rows])
    summary = Counter((row.error_type, row.state) for row in rows)
    if as_json:
        console.print_json(
            {
                "errors": [_plain(row, addresses) for row in rows],
                "summary": [
                    {"error_type": kind, "state": state, "records": number}
                    for (kind, state), number in summary.most_common()
                ],
            }
        )
        return
    if others:
        console.out.print(_no_such_type(error_type, others), markup=False)
        return
    if not rows:
        console.out.print("No record has failed." if not history else "No error was ever recorded.")
        return
    for row in rows:
        when = f"{row.occurred_at:%Y-%m-%d %H:%M:%S} UTC"
        again = f", next try {row.not_before:%Y-%m-%d %H:%M:%S} UTC" if row.not_before else ""
        tries = f", {row.attempts} {'try' if row.attempts == 1 else 'tries'}" if row.attempts else ""
        console.out.print(f"[bold]{row.record_id}[/] {row.state}, {row.stage}, {row.error_type}, {when}{tries}{again}")
        if address := addresses.get(row.record_id):
            console.out.print(f"  {address}", markup=False)
        console.out.print(f"  {row.error_message}", markup=False)
    told = ", ".join(f"{kind} {number} {state}" for (kind, state), number in summary.most_common())
    console.out.print(f"{len(rows)} shown: {told}", markup=False)


def _types(catalog: Catalog, *, current_only: bool = True) -> list[str]:
    """The types of the newest errors."""
    return sorted({row.error_type for row in catalog.ledger.errors(limit=_ERRORS_LOOKED_AT, current_only=current_only)})


def _no_such_type(wanted: str | None, there: list[str]) -> str:
    alike = difflib.get_close_matches(wanted or "", there, n=1)
    perhaps = f" ({alike[0]}, perhaps?)" if alike else ""
    return f"No error is of type {wanted!r}{perhaps}; there is {', '.join(there)}."


def _plain(row: ErrorRow, addresses: Mapping[int, str]) -> dict[str, Any]:
    next_try = row.not_before.isoformat() if row.not_before else None
    own = {"occurred_at": row.occurred_at.isoformat(), "not_before": next_try, "address": addresses.get(row.record_id)}
    return {**asdict(row), **own}


def retry(
    *,
    record_ids: Annotated[
        list[int] | None, typer.Argument(metavar="[ID]...", parser=console.parse_id, help="These records.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every failed or parked record.")] = False,
    error_type: Annotated[str | None, typer.Option("--error", help="Those whose last error is of this type.")] = None,
    as_json: console.AsJson = False,
) -> None:
    """Make failed and parked records pending at once: the next tick, run or launch takes them.

    For example: extraction retry 17 42, or extraction retry --error FileUnavailableError
    """
    if sum((bool(record_ids), everything, error_type is not None)) != 1:
        raise typer.BadParameter("give record ids, or --all, or --error TYPE: exactly one of them")
    with open_catalog(load_settings()) as catalog:
        others = [] if error_type is None else _types(catalog)
        brought_back = catalog.ledger.retry(record_ids=record_ids, error_type=error_type)
    missed = sorted(set(record_ids or ()) - set(brought_back))
    if as_json:
        console.print_json({"pending": brought_back, "left": missed})
    else:
        console.out.print(f"{len(brought_back)} records are pending now.")
    if others and not brought_back:
        console.err.print(_no_such_type(error_type, others), markup=False)
    if missed:
        shown = ", ".join(map(str, missed[:_MOST_SHOWN])) + (", …" if len(missed) > _MOST_SHOWN else "")
        console.err.print(f"Not failed or parked, left as they are: {shown}. 'extraction errors' lists those that are.")
        raise typer.Exit(1)
