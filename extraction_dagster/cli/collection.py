"""The commands about the collection: `reconcile` it with the table, change it, take its points elsewhere."""

import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.table import Table

from extraction_dagster.cli import console
from extraction_dagster.cli.arguments import AnyRange
from extraction_dagster.errors import some
from extraction_dagster.errors.index import PointFileError
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.catalog.identity import source_identity
from extraction_dagster.stages.index import reconcile as reconciling
from extraction_dagster.stages.index.compare import WHOLE
from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore
from extraction_dagster.stages.index.stage import names_source, open_for_writing, open_point_store
from extraction_dagster.stages.index.staging import list_collections, publish_collection, stage_collection

if TYPE_CHECKING:
    from extraction_dagster.stages.index.importing import Imported
    from extraction_dagster.stages.index.point_files import PointFile

app = typer.Typer(
    help="The collections under EXTRACTION_COLLECTION_NAME: one in use, others beside it.\n\n"
    "For example: extraction collection list",
    no_args_is_help=True,
)
points = typer.Typer(
    help="Take the collection's points elsewhere, and back.\n\nFor example: extraction points export points.parquet",
    no_args_is_help=True,
)
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

    For example: extraction reconcile 1-1000 --repair
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
    console.out.print(summary, markup=False)


@app.command("list")
def list_(*, as_json: console.AsJson = False) -> None:
    """Show every collection: what it holds, whether searches use it, whether the settings give its vectors.

    For example: extraction collection list
    """
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
def stage(*, as_json: console.AsJson = False) -> None:
    """Create a collection for the vectors of these settings beside the one in use; searches don't change.

    For example: extraction collection stage
    """
    from extraction_dagster.stages.embed.models.registry import load_model

    settings = load_settings()
    model = load_model(settings, may_compile=False)
    with open_point_store(settings) as store:
        beside = stage_collection(store, CollectionSpec.of(settings, dim=model.dim, fingerprint=model.fingerprint))
    then = "launch every range with these settings, then 'extraction collection publish'."
    is_told = f"Staged {model.fingerprint}: {then}"
    say = console.Answer(as_json)
    say.text(is_told if beside else f"Collection {model.fingerprint} is the one in use: nothing to change.")
    say.document({"fingerprint": model.fingerprint, "dim": model.dim, "staged": beside})


@app.command()
def publish(
    fingerprint: Annotated[
        str | None, typer.Argument(metavar="[FINGERPRINT]", help="Which one; that of these settings when left out.")
    ] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Publish it although records are missing.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """Put a collection in use, once every record that is done is in it with all its points.

    For example: extraction collection publish
    """
    from extraction_dagster.stages.embed.models.registry import embedding_fingerprint

    settings = load_settings()
    chosen = fingerprint or embedding_fingerprint(settings)
    with open_catalog(settings) as catalog, open_point_store(settings) as store:
        records = publish_collection(store, catalog, name=settings.collection_name, fingerprint=chosen, force=force)
    verified = "not verified" if force else f"{records} records verified"
    say = console.Answer(as_json)
    say.text(f"Searches use {chosen} from now on ({verified}).")
    say.document({"fingerprint": chosen, "verified_records": None if force else records})


@app.command()
def drop(
    fingerprint: Annotated[
        str, typer.Argument(metavar="FINGERPRINT", help="As 'extraction collection list' shows it.")
    ],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """Remove a collection that is not in use, with all its points.

    For example: extraction collection drop 0123456789abcdef --yes
    """
    if as_json and not yes:
        raise typer.BadParameter("--json goes with --yes: the question would stand before the document")
    settings = load_settings()
    with open_point_store(settings) as store:
        if not yes and fingerprint in store.collections(settings.collection_name):  # else it is refused without asking
            typer.confirm(f"Remove collection {settings.collection_name}-{fingerprint} and all its points?", abort=True)
        store.drop(settings.collection_name, fingerprint)
    say = console.Answer(as_json)
    say.text(f"Removed {fingerprint}.")
    say.document({"removed": fingerprint})


@points.command()
def export(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The file, a name in .parquet, .jsonl or .jsonl.gz; replaced if there."),
    ],
    *,
    as_json: console.AsJson = False,
) -> None:
    """Write every point, its payload and its vector, to one file: Parquet or lines of JSON, by the end of its name.

    For example: extraction points export points.parquet
    """
    from extraction_dagster.stages.index.export import export_points
    from extraction_dagster.stages.index.point_files import ENDINGS, ending_of

    if ending_of(out) is None:
        raise typer.BadParameter(f"OUT is {str(out)!r}, expected a name that ends in {', '.join(ENDINGS)}")
    settings = load_settings()
    with open_point_store(settings) as store, console.counting("points") as count:
        spec = store.open_collection(settings.collection_name)
        total = store.count()
        written = export_points(store, spec, out, on_written=lambda number: count(number, total))
    say = console.Answer(as_json)
    say.text(f"Wrote {written} points of {spec.dim} dimensions to {out}")
    say.document({"file": str(out), "points": written, "dim": spec.dim, "fingerprint": spec.fingerprint})


@points.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What 'extraction points export' wrote.")],
    *,
    as_json: console.AsJson = False,
) -> None:
    """Write the points of an exported file into the collection, unless they are there; safe to repeat.

    All of the file is checked before anything is written. A record that the collection has from something else, such as
    another version of its video, keeps its points; then the exit code is 1.

    For example: extraction points import points.parquet
    """
    from extraction_dagster.stages.index import importing
    from extraction_dagster.stages.index.point_files import ENDINGS, ending_of, open_point_file

    if ending_of(file) is None:
        raise typer.BadParameter(f"FILE is {str(file)!r}, expected a name that ends in {', '.join(ENDINGS)}")
    settings = load_settings()
    caps = importing.Caps.of(settings)
    with open_point_file(file, most_bytes=caps.most_bytes) as found:
        source = _source_of(settings, found)
        with open_point_store(settings, source=source) as store:
            spec = _fitting(settings, store, found)
            with console.counting("points checked") as count:
                importing.check_points(found, caps, on_checked=lambda number: count(number, found.points))
            open_for_writing(store, spec)
            with console.counting("points") as count:
                done = importing.import_points(store, found, caps, on_done=lambda number: count(number, found.points))
    _tell_imported(console.Answer(as_json), file, spec, done)


