"""The `extraction` command.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import importlib
import signal
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from extraction_dagster import __version__
from extraction_dagster.cli import console
from extraction_dagster.errors import ExtractionError
from extraction_dagster.interrupts import ignore_more_interrupts, redeliver_dropped_interrupts

# Where each command is, as `module:name` in this folder: a function, or the Typer app of a group. It is loaded once it
# is called; what `extraction --help` says of it, the first paragraph of its own help, stands here, and a test holds the
# two equal.
COMMANDS = {
    "init": ("operations:init", "Prepare everything that a run needs; safe to repeat."),
    "demo": (
        "demo:command",
        "Build a table of videos, process it through Dagster over several ranges of ids, and search it by image.",
    ),
    "run": (
        "runs:run",
        "Process every row that is due, range by range, until none is left; Ctrl+C stops, the next call resumes.",
    ),
    "status": (
        "records:status",
        "Show the watermark, how many records are done, pending, failed and parked, the rate, and when it will be done.",  # noqa: E501
    ),
    "launch": ("runs:launch", "Process one range of ids now: video_frames, frame_embeddings, qdrant_points."),
    "backfill": (
        "runs:backfill",
        "Process a span of ids, range by range: a backfill that Dagster's daemon works off and the UI shows.",
    ),
    "errors": (
        "records:errors",
        "List the records that failed and wait for another try, or are parked: tries, next try, address, reason.",
    ),
    "show": (
        "show:command",
        "Show all of one record: its row, state, tries, frames, points in the collection, errors and runs.",
    ),
    "preview": ("preview:preview", "Decode one record or file and show what a run would store of it."),
    "retry": (
        "records:retry",
        "Make failed and parked records pending at once: the next tick, run or launch takes them.",
    ),
    "reconcile": (
        "collection:reconcile",
        "Compare the collection with the table, record by record, by exact counts.",
    ),
    "search": (
        "search:command",
        "Search the collection for what looks like a picture or a video; 1 is the same, and more is more alike.",
    ),
    "metrics": (
        "operations:metrics",
        "Print the metrics as OpenMetrics text; or write them to a file, or serve them to Prometheus.",
    ),
    "notify": ("operations:notify", "Send a test notice, as EXTRACTION_NOTIFY says: what a failed run would send."),
    "doctor": (
        "operations:doctor",
        "Show the settings that were changed, then check rights, source table, state, Dagster, the model and the store.",  # noqa: E501
    ),
    "checkpoint": ("checkpoint:app", "Look at the checkpoint, or say where to start."),
    "collection": (
        "collection:app",
        "The collections under EXTRACTION_COLLECTION_NAME: one in use, others beside it.",
    ),
    "frames": ("frames:app", "Take the stored frames elsewhere; merge small shards, remove needless ones."),
    "points": ("collection:points", "Take the collection's points elsewhere, and back."),
}
_TAKE_IDS = ("launch", "retry", "reconcile", "backfill", "show", "preview")


def load_command(name: str) -> Any:  # noqa: ANN401 - Typer's own click
    """A command, or a group, as Typer makes it of its module."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    found = getattr(importlib.import_module(f"extraction_dagster.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        group = typer.main.get_group(found)
        group.name = name
        return group
    alone = typer.Typer(add_completion=False)
    alone.command(name, cls=console.TakesNegativeIds if name in _TAKE_IDS else None)(found)
    return typer.main.get_command(alone)


class _Commands(TyperGroup):
    """The commands by their names and helps, each loaded once it is called.

    Says how to resume when Ctrl+C ends a command; Typer would end it without a word.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - Typer's own
        super().__init__(**options)
        for name, (_, said) in COMMANDS.items():
            self.add_command(TyperCommand(name, help=said))

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]  # noqa: ANN401 - likewise
        """Load the command that is called."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name and command else command, rest

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # noqa: ANN401 - likewise
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ignore_more_interrupts()
            console.err.print("Interrupted. What was finished is kept: run the same command again to go on.")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="extraction",
    cls=_Commands,
    help="Keep a Qdrant collection of video frames in step with a growing table of videos.\n\n"
    "For example: extraction init, then extraction run",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


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
