"""`extraction status`, `errors` and `retry`, whose words mean what the glossary says."""

import json
import sqlite3
from datetime import UTC, datetime

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


def extraction(*arguments, code=0):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    return done


def status():
    return json.loads(extraction("status", "--json").stdout)


def states():
    with open_catalog(load_settings()) as catalog:
        return {key: entry.state for key, entry in catalog.ledger.entries(IdRange(1, 6)).items()}


def test_the_status_counts_records_by_what_became_of_them():
    assert status() == {
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
        "lag_rows": 3,
        "active_runs": 0,
        "videos_per_second": None,
        "eta_seconds": None,
    }


def test_rows_at_or_below_the_operators_floor_are_not_pending():
    extraction("checkpoint", "set", "3")
    shown = status()
    assert {name: shown[name] for name in ("floor_id", "eligible", "done", "pending")} == {
        "floor_id": 3,
        "eligible": 6,
        "done": 2,
        "pending": 1,
    }


def test_nothing_is_left_to_wait_for_when_the_floor_is_above_every_row():
    extraction("checkpoint", "set", "6")
    shown = status()
    assert (shown["pending"], shown["eta_seconds"]) == (0, 0)


def test_without_json_the_same_stands_in_a_table():
    printed = extraction("status").stdout
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in printed.splitlines()]
    assert ["pending", "2"] in lines
    assert ["eta", "-"] in lines


def test_errors_are_listed_newest_first_and_by_type():
    document = json.loads(extraction("errors", "--json").stdout)
    (parked, failed) = document["errors"]
    assert document["summary"] == [
        {"error_type": "SchemeError", "state": "parked", "records": 1},
        {"error_type": "VideoDecodeError", "state": "failed", "records": 1},
    ]
    assert [parked.pop("occurred_at")[-6:], failed.pop("occurred_at")[-6:]] == ["+00:00"] * 2
    waits_until = failed.pop("not_before")
    assert datetime.fromisoformat(waits_until) > datetime.now(UTC)
    assert parked == {
        "record_id": 6,
        "stage": "fetch",
        "error_type": "SchemeError",
        "error_message": "odd",
        "error_details": "",
        "run_id": "r",
        "state": "parked",
        "attempts": 1,
        "not_before": None,
        "address": "x.mp4",
    }
    assert (failed["record_id"], failed["state"]) == (5, "failed")
    assert "5 failed, decode, VideoDecodeError, " in extraction("errors", "--type", "VideoDecodeError").stdout
    printed = extraction("errors").stdout
    assert f"1 try, next try {waits_until[:10]}" in printed
    assert "\n  x.mp4\n  broken\n" in printed
    assert "2 shown: SchemeError 1 parked, VideoDecodeError 1 failed" in printed
    assert extraction("errors", "--type", "VideoDecode").stdout == (
        "No error is of type 'VideoDecode' (VideoDecodeError, perhaps?); there is SchemeError, VideoDecodeError.\n"
    )


def test_retry_brings_back_what_is_named_and_says_what_it_left():
    done = extraction("retry", "5", "1", code=1)
    assert "1 records are pending now." in done.stdout
    assert "Not failed or parked, left as they are: 1" in done.stderr
    assert states() == {1: "done", 2: "done", 5: "todo", 6: "parked"}


def test_retry_takes_all_or_those_of_one_type():
    missed = extraction("retry", "--error", "Scheme")
    assert "0 records are pending now." in missed.stdout
    assert "No error is of type 'Scheme' (SchemeError, perhaps?); there is SchemeError, Vid" in missed.stderr
    assert "1 records are pending now." in extraction("retry", "--error", "SchemeError").stdout
    assert states()[6] == "todo"
    assert "1 records are pending now." in extraction("retry", "--all").stdout
    assert states() == {1: "done", 2: "done", 5: "todo", 6: "todo"}


@pytest.mark.parametrize("arguments", [(), ("5", "--all"), ("--all", "--error", "SchemeError")])
def test_retry_needs_exactly_one_choice(arguments):
    extraction("retry", *arguments, code=2)
    assert states()[5] == "failed"


def test_no_end_is_foretold_while_rows_wait_and_nothing_lags_once_all_are_done_or_parked():
    with open_catalog(load_settings()) as catalog:
        today = Fingerprints(frames="f1", embedding="e1")
        plan = catalog.plan(IdRange(1, 6), today)
        catalog.mark_extracted(plan, {3: 3, 4: 3}, "f1")
        catalog.mark_done(plan, {3: 3, 4: 3}, today)
    shown = status()
    assert {name: shown[name] for name in ("done", "failed", "pending", "lag_rows", "eta_seconds")} == {
        "done": 4,
        "failed": 1,
        "pending": 0,
        "lag_rows": 1,
        "eta_seconds": None,
    }
    with open_catalog(load_settings()) as catalog:
        catalog.ledger.retry(record_ids=[5], error_type=None)
        plan = catalog.plan(IdRange(1, 6), today)
        catalog.mark_extracted(plan, {5: 3}, "f1")
        catalog.mark_done(plan, {5: 3}, today)
    shown = status()
    assert (shown["lag_rows"], shown["done"], shown["eta_seconds"]) == (0, 5, 0)


def test_negative_ids_are_taken_as_they_are():
    for command in (("retry", "-5"), ("launch", "-5--1"), ("reconcile", "-5--1"), ("backfill", "-5--1", "--dry-run")):
        done = CliRunner().invoke(app, command)
        assert "No such option" not in done.output
