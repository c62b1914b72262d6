"""What operators call: `init` and `doctor` before the first run, `notify` to try notices, `metrics` for Prometheus."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import SecretStr
from rich.table import Table

from extraction_dagster.addresses import shown_address
from extraction_dagster.cli import console
from extraction_dagster.errors import ExtractionError, SettingsError
from extraction_dagster.errors.index import CollectionMissingError
from extraction_dagster.errors.runs import MetricsFileError
from extraction_dagster.files import write_atomically
from extraction_dagster.settings import PREFIX, Settings, load_settings, permission_warnings
from extraction_dagster.stages.catalog.catalog import Catalog, open_catalog
from extraction_dagster.stages.catalog.changes import growth_of
from extraction_dagster.stages.catalog.database import describe_tls
from extraction_dagster.stages.catalog.indexing import make_pending_index
from extraction_dagster.stages.catalog.rights import require_rights
from extraction_dagster.stages.catalog.state_tables import newest_version, state_version

if TYPE_CHECKING:
    from extraction_dagster.watch.scrape import Scrape

_LOOPBACK = "127.0.0.1"
_HIGHEST_PORT = 65535
_READABLE = 0o644  # node_exporter is another user


def init(
    *,
    takes_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="The database moved: what was made of it at its earlier address goes on as it is.",
        ),
    ] = False,
    propose: Annotated[
        str | None,
        typer.Option(
            "--propose",
            metavar="URL",
            help="Look at the tables of this database, print the settings for the likeliest one, and do nothing.",
        ),
    ] = None,
    as_json: console.AsJson = False,
) -> None:
    """Prepare everything that a run needs; safe to repeat.

    Asks whether the database's user has the rights, writes workspace.yaml and dagster.yaml into this folder unless they
    are there, creates Dagster's storage, checks the source table, creates or migrates the state tables, and creates
    the partial index that finds pending rows.

    For example: extraction init --propose postgresql://me@db/media > .env, then extraction init
    """
    say = console.Answer(as_json)
    if propose is not None:
        _print_proposal(propose, say)
        return
    from extraction_dagster.defs.instance.glance import template
    from extraction_dagster.defs.instance.launching import open_instance
    from extraction_dagster.defs.instance.private_api import retry_only_new_failures

    settings = load_settings()
    require_rights(settings)
    with open_catalog(settings, takes_over=takes_over) as catalog:
        done = {"table": catalog.source.name, "eligible_rows": catalog.source.count()}
        say.text(f"Source table {catalog.source.name!r} can be used: {done['eligible_rows']} eligible rows")
        _rehearse(catalog)
        if takes_over:
            _take_over(settings, catalog)
            say.text("What was made of this table at an earlier address is taken over: work goes on where it was")
        say.text(f"The state tables are ready (version {newest_version()})")
        index = _index_told(catalog)
        say.text(index)
    wrote = [name for name in ("workspace.yaml", "dagster.yaml") if not Path(name).exists()]
    for name in wrote:
        Path(name).write_text(template(name))
        say.text(f"Wrote {name}")
    with open_instance(settings) as instance:
        retry_only_new_failures(instance)
    say.text(f"Dagster's storage is ready under {settings.home / 'dagster'}")
    done |= {"taken_over": takes_over, "state_version": newest_version(), "index": index, "wrote": wrote}
    say.document(done | {"storage": str(settings.home / "dagster")})


def _print_proposal(url: str, say: console.Answer) -> None:
    from extraction_dagster.stages.catalog.proposing import propose

    found = propose(url)
    if not say.as_json:
        console.err.print(f"Likeliest table: {found.table} ({found.why})", markup=False)
    for line in found.lines:
        say.text(line)
    say.document({"table": found.table, "why": found.why, "lines": list(found.lines)})


def _rehearse(catalog: Catalog) -> None:
    """Mark a row and take it back, if there is one."""
    newest = catalog.source.newest_id()
    if newest is not None:
        catalog.source.rehearse(newest)


def _take_over(settings: Settings, catalog: Catalog) -> None:
    """Let frames, vectors and points of the source at its earlier address be of its present one."""
    from extraction_dagster.shards.embedding_store import EmbeddingStore
    from extraction_dagster.shards.frame_store import FrameStore
    from extraction_dagster.shards.place import Source
    from extraction_dagster.stages.index.stage import open_point_store

    source = Source(catalog.source.identity, catalog.source.name)
    FrameStore(settings.resolved_frames_uri, "", source=source).take_over()
    EmbeddingStore(settings.resolved_embeddings_uri, "", source=source).take_over()
    if settings.qdrant_url is not None or (settings.home / "qdrant").exists():
        with open_point_store(settings, source=catalog.source.identity) as store:
            for fingerprint in store.collections(settings.collection_name):
                store.open_collection(settings.collection_name, fingerprint=fingerprint)
                store.take_over()


def _index_told(catalog: Catalog) -> str:
    """Make the partial index over pending rows, or say what a person with the rights should run."""
    made = make_pending_index(catalog.source, catalog.source_engine)
    if made.state == "not needed" and catalog.source.kind != "table" and catalog.source.has_marks:
        return f"No index over pending rows: {catalog.source.name!r} is a {catalog.source.kind}; index what it reads"
    if made.state == "not needed":
        return "No index over pending rows: there is no mark column to index, or the source is read-only"
    if made.state == "refused":
        who = f"Ask somebody who may alter {catalog.source.name!r} to run this; until then each tick reads more:"
        return f"{who}\n  {made.sql}"
    return "The index over pending rows is ready"


def doctor(
    *,
    every: Annotated[bool, typer.Option("--all", help="Show every setting, not only those that were changed.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """Show the settings that were changed, then check rights, source table, state, Dagster, the model and the store.

    Only looks: it makes no file and no table. Ends with exit code 1 where a check failed; the others are made anyway.

    For example: extraction doctor --all
    """
    settings = load_settings()
    checks = {
        "rights": _rights,
        "source table and state": _catalog,
        "Dagster's instance": _instance,
        "decoding workers": _workers,
        "embedding model": _model,
        "frames and vectors": _shards,
        "Qdrant": _store,
        "notices": _notices,
    }
    say = console.Answer(as_json)
    shown = _changed(settings, every=every)
    if not as_json:
        table = Table("setting", "value", "default")
        for name, value, default in shown:
            table.add_row(name, value, default)
        console.out.print(table if shown else "Every setting has its default ('extraction doctor --all' shows them).")
    warnings = [*permission_warnings(settings), *_missing_roots(settings)]
    for warning in warnings:
        say.text(f"WARNING {warning}")
    done = {name: _outcome(name, check, settings, say) for name, check in checks.items()}
    say.document(
        {
            "settings": {name: value for name, value, _ in shown},
            "warnings": warnings,
            "checks": [{"name": name, "ok": passed, "told": told} for name, (passed, told) in done.items()],
        }
    )
    if not all(passed for passed, _ in done.values()):
        raise typer.Exit(1)


def _missing_roots(settings: Settings) -> list[str]:
    """The folders from which files should be read, and which are none; the one by default may come later."""
    roots = settings.resolved_allowed_roots if settings.allowed_roots else ()
    return [f"EXTRACTION_ALLOWED_ROOTS names {str(root)!r}, which is no folder" for root in roots if not root.is_dir()]


def _changed(settings: Settings, *, every: bool) -> list[tuple[str, str, str]]:
    """Each setting that is not as it is by default, or each of all: its name, its value, its default."""
    rows = []
    for name, field in Settings.model_fields.items():
        value, default = getattr(settings, name), field.get_default(call_default_factory=True, validated_data={})
        is_default = value == default or (name == "home" and value == Path(default).absolute())
        if every or not is_default:
            rows.append((PREFIX + name.upper(), _shown(value), "" if is_default else _shown(default)))
    return rows


def _shown(value: object) -> str:
    if value is None or value == ():
        return "-"
    return "(hidden)" if isinstance(value, SecretStr) else shown_address(str(value))


def _outcome(name: str, check: Callable[[Settings], str], settings: Settings, say: console.Answer) -> tuple[bool, str]:
    """Whether a check passed, and what it says."""
    try:
        passed, told = True, check(settings)
    except ExtractionError as error:
        passed, told = False, str(error)
    except OSError as error:
        passed, told = False, f"{error.filename or name}: {error.strerror or type(error).__name__}"
    say.text(f"{'ok    ' if passed else 'FAILED'}  {name}: {told}")
    return passed, told


def _rights(settings: Settings) -> str:
    require_rights(settings)
    return "the databases' users may do what a run does"


def _catalog(settings: Settings) -> str:
    with open_catalog(settings, creates=False) as catalog:
        urls = {"source": settings.resolved_source_url, "state": settings.resolved_state_url}
        tls = [f"{name}: {said}" for name, url in urls.items() if (said := describe_tls(url))]
        growth = growth_of(catalog.source, catalog.source_engine, settings.source_version_grows)
        told = ", ".join([catalog.source.name, f"{catalog.source.count()} eligible rows", *tls]) + f"; {growth.told}"
        _rehearse(catalog)
        version = state_version(catalog.state_engine)
    told += f"\n  {growth.sql};" if growth.sql else ""
    if version != newest_version():
        told += f"\n  the state tables (version {version or 'none yet'}) are made or migrated by 'extraction init'"
    return told


def _instance(settings: Settings) -> str:
    from extraction_dagster.defs.instance.launching import is_made, open_instance
    from extraction_dagster.defs.instance.runs import active_runs

    if not is_made(settings):
        return "its storage is made by 'extraction init'"
    with open_instance(settings) as instance:
        return f"{len(active_runs(instance))} active runs"


def _workers(settings: Settings) -> str:
    from extraction_dagster.stages.decode.workers.pool import PoolOptions, look_at_confinement

    return f"confined by {look_at_confinement(PoolOptions.from_settings(settings))}"


def _model(settings: Settings) -> str:
    from extraction_dagster.stages.embed.models.registry import load_model

    model = load_model(settings, may_compile=False)
    return f"{model.name}, {model.dim} dimensions, on {model.device}"


def _shards(settings: Settings) -> str:
    from extraction_dagster.shards.embedding_store import EmbeddingStore
    from extraction_dagster.shards.frame_store import FrameStore
    from extraction_dagster.shards.place import Source

    source = Source.for_reading(settings)
    stores = (
        FrameStore(settings.resolved_frames_uri, "", source=source),
        EmbeddingStore(settings.resolved_embeddings_uri, "", source=source),
    )
    for store in stores:
        store.require_source()
    return ", ".join(f"{store.store_error.what} in {store.shown_root}" for store in stores)


def _store(settings: Settings) -> str:
    if settings.qdrant_url is not None:
        from extraction_dagster.stages.index.server.status import describe

        return describe(settings)
    if not (settings.home / "qdrant").exists():
        return f"collection {settings.collection_name} is made by the first run"
    from extraction_dagster.stages.index.stage import open_point_store

    with open_point_store(settings) as store:
        try:
            store.open_collection(settings.collection_name)
        except CollectionMissingError:
            return f"collection {settings.collection_name} is made by the first run"
        return f"collection {settings.collection_name}, {store.count()} points"


def _notices(settings: Settings) -> str:
    from extraction_dagster.notify import make_notifier

    if make_notifier(settings) is None:
        return "nobody is told of failed runs (EXTRACTION_NOTIFY)"
    return f"{settings.notify}; 'extraction notify' sends a test"


def notify(*, as_json: console.AsJson = False) -> None:
    """Send a test notice, as EXTRACTION_NOTIFY says: what a failed run would send.

    For example: extraction notify
    """
    from extraction_dagster.notify import RunFailure, deliver, make_notifier

    settings = load_settings()
    notifier = make_notifier(settings)
    if notifier is None:
        raise SettingsError("EXTRACTION_NOTIFY", "none", "log, webhook, slack or module:function")
    error = "The video store is down, for example"
    failure = RunFailure("0000-test", "extraction_job", "1-1000", "video_frames", error, failed_records=0, is_test=True)
    with console.warnings():
        deliver(notifier, failure)
    say = console.Answer(as_json)
    say.text(f"A test notice was delivered ({settings.notify}).")
    say.document({"delivered": True, "notify": settings.notify})


def metrics(
    *,
    textfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write them to this file, for node_exporter's textfile collector."),
    ] = None,
    serve: Annotated[
        str | None, typer.Option(metavar="[HOST:]PORT", help="Serve them at http://HOST:PORT/metrics (127.0.0.1).")
    ] = None,
) -> None:
    """Print the metrics as OpenMetrics text; or write them to a file, or serve them to Prometheus.

    Each call costs the same whatever the table's size; rows are counted now and then. extraction_up is 0 when a
    database, the store or Dagster's storage can't be read; the command itself goes on.

    For example: extraction metrics --serve 9464
    """
    if textfile is not None and serve is not None:
        raise typer.BadParameter("give --textfile or --serve, not both")
    address = None if serve is None else _address(serve)
    with _scraping() as scrape:
        if address is not None:
            _serve(scrape, *address)
        elif textfile is not None:
            _write(textfile, scrape.now().classic())
        else:
            sys.stdout.write(scrape.now().openmetrics())


@contextlib.contextmanager
def _scraping() -> Iterator["Scrape"]:
    from extraction_dagster.defs.instance.measuring import InstanceMeter
    from extraction_dagster.watch.scrape import Scrape

    settings = load_settings()
    instance = InstanceMeter(settings)
    with console.warnings(), contextlib.closing(instance), contextlib.closing(Scrape(settings, instance)) as scrape:
        yield scrape


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) <= _HIGHEST_PORT):
        raise typer.BadParameter(
            f"{text!r} is no address: expected PORT or HOST:PORT, for example 9464 or 0.0.0.0:9464"
        )
    return host.strip("[]") or _LOOPBACK, int(port)


def _write(path: Path, text: str) -> None:
    if path.suffix != ".prom":
        console.err.print(f"{path} does not end in .prom: node_exporter's textfile collector will not read it.")
    try:
        write_atomically(path.absolute(), text.encode(), mode=_READABLE)
    except OSError as error:
        raise MetricsFileError(str(path), error.strerror or str(error)) from error


def _serve(scrape: "Scrape", host: str, port: int) -> None:
    from extraction_dagster.watch.scrape import MetricsServer

    with MetricsServer(host, port, scrape.soon) as server:
        shown = f"[{host}]" if ":" in host else host
        console.err.print(f"Serving http://{shown}:{server.server_port}/metrics (Ctrl+C ends it)", markup=False)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.err.print("Stopped serving.")
            raise typer.Exit(130) from None
