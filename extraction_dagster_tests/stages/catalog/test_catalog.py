"""What is to do in a range, and how rows are marked."""

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import SecretStr

from extraction_dagster.errors.catalog import StateError
from extraction_dagster.records import Failure, IdRange, VideoRow
from extraction_dagster.stages.catalog.catalog import Fingerprints, status_of
from extraction_dagster.stages.catalog.ledger import LedgerEntry
from extraction_dagster.stages.catalog.pending import make_pending_index
from extraction_dagster.stages.catalog.source_table import SourceRow

TODAY = Fingerprints(frames="f1", embedding="e1")
ALL = IdRange(1, 100)
NOW = datetime(2025, 6, 1, tzinfo=UTC)


def statuses(catalog, fingerprints=TODAY):
    return {record_id: planned.status for record_id, planned in catalog.plan(ALL, fingerprints).items()}


def finish(catalog, *ids):
    plan = catalog.plan(ALL, TODAY)
    catalog.mark_extracted(plan, dict.fromkeys(ids, 3), "f1")
    catalog.mark_done(plan, dict.fromkeys(ids, 3), TODAY)


def fail(catalog, failures):
    return catalog.record_failures(catalog.plan(ALL, TODAY), failures, run_id="r")


def failure(record_id, *, permanent=False, version=""):
    return Failure(record_id, version, "decode", "VideoDecodeError", "broken", permanent=permanent)


def row(*, version="", extracted=None, embedded=None):
    return SourceRow(VideoRow(1, "1.mp4", content_version=version), extracted=extracted, embedded=embedded)


@pytest.mark.parametrize(
    ("source", "entry", "status"),
    [
        (row(), None, "todo"),
        (row(extracted=True, embedded=True), None, "done"),
        (row(extracted=True, embedded=False), None, "todo"),
        (row(), LedgerEntry(1, "extracted"), "todo"),
        (row(), LedgerEntry(1, "embedded"), "todo"),
        (row(), LedgerEntry(1, "parked"), "parked"),
        (row(version="2"), LedgerEntry(1, "parked", source_version="1"), "todo"),
        (row(), LedgerEntry(1, "failed", not_before=NOW + timedelta(seconds=1)), "waiting"),
        (row(), LedgerEntry(1, "failed", not_before=NOW - timedelta(seconds=1)), "todo"),
        (row(), LedgerEntry(1, "done", frames_fingerprint="f1", embedding_fingerprint="e1"), "done"),
        (row(), LedgerEntry(1, "done", frames_fingerprint="f0", embedding_fingerprint="e1"), "todo"),
        (row(), LedgerEntry(1, "done", frames_fingerprint="f1", embedding_fingerprint="e0"), "todo"),
        (
            row(extracted=True, embedded=False),
            LedgerEntry(1, "done", frames_fingerprint="f1", embedding_fingerprint="e1"),
            "again",
        ),
        (row(version="2"), LedgerEntry(1, "done", source_version="1"), "todo"),
        (row(version="1"), LedgerEntry(1, "parked", source_version="1", content_version="1~2", revision=2), "parked"),
    ],
)
def test_the_status_of_a_row_follows_from_its_marks_and_its_entry(source, entry, status):
    assert status_of(source.video.content_version, source.marked_done, entry, TODAY, now=NOW) == status


def test_a_changed_setting_alone_makes_nothing_pending():
    entry = LedgerEntry(1, "done", frames_fingerprint="f0", embedding_fingerprint="e0")
    assert status_of("", None, entry, None, now=NOW) == "done"


def test_marking_writes_the_ledger_and_the_marks(database):
    database.create(ids=(1, 2, 3))
    catalog = database.catalog()
    plan = catalog.plan(ALL, TODAY)
    catalog.mark_extracted(plan, {1: 5, 2: 4}, "f1")
    catalog.mark_embedded([1, 2], "e1")
    catalog.mark_done(plan, {1: 5}, TODAY)
    entries = catalog.ledger.entries(ALL)
    assert entries[1] == LedgerEntry(
        1, "done", frames_fingerprint="f1", embedding_fingerprint="e1", num_frames=5, num_points=5
    )
    assert (entries[2].state, entries[2].num_frames, entries[2].num_points) == ("embedded", 4, None)
    marks = database.rows("SELECT id, is_extracted, is_embedded FROM insta_content ORDER BY id")
    assert [tuple(map(int, row)) for row in marks] == [(1, 1, 1), (2, 1, 0), (3, 0, 0)]
    assert statuses(catalog) == {1: "done", 2: "todo", 3: "todo"}
    catalog.close()


def test_a_cleared_mark_gives_the_row_a_new_revision_once(database):
    database.create(ids=(1,))
    catalog = database.catalog()
    finish(catalog, 1)
    database.execute("UPDATE insta_content SET is_embedded = false")
    assert statuses(catalog) == {1: "again"}
    first = catalog.begin(ALL, TODAY)[1]
    again = catalog.begin(ALL, TODAY)[1]  # a second try of the same run must not start from nothing
    assert (first.status, first.video.content_version) == ("todo", "~1")
    assert again.video.content_version == "~1"
    finish(catalog, 1)
    assert catalog.plan(ALL, TODAY)[1].status == "done"
    catalog.close()


