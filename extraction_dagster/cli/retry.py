"""`extraction retry`: give failed and parked records their tries back."""

from typing import Annotated

import typer

from extraction_dagster.cli import console
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog


def command(
    *,
    record_ids: Annotated[list[int] | None, typer.Argument(metavar="[ID]...", help="These records.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every failed or parked record.")] = False,
    error_type: Annotated[str | None, typer.Option("--error", help="Those whose last error is of this type.")] = None,
) -> None:
    """Make failed and parked records due at once: the next tick, run or launch takes them."""
    if sum((bool(record_ids), everything, error_type is not None)) != 1:
        message = "give record ids, or --all, or --error TYPE: exactly one of them"
        raise typer.BadParameter(message)
    with open_catalog(load_settings()) as catalog:
        brought_back = catalog.ledger.retry(record_ids=record_ids, error_type=error_type)
    console.out.print(f"{len(brought_back)} records are due again.")
    if missed := sorted(set(record_ids or ()) - set(brought_back)):
        console.err.print(f"Not failed or parked, left as they are: {', '.join(map(str, missed))}")
        raise typer.Exit(1)
