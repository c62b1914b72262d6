"""`extraction checkpoint`: look at the cursor and its mirror, and say where to start."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from extraction_dagster.cli import console
from extraction_dagster.errors import ExtractionError
from extraction_dagster.errors.runs import MirrorError
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import Catalog, open_catalog
from extraction_dagster.ticks.cursor import CursorState, Requests
from extraction_dagster.ticks.mirrors import make_mirror, read_legacy_checkpoint

app = typer.Typer(
    no_args_is_help=True,
    help="Look at the checkpoint, or say where to start.\n\nFor example: extraction checkpoint show",
)


@app.command()
def show(*, as_json: console.AsJson = False) -> None:
    """Show the cursor, its mirror and the requests that wait for the next tick.

    For example: extraction checkpoint show
    """
    from extraction_dagster.defs.instance.opening import ask

    settings = load_settings()
    with open_catalog(settings) as catalog:
        document = _document(settings, catalog, ask(settings).cursor)
    if as_json:
        console.print_json(document)
    else:
        console.print_values((name.replace("_", " "), value) for name, value in document.items())


def _document(settings: Settings, catalog: Catalog, stored: str | None) -> dict[str, Any]:
    document: dict[str, Any] = dict.fromkeys(
        ("last_processed_id", "frontier_id", "floor_id", "reset_epoch", "updated_at", "cursor_error")
    )
    if stored:
        try:
            state = CursorState.from_json(stored, source=catalog.source.identity)
        except ExtractionError as error:
            document["cursor_error"] = str(error)
        else:
            document |= {name: getattr(state, name) for name in list(document)[:4]}
            document["updated_at"] = f"{state.updated_at:%Y-%m-%dT%H:%M:%SZ}"
    mirror = make_mirror(settings, catalog.state_engine)
    reading, unusable = None, {}
    try:
        reading = mirror.read() if mirror else None
    except MirrorError as error:
        unusable = {"mirror_state": "unusable", "mirror_error": str(error)}
    document |= {
        "mirror": mirror.name if mirror else None,
        "mirror_state": reading.state if reading else None,
        "mirror_last_processed_id": reading.last_processed_id if reading else None,
        "requests_waiting": [
            f"set {request.value}" if request.kind == "set" else "reset"
            for request in Requests(catalog.state_engine).waiting()
            if request.applied_epoch is None or request.applied_epoch > (document["reset_epoch"] or 0)
        ],
    }
    return document | unusable


@app.command("set", cls=console.TakesNegativeIds)
def set_(
    last_processed_id: Annotated[
        int, typer.Argument(metavar="ID", parser=console.parse_id, help="The last id that counts as processed.")
    ],
    *,
    reprocess: Annotated[
        bool,
        typer.Option(
            "--reprocess",
            help="Rows above ID that are done become pending, and are decoded again; those that new state tables do "
            "not know take what is stored.",
        ),
    ] = False,
    as_json: console.AsJson = False,
) -> None:
    """Start after ID: rows at or below are left alone, rows above are processed; done ones stay done.

    For example: extraction checkpoint set 46336
    """
    settings = load_settings()
    with open_catalog(settings) as catalog:
        if reprocess:
            catalog.reprocess_after(last_processed_id)
        _ask(settings, catalog, "set", last_processed_id, console.Answer(as_json))


@app.command()
def reset(
    *,
    storage: Annotated[
        Literal["all", "cursor", "json", "table"],
        typer.Option(help="What to reset; a mirror alone is written by the next tick."),
    ] = "all",
    as_json: console.AsJson = False,
) -> None:
    """Start from the beginning: every row that is not done is processed; done ones stay done.

    For example: extraction checkpoint reset
    """
    settings, say = load_settings(), console.Answer(as_json)
    with open_catalog(settings) as catalog:
        if storage in {"json", "table"}:
            mirrored = settings.model_copy(update={"checkpoint_mirror": storage})
            mirror = make_mirror(mirrored, catalog.state_engine)
            if mirror is not None:
                mirror.write(None, now=datetime.now(UTC))
                say.text(f"Cleared {mirror.name}; the next tick writes the watermark where it is used.")
            say.document({"state": "cleared", "mirror": mirror.name if mirror else None})
            return
        _ask(settings, catalog, "reset", None, say)


@app.command("import")
def import_(
    source: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The file; the table extraction_checkpoint when left out.")
    ] = None,
    *,
    as_json: console.AsJson = False,
) -> None:
    """Start where the earlier script stopped: read its checkpoint file or table, and set it.

    For example: extraction checkpoint import checkpoint.json
    """
    settings, say = load_settings(), console.Answer(as_json)
    with open_catalog(settings) as catalog:
        # Where the state is kept elsewhere, a table of that name there is our own mirror.
        found = read_legacy_checkpoint(source, catalog.source_engine, catalog.state_engine)
        say.text(f"Read {found.last_processed_id} from {found.told}")
        _ask(settings, catalog, "set", found.last_processed_id, say, read_from=found.told)


def _ask(
    settings: Settings,
    catalog: Catalog,
    kind: Literal["set", "reset"],
    value: int | None,
    say: console.Answer,
    **more: str,
) -> None:
    """Leave a request for the next tick; apply it at once where no daemon ticks."""
    from extraction_dagster.defs.instance.cursor_store import CursorStore
    from extraction_dagster.defs.instance.launching import open_instance

    requests = Requests(catalog.state_engine)
    requests.add(kind, value)
    what = "from the beginning" if value is None else f"after ID {value}"
    with open_instance(settings) as instance:
        store = CursorStore(instance)
        if store.is_ticking():
            say.text(f"The next tick of the sensor starts {what}.")
            say.document({"state": "waiting", "last_processed_id": value, **more})
            return
        now, source = datetime.now(UTC), catalog.source.identity
        state = _usable(store.read(), source) or CursorState.first(source, now=now)
        state = requests.apply(state, now=now)
        store.write(state.to_json())  # the next tick consumes the request, or applies it to what was stored meanwhile
    reached = {"last_processed_id": state.last_processed_id, "floor_id": state.floor_id}
    say.text(f"Processing starts {what}.")
    say.text(json.dumps(reached))
    say.document({"state": "applied", **reached, **more})


def _usable(stored: str | None, source: str) -> CursorState | None:
    """The stored state; None when there is none that can be used, which is what a reset is for."""
    try:
        return CursorState.from_json(stored, source=source) if stored else None
    except ExtractionError:
        return None
