"""`extraction init`: prepare a folder, the Dagster instance and the state tables."""

from pathlib import Path

from extraction_dagster.cli import console
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog


def command() -> None:
    """Prepare everything that a run needs; safe to repeat.

    Writes workspace.yaml and dagster.yaml into this folder unless they are there, creates Dagster's storage, checks
    the source table and creates the state tables.
    """
    from extraction_dagster.defs.launching import open_instance, template

    settings = load_settings()
    for name in ("workspace.yaml", "dagster.yaml"):
        if not Path(name).exists():
            Path(name).write_text(template(name))
            console.out.print(f"Wrote {name}")
    with open_instance(settings):
        console.out.print(f"Dagster's storage is ready under {settings.home / 'dagster'}")
    with open_catalog(settings) as catalog:
        console.out.print(f"Source table {catalog.source.name!r} can be used: {catalog.source.count()} eligible rows")
        console.out.print("The state tables are ready")
