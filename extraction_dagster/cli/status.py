"""`extraction status`: how far things are."""

from typing import Annotated

import typer
from rich.table import Table

from extraction_dagster.cli import console
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog


def command(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show how many records are done, pending, failed and parked."""
    with open_catalog(load_settings()) as catalog:
        status = catalog.status()
    if as_json:
        console.print_json(status)
        return
    table = Table(show_header=False)
    for name, value in status.items():
        table.add_row(name.replace("_", " "), "-" if value is None else str(value))
    console.out.print(table)
