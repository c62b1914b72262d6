"""`extraction checkpoint` and `extraction retry`, as a user types them; no daemon ticks."""

import json
import sqlite3
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from extraction_dagster.cli.main import app
from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.launching import open_instance
from extraction_dagster.defs.instance.runs import InstanceRuns
from extraction_dagster.errors.runs import LegacyCheckpointError
from extraction_dagster.records import Failure, IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import Fingerprints, open_catalog
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.memory import Memory
from extraction_dagster.ticks.tick import tick

TODAY = Fingerprints(frames="f1", embedding="e1")


@pytest.fixture(autouse=True)
def _table(tmp_path):
    """A table of six rows in the working directory's own data folder; the last two have failed."""
    (tmp_path / ".extraction").mkdir()
    with sqlite3.connect(tmp_path / ".extraction" / "source.db") as connection:
        marks = "is_extracted BOOLEAN, is_embedded BOOLEAN"
        connection.execute(f"CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path TEXT, {marks})")
        connection.executemany("INSERT INTO insta_content (id, path) VALUES (?, 'x.mp4')", [(n,) for n in range(1, 7)])
    connection.close()
    with open_catalog(load_settings()) as catalog:
        plan = catalog.plan(IdRange(1, 6), TODAY)
        catalog.mark_done(plan, {1: 3, 2: 3}, TODAY)
        failed = [
            Failure(5, "", "decode", "VideoDecodeError", "broken"),
            Failure(6, "", "fetch", "SchemeError", "odd", permanent=True),
        ]
        catalog.record_failures(plan, failed, run_id="r")


def states():
    with open_catalog(load_settings()) as catalog:
        return {key: entry.state for key, entry in catalog.ledger.entries(IdRange(1, 6)).items()}


def extraction(*arguments, code=0):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    return done


def shown():
    return json.loads(extraction("checkpoint", "show", "--json").stdout)


def test_before_the_first_tick_there_is_nothing_to_show():
    assert shown() == {
        "last_processed_id": None,
        "frontier_id": None,
        "floor_id": None,
        "reset_epoch": None,
        "updated_at": None,
        "cursor_error": None,
        "mirror": None,
        "mirror_state": None,
        "mirror_last_processed_id": None,
        "requests_waiting": [],
    }
    assert "last processed id" in extraction("checkpoint", "show").stdout


def test_set_and_reset_hold_at_once_where_no_daemon_ticks():
    assert "Processing starts after ID 4." in extraction("checkpoint", "set", "4").stdout
    document = shown()
    assert (document["last_processed_id"], document["frontier_id"], document["floor_id"]) == (4, 4, 4)
    assert (document["reset_epoch"], document["requests_waiting"]) == (1, [])
    assert states()[1] == "done"
    assert "Processing starts from the beginning." in extraction("checkpoint", "reset").stdout
    document = shown()
    assert (document["last_processed_id"], document["floor_id"], document["reset_epoch"]) == (None, None, 2)


def test_what_was_set_outlives_a_tick_that_was_under_way_and_stores_the_cursor_of_before():
    extraction("checkpoint", "set", "4")
    settings = load_settings()
    with open_instance(settings) as instance, open_catalog(settings) as catalog:
        store = CursorStore(instance)
        before = CursorState.first(catalog.source.identity, now=datetime.now(UTC))
        store.write(before.to_json())
        assert shown()["requests_waiting"] == ["set 4"]
        ticked = tick(catalog, InstanceRuns(instance), store.read(), Memory(), now=datetime.now(UTC))
        store.write(ticked.cursor.to_json())
    document = shown()
    assert (document["floor_id"], document["reset_epoch"], document["requests_waiting"]) == (4, 1, [])


def test_set_takes_a_negative_id_and_refuses_what_is_none():
    extraction("checkpoint", "set", "--", "-7")
    assert shown()["floor_id"] == -7
    extraction("checkpoint", "set", "-3")
    assert shown()["floor_id"] == -3
    extraction("checkpoint", "set", "abc", code=2)
    extraction("checkpoint", "set", str(2**63), code=2)
    assert shown()["floor_id"] == -3


def test_reprocess_makes_what_is_done_above_the_id_pending():
    extraction("checkpoint", "set", "1", "--reprocess")
    assert states() == {1: "done", 2: "todo", 5: "todo", 6: "todo"}


def test_a_mirror_can_be_cleared_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("EXTRACTION_CHECKPOINT_MIRROR", "json")
    (tmp_path / ".extraction" / ".checkpoint").write_text("{")
    assert shown()["mirror_state"] == "corrupt"
    assert "Cleared" in extraction("checkpoint", "reset", "--storage", "json").stdout
    assert (shown()["mirror_state"], shown()["mirror_last_processed_id"]) == ("ok", None)


def test_the_earlier_scripts_checkpoint_is_imported_from_a_file_or_the_table(tmp_path):
    (tmp_path / "old").write_text('{"last_processed_id": 3}')
    assert "Read 3 from file old, key last_processed_id" in extraction("checkpoint", "import", "old").stdout
    assert shown()["floor_id"] == 3
    with sqlite3.connect(tmp_path / ".extraction" / "source.db") as connection:
        connection.execute("CREATE TABLE extraction_checkpoint (id BIGINT PRIMARY KEY, updated_at TIMESTAMP)")
        connection.execute("INSERT INTO extraction_checkpoint VALUES (5, ?)", [str(datetime.now(UTC))])
    connection.close()
    extraction("checkpoint", "import")
    assert shown()["floor_id"] == 5


def test_a_checkpoint_that_is_not_there_changes_nothing():
    done = CliRunner().invoke(app, ["checkpoint", "import", "none"])
    assert isinstance(done.exception, LegacyCheckpointError)
    assert shown()["floor_id"] is None


def test_a_mirror_that_is_not_ours_is_told_of_and_the_rest_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("EXTRACTION_CHECKPOINT_MIRROR", "table")
    with sqlite3.connect(tmp_path / ".extraction" / "source.db") as connection:
        connection.execute("CREATE TABLE extraction_checkpoint (id INTEGER PRIMARY KEY, last_processed_id BIGINT)")
    connection.close()
    document = shown()
    assert (document["mirror_state"], document["mirror_last_processed_id"]) == ("unusable", None)
    assert "it is not ours: it has the columns id, last_processed_id" in document["mirror_error"]
