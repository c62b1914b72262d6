"""`extraction collection`: which collections there are, and changing the model without a pause."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from extraction_dagster.cli import console
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.stage import open_point_store

app = typer.Typer(
    help="The collections under EXTRACTION_COLLECTION_NAME: one in use, others beside it.", no_args_is_help=True
)
_Fingerprint = Annotated[str, typer.Argument(metavar="FINGERPRINT", help="As 'extraction collection list' shows it.")]


@app.command("list")
def list_(*, as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False) -> None:
    """Show every collection: what it holds, whether searches use it, whether the settings give its vectors."""
    from extraction_dagster.stages.embed.models.registry import embedding_fingerprint
    from extraction_dagster.stages.index.staging import list_collections

    settings = load_settings()
    with open_point_store(settings) as store:
        found = list_collections(store, settings.collection_name)
    own = embedding_fingerprint(settings)
    if as_json:
        rows = [{**asdict(item), "of_these_settings": item.fingerprint == own} for item in found]
        console.print_json({"name": settings.collection_name, "collections": rows})
        return
    table = Table("fingerprint", "dim", "points", "in use", "of these settings")
    for item in found:
        yes = ("yes" if item.in_use else "-", "yes" if item.fingerprint == own else "-")
        table.add_row(item.fingerprint, str(item.dim), str(item.points), *yes)
    console.out.print(table if found else "There is no collection yet.")


@app.command()
def stage() -> None:
    """Create a collection for the vectors of these settings beside the one in use; searches don't change."""
    from extraction_dagster.stages.embed.models.registry import load_model
    from extraction_dagster.stages.index.staging import stage_collection

    settings = load_settings()
    model = load_model(settings, may_compile=False)
    with open_point_store(settings) as store:
        beside = stage_collection(store, CollectionSpec.of(settings, dim=model.dim, fingerprint=model.fingerprint))
    if beside:
        console.out.print(
            f"Staged {model.fingerprint}: launch every range with these settings, then 'extraction collection publish'."
        )
    else:
        console.out.print(f"Collection {model.fingerprint} is the one in use: nothing to change.")


@app.command()
def publish(
    fingerprint: Annotated[
        str | None, typer.Argument(metavar="[FINGERPRINT]", help="Which one; that of these settings when left out.")
    ] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Publish it although records are missing.")] = False,
) -> None:
    """Let a collection take over, once every record that is done is in it with all its points."""
    from extraction_dagster.stages.catalog.catalog import open_catalog
    from extraction_dagster.stages.embed.models.registry import embedding_fingerprint
    from extraction_dagster.stages.index.staging import publish_collection

    settings = load_settings()
    chosen = fingerprint or embedding_fingerprint(settings)
    with open_catalog(settings) as catalog, open_point_store(settings) as store:
        records = publish_collection(store, catalog, name=settings.collection_name, fingerprint=chosen, force=force)
    verified = "not verified" if force else f"{records} records verified"
    console.out.print(f"Searches use {chosen} from now on ({verified}).")


@app.command()
def drop(
    fingerprint: _Fingerprint,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Remove a collection that is not in use, with all its points."""
    settings = load_settings()
    with open_point_store(settings) as store:
        if not yes:
            typer.confirm(f"Remove collection {settings.collection_name}-{fingerprint} for good?", abort=True)
        store.drop(settings.collection_name, fingerprint)
    console.out.print(f"Removed {fingerprint}.")