def test_a_failing_record_is_tried_three_times_then_parked(database):
    database.create(ids=(1, 2))
    catalog = database.catalog(max_attempts=3, retry_delay_seconds=0)
    states = [fail(catalog, [failure(1)])[1] for _ in range(3)]
    assert states == ["failed", "failed", "parked"]
    assert statuses(catalog) == {1: "parked", 2: "todo"}
    assert [error.error_message for error in catalog.ledger.errors(limit=9, current_only=False)] == ["broken"] * 3
    assert len(catalog.ledger.errors(limit=9)) == 1
    catalog.close()


def test_each_further_try_waits_twice_as_long(database):
    database.create(ids=(1,))
    catalog = database.catalog(max_attempts=9, retry_delay_seconds=100)
    waits = []
    for _ in range(3):
        before = datetime.now(UTC)
        fail(catalog, [failure(1)])
        waits.append((catalog.ledger.entries(ALL)[1].not_before - before).total_seconds())
    assert [100 <= waits[0] <= 130, 200 <= waits[1] <= 255, 400 <= waits[2] <= 505] == [True, True, True]
    assert statuses(catalog) == {1: "waiting"}
    catalog.close()


def test_words_that_no_database_takes_are_written_down_all_the_same(database):
    database.create(ids=(1,))
    catalog = database.catalog()
    said = Failure(1, "", "decode", "VideoOpenError", "odd \0 name \udcff", details="bytes\0\0 and \ud800")
    fail(catalog, [said])
    (error,) = catalog.ledger.errors(limit=9)
    assert (error.error_message, error.error_details) == ("odd \\0 name \\udcff", "bytes\\0\\0 and \\ud800")
    assert catalog.ledger.entries(ALL)[1].last_error == "VideoOpenError: odd \\0 name \\udcff"
    catalog.close()


def test_a_permanent_failure_parks_at_once(database):
    database.create(ids=(1,))
    catalog = database.catalog()
    assert fail(catalog, [failure(1, permanent=True)]) == {1: "parked"}
    catalog.close()


def test_a_changed_version_starts_the_count_of_tries_anew(database):
    database.create(ids=(1,))
    catalog = database.catalog(max_attempts=2)
    fail(catalog, [failure(1, version="1")])
    assert fail(catalog, [failure(1, version="2")]) == {1: "failed"}
    catalog.close()


def test_a_trigger_that_stamps_our_own_marks_does_not_make_a_row_look_new(database):
    database.create()
    database.insert(1, 2, updated_at=datetime(2025, 1, 1))
    stamp_updates(database)
    catalog = database.catalog(source_version_column="updated_at")
    plan = catalog.plan(ALL, TODAY)
    catalog.mark_extracted(plan, {1: 3}, "f1")
    later = catalog.plan(ALL, TODAY)
    assert later[1].source_version != plan[1].source_version
    assert later[1].video.content_version == plan[1].video.content_version
    catalog.mark_done(later, {1: 3}, TODAY)
    assert statuses(catalog) == {1: "done", 2: "todo"}
    database.execute("UPDATE insta_content SET path = 'new.mp4' WHERE id = 1")
    assert statuses(catalog) == {1: "todo", 2: "todo"}
    catalog.close()


def stamp_updates(database):
    """`updated_at` moves on by a day at each update of a row, as a trigger of the table's owner would have it."""
    if "sqlite" in database.url:
        database.execute(
            "CREATE TRIGGER stamp AFTER UPDATE ON insta_content WHEN old.updated_at = new.updated_at BEGIN "
            "UPDATE insta_content SET updated_at = datetime(updated_at, '+1 day') WHERE id = new.id; END"
        )
        return
    database.execute(
        "CREATE FUNCTION stamp() RETURNS trigger AS $$ BEGIN NEW.updated_at = OLD.updated_at + interval '1 day'; "
        "RETURN NEW; END $$ LANGUAGE plpgsql"
    )
    database.execute("CREATE TRIGGER stamp BEFORE UPDATE ON insta_content FOR EACH ROW EXECUTE FUNCTION stamp()")


def test_success_clears_what_failed_before(database):
    database.create(ids=(1,))
    catalog = database.catalog(retry_delay_seconds=0)
    fail(catalog, [failure(1)])
    finish(catalog, 1)
    entry = catalog.ledger.entries(ALL)[1]
    assert (entry.state, entry.attempts, entry.not_before, entry.last_error) == ("done", 0, None, None)
    assert catalog.ledger.errors(limit=9) == []
    catalog.close()


def test_state_in_another_database_never_touches_a_read_only_source(database, tmp_path):
    database.create(ids=(1,))
    state = f"sqlite:///{tmp_path}/state.db"
    catalog = database.catalog(source_read_only=True, state_url=SecretStr(state))
    finish(catalog, 1)
    assert statuses(catalog) == {1: "done"}
    assert database.rows("SELECT is_extracted, is_embedded FROM insta_content") in ([(0, 0)], [(False, False)])
    names = "SELECT name FROM sqlite_master" if "sqlite" in database.url else "SELECT tablename FROM pg_tables"
    assert not [name for (name,) in database.rows(names) if name.startswith("extraction_")]
    catalog.close()


