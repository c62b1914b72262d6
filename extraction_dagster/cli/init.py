"""`extraction init`: prepare a folder, the Dagster instance and the state tables."""

from pathlib import Path

from extraction_dagster.cli import console
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import Catalog, open_catalog
from extraction_dagster.stages.catalog.pending import make_pending_index
from extraction_dagster.stages.catalog.state_tables import newest_version


def command() -> None:
    """Prepare everything that a run needs; safe to repeat.

    Writes workspace.yaml and dagster.yaml into this folder unless they are there, creates Dagster's storage, checks
    the source table, creates or migrates the state tables, and creates the partial index that finds pending rows.
    """
    from extraction_dagster.defs.instance.launching import open_instance, template
    from extraction_dagster.defs.instance.private_api import retry_only_new_failures

    settings = load_settings()
    for name in ("workspace.yaml", "dagster.yaml"):
        if not Path(name).exists():
            Path(name).write_text(template(name))
            console.out.print(f"Wrote {name}")
    with open_instance(settings) as instance:
        retry_only_new_failures(instance)
        console.out.print(f"Dagster's storage is ready under {settings.home / 'dagster'}")
    with open_catalog(settings) as catalog:
        console.out.print(f"Source table {catalog.source.name!r} can be used: {catalog.source.count()} eligible rows")
        console.out.print(f"The state tables are ready (version {newest_version()})")
        console.out.print(_index_told(catalog), markup=False)


def _index_told(catalog: Catalog) -> str:
    """Make the partial index over pending rows, or say what a person with the rights should run."""
    made = make_pending_index(catalog.source, catalog.source_engine)
    if made.state == "not needed":
        return "No index over pending rows: there is no mark column to index, or the source is read-only"
    if made.state == "refused":
        who = f"Ask somebody who may alter {catalog.source.name!r} to run this; until then each tick reads more:"
        return f"{who}\n  {made.sql}"
    return "The index over pending rows is ready"
