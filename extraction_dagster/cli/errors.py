"""`extraction errors`: which records failed, and why."""

from dataclasses import asdict
from typing import Annotated

import typer

from extraction_dagster.cli import console
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog


def command(
    *,
    error_type: Annotated[str | None, typer.Option("--type", help="Only errors of this type.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Most errors shown, newest first.")] = 50,
    history: Annotated[bool, typer.Option("--history", help="Every error ever, not only the unresolved.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
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