def test_state_tables_of_another_source_are_refused(database):
    database.create(ids=(1,))
    database.catalog().close()
    database.create(name="other")
    with pytest.raises(StateError, match=r"belong to another source table.*Set EXTRACTION_STATE_URL"):
        database.catalog(source_table="other")


def test_the_summary_counts_records_by_what_became_of_them(database):
    database.create(ids=(1, 2, 3, 4))
    catalog = database.catalog()
    finish(catalog, 1)
    fail(catalog, [failure(2, permanent=True), failure(3)])
    assert catalog.summary(ALL) == "1 done, 1 pending, 1 failed, 1 parked"
    assert catalog.status() == {
        "source_table": "insta_content",
        "first_id": 1,
        "last_id": 4,
        "eligible": 4,
        "done": 1,
        "failed": 1,
        "parked": 1,
        "pending": 1,
    }
    assert catalog.num_pending(ALL) == 1
    catalog.close()


def test_a_failed_record_whose_wait_is_over_is_pending(database):
    database.create(ids=(1, 2))
    catalog = database.catalog(retry_delay_seconds=0)
    fail(catalog, [failure(1)])
    status = catalog.status()
    assert (status["failed"], status["pending"]) == (1, 2)
    assert catalog.summary(ALL) == "0 done, 2 pending, 0 failed, 0 parked"
    assert catalog.num_pending(ALL) == 2
    catalog.close()


def test_a_done_record_whose_mark_was_cleared_is_pending(database):
    database.create(ids=(1, 2))
    catalog = database.catalog()
    finish(catalog, 1, 2)
    database.execute("UPDATE insta_content SET is_embedded = false WHERE id = 2")
    assert catalog.summary(ALL) == "1 done, 1 pending, 0 failed, 0 parked"
    assert catalog.status()["pending"] == 1
    catalog.close()


def test_init_makes_the_partial_index_once(database):
    database.create(ids=(1,))
    catalog = database.catalog()
    first = make_pending_index(catalog.source, catalog.source_engine)
    assert [first.state, make_pending_index(catalog.source, catalog.source_engine).state] == ["made", "there"]
    assert "WHERE (is_extracted IS NOT TRUE) OR (is_embedded IS NOT TRUE)" in first.sql
    catalog.close()


def test_an_index_that_a_cut_off_build_left_is_made_anew(database):
    database.create(ids=(1,))
    catalog = database.catalog()
    assert make_pending_index(catalog.source, catalog.source_engine).state == "made"
    if catalog.source_engine.dialect.name != "postgresql":  # builds there are one transaction
        catalog.close()
        return
    validity = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'extraction_pending_insta_content'::regclass"
    database.execute(
        "UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid IN ('extraction_pending_insta_content'::regclass)"
    )
    assert database.rows(validity) == [(False,)]
    assert make_pending_index(catalog.source, catalog.source_engine).state == "made"
    assert database.rows(validity) == [(True,)]
    assert make_pending_index(catalog.source, catalog.source_engine).state == "there"
    catalog.close()


def test_without_the_right_to_alter_the_table_its_statement_is_told(database):
    database.create(ids=(1,))
    database.execute("CREATE VIEW good AS SELECT * FROM insta_content")
    catalog = database.catalog(source_table="good")  # nobody can index a view
    made = make_pending_index(catalog.source, catalog.source_engine)
    assert made.state == "refused"
    assert made.sql.startswith("CREATE INDEX")
    catalog.close()


def test_a_forced_beginning_gives_every_finished_row_a_new_revision_and_leaves_the_others(sqlite_database):
    sqlite_database.create(ids=(1, 2, 3, 4, 5))
    catalog = sqlite_database.catalog()
    finish(catalog, 1)
    sqlite_database.execute("UPDATE insta_content SET is_extracted = true, is_embedded = true WHERE id = 5")
    fail(catalog, [failure(2), failure(3, permanent=True)])
    assert statuses(catalog) == {1: "done", 2: "waiting", 3: "parked", 4: "todo", 5: "done"}

    plan = catalog.begin(ALL, TODAY, force=True)

    assert {key: (item.status, item.video.content_version) for key, item in plan.items()} == {
        1: ("todo", "~1"),
        2: ("todo", "~1"),
        3: ("todo", "~1"),
        4: ("todo", ""),
        5: ("todo", "~1"),
    }
    assert statuses(catalog, TODAY)[1] == "todo"
    catalog.close()


def test_a_beginning_that_is_not_forced_leaves_finished_rows_alone(sqlite_database):
    sqlite_database.create(ids=(1, 2))
    catalog = sqlite_database.catalog()
    finish(catalog, 1)
    fail(catalog, [failure(2)])
    assert {key: item.status for key, item in catalog.begin(ALL, TODAY).items()} == {1: "done", 2: "waiting"}
    catalog.close()
