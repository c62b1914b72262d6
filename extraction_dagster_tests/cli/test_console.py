"""What others wrote never reaches a terminal as more than letters."""

import io
import logging

import pytest
from rich.table import Table

from extraction_dagster.cli import console
from extraction_dagster.cli.console import _PlainConsole, _PlainFormatter, plain

HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08\u202eb\x00"
SHOWN = r"a\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08\u202eb\x00"


@pytest.fixture
def printed():
    """`printed(thing)`: what a terminal gets."""

    def printed(thing, **options):
        target = _PlainConsole(file=io.StringIO(), force_terminal=True, width=200, color_system=None, highlight=False)
        target.print(thing, **options)
        return target.file.getvalue()

    return printed


def test_a_text_is_shown_letter_for_letter(printed):
    assert printed(f"error: {HOSTILE}", markup=False) == f"error: {SHOWN}\n"
    assert printed("two\nlines and a\ttab", markup=False) == "two\nlines and a     tab\n"


def test_a_cell_and_a_title_are_too(printed):
    table = Table("name", title=HOSTILE)
    table.add_row(HOSTILE)
    shown = printed(table)
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r", "\x08"} & set(shown)
    assert shown.count("title") == 2


def test_the_consoles_of_the_commands_are_of_that_kind():
    assert isinstance(console.out, _PlainConsole)
    assert isinstance(console.err, _PlainConsole)


def test_a_line_of_the_log_stays_one():
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "said %s", (f"{HOSTILE}\nWARNING forged",), None)
    line = _PlainFormatter("%(levelname)s %(message)s").format(record)
    assert line == f"WARNING said {SHOWN}\\nWARNING forged"


def test_what_can_be_shown_stays_as_it_is():
    assert plain("videos/ä 漢字 — 1.mp4") == "videos/ä 漢字 — 1.mp4"
