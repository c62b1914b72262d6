"""`extraction search`: which frames look like this."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from extraction_dagster.cli import console
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.index.point_store import Hit


def command(
    *,
    image: Annotated[Path, typer.Option("--image", help="Picture to search with.", metavar="FILE")],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most hits shown, best first.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Search the collection for frames that look like a picture; a higher score is more alike, 1 is the same."""
    hits = search_image(load_settings(), image, limit=limit)
    if as_json:
        console.print_json({"query": str(image), "hits": [asdict(hit) for hit in hits]})
        return
    console.out.print(hits_table(hits), soft_wrap=False)


def search_image(settings: Settings, image: Path, *, limit: int) -> list[Hit]:
    """The frames most like a picture, one per video, best first."""
    from extraction_dagster.stages.embed.model import load_model
    from extraction_dagster.stages.embed.query import embed_query_image, load_query_image
    from extraction_dagster.stages.index.point_store import open_point_store
    from extraction_dagster.stages.index.search import search_images

    query = load_query_image(image)
    vector = embed_query_image(load_model(settings), query, shown=str(image))
    with open_point_store(settings) as store:
        store.open_collection(settings.collection_name)
        return search_images(store, vector, limit=limit, group_by_video=True)


def hits_table(hits: list[Hit]) -> Table:
    """Hits as a table."""
    table = Table("score", "record", "second", "platform", "code")
    table.add_column("path", overflow="fold")
    for hit in hits:
        cells = (str(hit.record_id), f"{hit.frame_second:.2f}", hit.platform or "-", hit.video_code or "-", hit.path)
        table.add_row(f"{hit.score:.4f}", *cells)
    return table
