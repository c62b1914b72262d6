"""`extraction run`: process whatever is due, in this terminal, without a daemon."""

from typing import Annotated

import typer

from extraction_dagster.cli import console
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog


def command(
    *,
    follow: Annotated[bool, typer.Option("--follow", help="Go on for ever, as rows arrive.")] = False,
) -> None:
    """Process every row that is due, range by range, until the table is drained; Ctrl+C stops, the next call resumes.

    The same as the sensor under a daemon, with the same cursor: use one or the other.
    """
    from extraction_dagster.defs.instance.draining import drain
    from extraction_dagster.defs.instance.launching import open_instance

    settings = load_settings()
    with open_catalog(settings):
        pass  # refuses a table that can't be used before anything is started
    with open_instance(settings) as instance, console.long_work():
        drained = drain(instance, settings, follow=follow)
    console.out.print(f"Processed {drained.num_processed} records; no row is due.")
    if drained.num_waiting:
        console.out.print(f"{drained.num_waiting} failed records wait for their next try.")
    if drained.num_active:
        console.out.print(f"On {drained.num_active} ranges other runs are working.")
