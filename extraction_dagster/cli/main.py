"""The `extraction` command.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import functools
import signal
import sys
from collections.abc import Callable

import typer

from extraction_dagster import __version__
from extraction_dagster.cli import (
    backfill,
    checkpoint,
    collection,
    console,
    demo,
    doctor,
    frames,
    init,
    launch,
    metrics,
    notify,
    points,
    reconcile,
    records,
    run,
    search,
)
from extraction_dagster.errors.base import ExtractionError
from extraction_dagster.interrupts import redeliver_dropped_interrupts

app = typer.Typer(
    name="extraction",
    help="Keep a Qdrant collection of video frames in step with a growing table of videos.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Say how to resume when Ctrl+C ends a command; Typer would end it in silence."""

    @functools.wraps(command)
    def run(*arguments: object, **options: object) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            console.err.print("Interrupted. What was finished is kept: run the same command again to go on.")
            raise typer.Exit(130) from None

    return run


for module in (init, demo, run, launch, reconcile, search, metrics, notify, doctor):
    app.command(name=module.__name__.rpartition(".")[2])(_interruptible(module.command))
for command in (records.status, records.errors, records.retry):
    app.command(name=command.__name__)(_interruptible(command))
app.command(name="backfill", cls=backfill.TakesNegativeIds)(_interruptible(backfill.command))
for group in (checkpoint, collection, frames, points):
    for member in group.app.registered_commands:
        if member.callback is not None:
            member.callback = _interruptible(member.callback)
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2])


def _show_version(value: bool) -> None:  # noqa: FBT001 - Typer calls it so
    if value:
        console.out.print(f"extraction {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_show_version, is_eager=True),  # noqa: FBT003
) -> None:
    pass


def run_app() -> None:
    """Run the command; a known error ends in one line on stderr, never in a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with redeliver_dropped_interrupts(KeyboardInterrupt):
            app()
    except ExtractionError as error:
        console.err.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _interrupt(_number: int, _frame: object) -> None:
    """SIGTERM stops as gracefully as Ctrl+C."""
    raise KeyboardInterrupt
