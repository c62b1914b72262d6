"""What commands print: tables and bars on a terminal, plain lines elsewhere; JSON alone on stdout with --json."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from extraction_dagster import progress

_WIDE = 200  # columns of a pipe or a file: nobody wants a table cut to a terminal's width there

out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _WIDE)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def print_json(document: Any) -> None:  # noqa: ANN401 - any JSON document
    """Print one JSON document, and nothing else, on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")


class _Bars:
    """One bar per step, for a terminal."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def begin(self, step: str, total: int) -> None:
        if step in self._tasks:
            self._bars.reset(self._tasks[step], total=total)
        else:
            self._tasks[step] = self._bars.add_task(step, total=total)

    def advance(self, step: str, number: int) -> None:
        self._bars.advance(self._tasks[step], number)


@contextmanager
def long_work() -> Iterator[None]:
    """Show what long work does: a bar per step and warnings on a terminal, every log line elsewhere."""
    logger = logging.getLogger("extraction_dagster")
    terminal = err.is_terminal
    handler: logging.Handler
    if terminal:
        handler = RichHandler(console=err, show_path=False, show_time=False)
        handler.setLevel(logging.WARNING)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # Ctrl+C while a connection is given back: it goes on to stop the command, and its traceback helps nobody.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    try:
        if not terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=err, transient=True) as bars, progress.listening(_Bars(bars)):
            yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def warnings() -> Iterator[None]:
    """Show warnings of this project, one line each, on stderr."""
    logger, handler = logging.getLogger("extraction_dagster"), logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def counting(what: str) -> Iterator[Callable[..., None]]:
    """Show how many of something are finished: a bar on a terminal, nothing elsewhere.

    Yields `show(number, total, more="")`; what is more is shown beside the bar.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task(what, total=None)

        def show(number: int, total: int, more: str = "") -> None:
            bars.update(task, completed=number, total=total, description=f"{what} {more}".strip())

        yield show
