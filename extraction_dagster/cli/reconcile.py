"""`extraction reconcile`: does the collection hold what the table says."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from extraction_dagster.cli import console
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog

if TYPE_CHECKING:
    from extraction_dagster.stages.index.protocol import PointStore

_MOST_SHOWN = 50


def command(
    id_range: Annotated[
        str | None, typer.Argument(metavar="[FIRST-LAST]", help="Range of ids, both ends included; all when left out.")
    ] = None,
    *,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Remove points of deleted rows, make records pending that lost points."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Compare the collection with the table, record by record, by exact counts.

    Lost and stale points are written again by the next run of their range; with --repair their records become pending.
    Ends with exit code 1 while differences remain.
    """
    from extraction_dagster.stages.embed.models.registry import embedding_fingerprint
    from extraction_dagster.stages.index.compare import WHOLE
    from extraction_dagster.stages.index.reconcile import reconcile

    settings = load_settings()
    within = IdRange.parse(id_range) if id_range else WHOLE
    with open_catalog(settings) as catalog:
        found = reconcile(
            catalog,
            _opener(settings),
            collection_name=settings.collection_name,
            embedding=embedding_fingerprint(settings),
            within=within,
            repair=repair,
        )
    if as_json:
        console.print_json(found.document())
    else:
        _print(found.rows(limit=_MOST_SHOWN), found.summary)
        if found.remaining and not repair:
            console.out.print("Repair it with 'extraction reconcile --repair'.")
        elif found.remaining:
            console.out.print("Those records are pending now: 'extraction run', or the sensor, writes them again.")
    if found.remaining:
        raise typer.Exit(1)


def _opener(settings: Settings) -> "Callable[[], PointStore]":
    """Opens the store: at once the first time, so that it is said who holds it; later on it waits, as runs do."""
    from extraction_dagster.stages.index.stage import open_point_store

    patience = itertools.chain([0.0], itertools.repeat(settings.qdrant_timeout_seconds))
    return lambda: open_point_store(settings, wait_seconds=next(patience))


def _print(rows: list[dict[str, int | None]], summary: str) -> None:
    if rows:
        table = Table("record", "lost", "stale", "gone")
        for row in rows:
            table.add_row(*("-" if number is None else str(number) for number in row.values()))
        console.out.print(table, soft_wrap=False)
    console.out.print(summary)
