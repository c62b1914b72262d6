"""`extraction metrics`: what operators watch, as Prometheus reads it."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from extraction_dagster.cli import console
from extraction_dagster.errors.runs import MetricsFileError
from extraction_dagster.files import write_atomically
from extraction_dagster.settings import load_settings

if TYPE_CHECKING:
    from extraction_dagster.watch.scrape import Scrape

_LOOPBACK = "127.0.0.1"
_HIGHEST_PORT = 65535
_READABLE = 0o644  # node_exporter is another user


def command(
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
    """
    if textfile is not None and serve is not None:
        message = "give --textfile or --serve, not both"
        raise typer.BadParameter(message)
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
        message = f"{text!r} is no address: expected PORT or HOST:PORT, for example 9464 or 0.0.0.0:9464"
        raise typer.BadParameter(message)
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
