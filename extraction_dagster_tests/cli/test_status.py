"""`extraction status`: how far things are, in numbers that mean what the glossary says."""

import json
import sqlite3

import pytest
from typer.testing import CliRunner

from extraction_dagster.cli.main import app
from extraction_dagster.records import Failure, IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import Fingerprints, open_catalog


@pytest.fixture(autouse=True)
def _table(tmp_path):
    """Six rows: 1 and 2 are done, 5 waits for its next try, 6 is parked."""
    (tmp_path / ".extraction").mkdir()
    with sqlite3.connect(tmp_path / ".extraction" / "source.db") as connection:
        marks = "is_extracted BOOLEAN, is_embedded BOOLEAN"
        connection.execute(f"CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path TEXT, {marks})")
        connection.executemany("INSERT INTO insta_content (id, path) VALUES (?, 'x.mp4')", [(n,) for n in range(1, 7)])
    connection.close()
    today = Fingerprints(frames="f1", embedding="e1")
    with open_catalog(load_settings()) as catalog:
        plan = catalog.plan(IdRange(1, 6), today)
        catalog.mark_extracted(plan, {1: 3, 2: 3}, "f1")
        catalog.mark_done(plan, {1: 3, 2: 3}, today)
        failed = [
            Failure(5, "", "decode", "VideoDecodeError", "broken"),
            Failure(6, "", "fetch", "SchemeError", "odd", permanent=True),
        ]
        catalog.record_failures(plan, failed, run_id="r")


def extraction(*arguments):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_status_counts_records_by_what_became_of_them():
    assert json.loads(extraction("status", "--json")) == {
        "source_table": "insta_content",
        "first_id": 1,
        "last_id": 6,
        "eligible": 6,
        "done": 2,
        "failed": 1,
        "parked": 1,
        "pending": 2,
        "last_processed_id": None,
        "frontier_id": None,
        "floor_id": None,
        "lag_rows": 6,
        "active_runs": 0,
        "videos_per_second": None,
        "eta_seconds": None,
    }


def test_rows_at_or_below_the_operators_floor_are_not_pending():
    extraction("checkpoint", "set", "3")
    status = json.loads(extraction("status", "--json"))
    assert {name: status[name] for name in ("floor_id", "eligible", "done", "pending")} == {
        "floor_id": 3,
        "eligible": 6,
        "done": 2,
        "pending": 1,
    }


def test_nothing_is_left_to_wait_for_when_the_floor_is_above_every_row():
    extraction("checkpoint", "set", "6")
    status = json.loads(extraction("status", "--json"))
    assert (status["pending"], status["eta_seconds"]) == (0, 0)


def test_without_json_the_same_stands_in_a_table():
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in extraction("status").splitlines()]
    assert ["pending", "2"] in lines
    assert ["eta", "-"] in lines
