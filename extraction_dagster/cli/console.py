"""What commands share: how they print, and the options that several of them take.

Tables and bars on a terminal, plain lines elsewhere; with --json one document alone on stdout.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from extraction_dagster import step_progress

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]

_MIN_ID = -(2**63)
_NEGATIVE = re.compile(r"-\d.*")
_WIDE = 200  # columns of a pipe or a file, where a table must not be cut to a terminal's width


class _PlainConsole(Console):
    """A console on which no text of others moves the cursor, changes a colour or hides what stands before it."""

    def render_str(self, text: str, **options: Any) -> Text:  # noqa: ANN401 - rich's own
        """Show control characters and other letters without a shape by their numbers."""
        return super().render_str(plain(text), **options)


def plain(text: str) -> str:
    """A text without control characters, but for the ends of lines and tabs."""
    return text if text.isprintable() else "".join(map(_plain_letter, text))


def plain_line(text: str) -> str:
    """The same in one line: the ends of lines are shown by their names."""
    return plain(text).replace("\n", "\\n")


def _plain_letter(letter: str) -> str:
    return letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1]


class _PlainFormatter(logging.Formatter):
    """Lines of the log: what is said in one of them stays in that line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        record.message = plain_line(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


out = _PlainConsole(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _WIDE)
err = _PlainConsole(stderr=True, soft_wrap=True, highlight=False)


def parse_id(text: str) -> int:
    """An id that was typed: an integer that fits BIGINT."""
    try:
        record_id = int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no id: expected an integer such as 12345") from None
    if not _MIN_ID <= record_id < -_MIN_ID:
        raise typer.BadParameter(f"{text} is no id: it does not fit BIGINT")
    return record_id


def as_json_value(value: object) -> object:
    """A value of a row as a JSON document may hold it."""
    return value if value is None or isinstance(value, bool | int | float | str | list | dict) else str(value)


def print_json(document: Any) -> None:  # noqa: ANN401 - any JSON document
    """Print one JSON document, and nothing else, on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command says on stdout: lines for people, or one document with --json."""

    as_json: bool

    def text(self, line: str) -> None:
        """Print a line, unless JSON was asked for; its brackets are no markup."""
        if not self.as_json:
            out.print(line, markup=False)

    def table(self, table: Table) -> None:
        """Print a table, unless JSON was asked for."""
        if not self.as_json:
            out.print(table, soft_wrap=False)

    def values(self, values: Iterable[tuple[str, object]], *, title: str | None = None) -> None:
        """Print names and values, unless JSON was asked for."""
        if not self.as_json:
            print_values(values, title=title)

    def document(self, document: dict[str, Any]) -> None:
        """Print the document if JSON was asked for; its keys are stable."""
        if self.as_json:
            print_json(document)


def print_values(values: Iterable[tuple[str, object]], *, title: str | None = None) -> None:
    """Print names and values as a table; a dash where there is none."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in values:
        table.add_row(name, "-" if value in (None, []) else str(value))
    out.print(table)


class _Bars:
    """One bar per step, for a terminal."""

    def __init__(self, bars: "Progress") -> None:
        self._bars = bars
        self._tasks = dict[str, "TaskID"]()

    def begin(self, step: str, total: int) -> None:
        if step in self._tasks:
            self._bars.reset(self._tasks[step], total=total)
        else:
            self._tasks[step] = self._bars.add_task(step, total=total)

    def advance(self, step: str, number: int) -> None:
        self._bars.advance(self._tasks[step], number)


def _bars() -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


@contextmanager
def _logged(handler: logging.Handler, level: int) -> Iterator[None]:
    """Show this project's log from a level on."""
    logger = logging.getLogger("extraction_dagster")
    handler.setLevel(level)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _log_lines() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


@contextmanager
def long_work() -> Iterator[None]:
    """Show what long work does: a bar per step and warnings on a terminal, every log line elsewhere."""
    logging.getLogger("extraction_dagster").setLevel(logging.INFO)
    # Ctrl+C while a connection is returned to the pool: the command stops anyway, and the traceback says nothing more.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    if not err.is_terminal:
        with _logged(_log_lines(), logging.INFO):
            yield
        return
    from rich.logging import RichHandler

    lines = RichHandler(console=err, show_path=False, show_time=False)
    lines.setFormatter(_PlainFormatter("%(message)s"))
    with _logged(lines, logging.WARNING), _bars() as bars, step_progress.listening(_Bars(bars)):
        yield


@contextmanager
def warnings() -> Iterator[None]:
    """Show warnings of this project, one line each, on stderr."""
    with _logged(_log_lines(), logging.WARNING):
        yield


@contextmanager
def counting(what: str) -> Iterator[Callable[..., None]]:
    """Show how many of something are finished: a bar on a terminal, nothing elsewhere.

    Yields `show(number, total, more="")`; what is more is shown beside the bar.
    """
    with _bars() as bars:
        task = bars.add_task(what, total=None)

        def show(number: int, total: int, more: str = "") -> None:
            bars.update(task, completed=number, total=total, description=f"{what} {more}".strip())

        yield show


class TakesNegativeIds(TyperCommand):
    """A command whose argument may begin with a minus: no option of it begins with a digit."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # Typer's own click
        """Put `-5--1` behind `--`, so that it is not taken for an option."""
        spans = [] if "--" in args else [argument for argument in args if _NEGATIVE.fullmatch(argument)]
        rest = [argument for argument in args if argument not in spans]
        return super().parse_args(ctx, [*rest, "--", *spans] if spans else rest)
