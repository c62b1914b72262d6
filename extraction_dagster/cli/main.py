"""The `extraction` command.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import signal
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from extraction_dagster import __version__
from extraction_dagster.cli import (
    checkpoint,
    collection,
    console,
    demo,
    frames,
    operations,
    preview,
    records,
    runs,
    search,
    show,
)
from extraction_dagster.errors import ExtractionError
from extraction_dagster.interrupts import ignore_more_interrupts, redeliver_dropped_interrupts


class _Interruptible(TyperGroup):
    """Say how to resume when Ctrl+C ends a command; Typer would end it without a word."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # noqa: ANN401 - Typer's own click
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ignore_more_interrupts()
            console.err.print("Interrupted. What was finished is kept: run the same command again to go on.")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="extraction",
    cls=_Interruptible,
    help="Keep a Qdrant collection of video frames in step with a growing table of videos.\n\n"
    "For example: extraction init, then extraction run",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "init": operations.init,
    "demo": demo.command,
    "run": runs.run,
    "status": records.status,
    "launch": runs.launch,
    "backfill": runs.backfill,
    "errors": records.errors,
    "show": show.command,
    "preview": preview.preview,
    "retry": records.retry,
    "reconcile": collection.reconcile,
    "search": search.command,
    "metrics": operations.metrics,
    "notify": operations.notify,
    "doctor": operations.doctor,
}
_TAKE_IDS = ("launch", "retry", "reconcile", "backfill", "show", "preview")
for name, command in COMMANDS.items():
    app.command(name, cls=console.TakesNegativeIds if name in _TAKE_IDS else None)(command)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(collection.app, name="collection")
app.add_typer(frames.app, name="frames")
app.add_typer(collection.points, name="points")


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
    except KeyboardInterrupt:  # a second one, while the first was told of
        sys.exit(130)
    except ExtractionError as error:
        console.err.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:  # a folder that can't be made, a disk that is full
        console.err.print(f"error: {_told(error)}", style="red", markup=False)
        sys.exit(1)


def _told(error: OSError) -> str:
    """A fault of the file system in one line: which file, and what is wrong with it."""
    why = error.strerror or type(error).__name__
    if not error.filename:
        return f"{why}. What was finished is kept: mend the cause, then run the same command again."
    return (
        f"{error.filename}: {why}. What was finished is kept. Make room there or permit writing, or set "
        "EXTRACTION_HOME to another folder, then run the same command again."
    )


def _interrupt(_number: int, _frame: object) -> None:
    """SIGTERM stops as gracefully as Ctrl+C."""
    raise KeyboardInterrupt
