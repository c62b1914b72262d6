"""The commands about the collection: `reconcile` it with the table, change it, take its points elsewhere."""

import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.table import Table

from extraction_dagster.cli import console
from extraction_dagster.cli.arguments import AnyRange
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.index import reconcile as reconciling
from extraction_dagster.stages.index.compare import WHOLE
from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore
from extraction_dagster.stages.index.stage import open_point_store
from extraction_dagster.stages.index.staging import list_collections, publish_collection, stage_collection

app = typer.Typer(
    help="The collections under EXTRACTION_COLLECTION_NAME: one in use, others beside it.", no_args_is_help=True
)
points = typer.Typer(help="Take the collection's points elsewhere.", no_args_is_help=True)
_MOST_SHOWN = 50


def reconcile(
    id_range: AnyRange = None,
    *,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Remove points of deleted rows, make records pending that lost points."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="With --repair: remove more than EXTRACTION_PURGE_SHARE of all records."),
    ] = False,
    as_json: console.AsJson = False,
) -> None:
    """Compare the collection with the table, record by record, by exact counts.

    Lost and stale points are written again by the next run of their range; with --repair their records become pending.
    Points of deleted rows are removed by a reconciliation that finds the rows gone EXTRACTION_PURGE_AFTER_SECONDS
    after an earlier one did. Ends with exit code 1 while differences remain, other than those that wait so.
    """
    from extraction_dagster.stages.embed.models.registry import embedding_fingerprint

    if force and not repair:
        raise typer.BadParameter("--force goes with --repair")
    settings = load_settings()
    with open_catalog(settings) as catalog:
        found = reconciling.reconcile(
            catalog,
            _opener(settings),
            collection_name=settings.collection_name,
            embedding=embedding_fingerprint(settings),
            within=id_range or WHOLE,
            repair=repair,
            force=force,
        )
    if as_json:
        console.print_json(found.document())
    else:
        _print(found.rows(limit=_MOST_SHOWN), found.summary)
        if found.remaining and not repair:
            console.out.print("Repair it with 'extraction reconcile --repair'.")
        elif found.num_pending:
            console.out.print("Those records are pending now: 'extraction run', or the sensor, writes them again.")
    if found.remaining:
        raise typer.Exit(1)


def _opener(settings: Settings) -> Callable[[], PointStore]:
    """Opens the store: at once the first time, so that its holder is named; later on it waits, as runs do."""
    patience = itertools.chain([0.0], itertools.repeat(settings.qdrant_timeout_seconds))
    return lambda: open_point_store(settings, wait_seconds=next(patience))


def _print(rows: list[dict[str, int | None]], summary: str) -> None:
    if rows:
        table = Table("record", "lost", "stale", "gone")
        for row in rows:
            table.add_row(*("-" if number is None else str(number) for number in row.values()))
        console.out.print(table, soft_wrap=False)
    console.out.print(summary)


@app.command("list")
def list_(*, as_json: console.AsJson = False) -> None:
    """Show every collection: what it holds, whether searches use it, whether the settings give its vectors."""
    from extraction_dagster.stages.embed.models.registry import embedding_fingerprint

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
    """Put a collection in use, once every record that is done is in it with all its points."""
    from extraction_dagster.stages.embed.models.registry import embedding_fingerprint

    settings = load_settings()
    chosen = fingerprint or embedding_fingerprint(settings)
    with open_catalog(settings) as catalog, open_point_store(settings) as store:
        records = publish_collection(store, catalog, name=settings.collection_name, fingerprint=chosen, force=force)
    verified = "not verified" if force else f"{records} records verified"
    console.out.print(f"Searches use {chosen} from now on ({verified}).")


@app.command()
def drop(
    fingerprint: Annotated[
        str, typer.Argument(metavar="FINGERPRINT", help="As 'extraction collection list' shows it.")
    ],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Remove a collection that is not in use, with all its points."""
    settings = load_settings()
    with open_point_store(settings) as store:
        if not yes:
            typer.confirm(f"Remove collection {settings.collection_name}-{fingerprint} and all its points?", abort=True)
        store.drop(settings.collection_name, fingerprint)
    console.out.print(f"Removed {fingerprint}.")


@points.command()
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="The file; one that is there is replaced.")],
) -> None:
    """Write every point, its payload and its vector, to one Parquet file."""
    from extraction_dagster.stages.index.export import export_points

    if out.suffix.lower() != ".parquet":
        raise typer.BadParameter(f"OUT is {str(out)!r}, expected a name that ends in .parquet")
    settings = load_settings()
    with open_point_store(settings) as store, console.counting("points") as count:
        spec = store.open_collection(settings.collection_name)
        total = store.count()
        written = export_points(store, spec, out, on_written=lambda number: count(number, total))
    console.out.print(f"Wrote {written} points of {spec.dim} dimensions to {out}", markup=False)


@points.command()
def copy(
    *,
    to: Annotated[str, typer.Option("--to", metavar="URL", help="Qdrant server to copy to: http://qdrant:6333")],
    grpc_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Its gRPC port; EXTRACTION_QDRANT_GRPC_PORT when left out.")
    ] = None,
) -> None:
    """Copy every point to a server and see that each record has as many there; safe to repeat.

    The server's key is EXTRACTION_QDRANT_API_KEY. Afterwards set EXTRACTION_QDRANT_URL to the server.
    """
    from extraction_dagster.stages.index.export import copy_points

    settings = load_settings()
    target_settings = _aimed_at(settings, to, grpc_port)
    with open_point_store(settings) as source, open_point_store(target_settings) as target:
        spec = source.open_collection(settings.collection_name)
        total = source.count()
        target.ensure_collection(spec)
        with console.counting("points") as count:
            copied = copy_points(source, target, on_copied=lambda number: count(number, total))
    console.out.print(f"Copied {copied} points to {to}; each record has as many there as here.", markup=False)


def _aimed_at(settings: Settings, url: str, grpc_port: int | None) -> Settings:
    port = settings.qdrant_grpc_port if grpc_port is None else grpc_port
    try:
        aimed = Settings(**settings.model_dump() | {"qdrant_url": url, "qdrant_grpc_port": port})
    except ValidationError as error:
        said = error.errors(include_input=False)[0]["msg"].removeprefix("Value error, ")
        raise typer.BadParameter(f"--to expects {said}") from None
    if aimed.qdrant_url == settings.qdrant_url and aimed.qdrant_grpc_port == settings.qdrant_grpc_port:
        raise typer.BadParameter("--to is the server that the settings name already")
    return aimed