def _source_of(settings: Settings, file: "PointFile") -> str:
    """The mark of the source table whose points the collection holds; of the file's, where the settings name none."""
    head = file.head
    if not names_source(settings):
        return head.source
    mine = source_identity(settings)
    if not head.source:
        console.err.print(f"warning: {file.path} does not say of which source table its points are", markup=False)
    elif head.source != mine:
        with open_catalog(settings, creates=False) as catalog:  # it knows the table's earlier addresses
            mine = catalog.source.identity
        if head.source != mine:
            why = "its points are of another source table, or of this one at another address"
            fix = (
                "If the database moved, run 'extraction init --take-over'. Else set EXTRACTION_SOURCE_URL to its table."
            )
            raise PointFileError(str(file.path), "", why, fix)
    return mine


def _fitting(settings: Settings, store: PointStore, file: "PointFile") -> CollectionSpec:
    """The collection for a file's vectors: the one that holds such, or the one that the settings would make."""
    from extraction_dagster.stages.embed.models.registry import load_model
    from extraction_dagster.stages.index.importing import require_fit

    there, name = store.collections(settings.collection_name), settings.collection_name
    if file.head.fingerprint in there:
        spec = store.open_collection(name, fingerprint=file.head.fingerprint)
    else:
        if any(there.values()):
            store.open_collection(name)  # refuses one of another source table
        model = load_model(settings, may_compile=False)
        spec = CollectionSpec.of(settings, dim=model.dim, fingerprint=model.fingerprint)
    require_fit(str(file.path), file.head, spec)
    return spec


def _tell_imported(say: console.Answer, file: Path, spec: CollectionSpec, done: "Imported") -> None:
    counts = {"written": done.written, "unchanged": done.unchanged, "refused": done.refused}
    say.document({"file": str(file), "collection": spec.full_name, **counts, "refused_records": done.refused_records})
    say.text(
        f"{file} into {spec.full_name}: " + ", ".join(f"{number} points {what}" for what, number in counts.items())
    )
    if done.refused:
        console.err.print(
            f"Refused: the collection has {some(done.refused_records)} from another version or other settings, and "
            "keeps those. 'extraction reconcile' compares the collection with the table.",
            markup=False,
        )
        raise typer.Exit(1)


@points.command()
def copy(
    *,
    to: Annotated[str, typer.Option("--to", metavar="URL", help="Qdrant server to copy to: http://qdrant:6333")],
    grpc_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Its gRPC port; EXTRACTION_QDRANT_GRPC_PORT when left out.")
    ] = None,
    as_json: console.AsJson = False,
) -> None:
    """Copy every point to a server and see that each record has as many there; safe to repeat.

    The server's key is EXTRACTION_QDRANT_API_KEY. Afterwards set EXTRACTION_QDRANT_URL to the server.

    For example: extraction points copy --to http://qdrant:6333
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
    say = console.Answer(as_json)
    say.text(f"Copied {copied} points to {to}; each record has as many there as here.")
    say.document({"points": copied, "to": to})


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
