"""`extraction points`: take points elsewhere."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from extraction_dagster.cli import console
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.index.stage import open_point_store

app = typer.Typer(help="Take the collection's points elsewhere.", no_args_is_help=True)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="The file; one that is there is replaced.")],
) -> None:
    """Write every point, its payload and its vector, to one Parquet file."""
    from extraction_dagster.stages.index.export import export_points

    settings = load_settings()
    with open_point_store(settings) as store, console.counting("points") as count:
        spec = store.open_collection(settings.collection_name)
        total = store.count()
        written = export_points(store, spec, out, on_written=lambda number: count(number, total))
    console.out.print(f"Wrote {written} points of {spec.dim} dimensions to {out}", markup=False)


@app.command()
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
    values = {**settings.model_dump(), "qdrant_url": url}
    if grpc_port is not None:
        values["qdrant_grpc_port"] = grpc_port
    try:
        aimed = Settings(**values)
    except ValidationError as error:
        said = error.errors(include_input=False)[0]["msg"].removeprefix("Value error, ")
        raise typer.BadParameter(f"--to expects {said}") from None
    if aimed.qdrant_url == settings.qdrant_url and aimed.qdrant_grpc_port == settings.qdrant_grpc_port:
        raise typer.BadParameter("--to is the server that the settings name already")
    return aimed
