"""What is to do in a range, and how rows are marked."""

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import SecretStr

from extraction_dagster.errors.catalog import StateError
from extraction_dagster.records import Failure, IdRange, VideoRow
from extraction_dagster.stages.catalog.catalog import Fingerprints, Moved, status_of
from extraction_dagster.stages.catalog.indexing import make_pending_index
from extraction_dagster.stages.catalog.ledger import LedgerEntry
from extraction_dagster.stages.catalog.pending import scan
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


def test_a_row_that_is_done_from_vectors_alone_has_as_many_frames_as_points(database):
    database.create(ids=(1, 2))
    catalog = database.catalog()
    plan = catalog.begin(ALL, TODAY, revises=False)
    catalog.mark_extracted(plan, {2: 5}, "f1")
    assert catalog.mark_done(plan, {1: 3, 2: 4}, TODAY) == {1, 2}
    numbers = {key: (entry.num_frames, entry.num_points) for key, entry in catalog.ledger.entries(ALL).items()}
    assert numbers == {1: (3, 3), 2: (5, 4)}
    assert catalog.ledger.totals() == (8, 7)
    catalog.close()


def test_marking_writes_the_ledger_and_the_marks(database):
    database.create(ids=(1, 2, 3))
    catalog = database.catalog()
    plan = catalog.plan(ALL, TODAY)
    catalog.mark_extracted(plan, {1: 5, 2: 4}, "f1")
    catalog.mark_embedded([1, 2], "e1")
    catalog.mark_done(plan, {1: 5}, TODAY, generations={1: "g1"})
    entries = catalog.ledger.entries(ALL)
    assert entries[1] == LedgerEntry(
        1,
        "done",
        frames_fingerprint="f1",
        embedding_fingerprint="e1",
        num_frames=5,
        num_points=5,
        address=hashlib.sha256(b"videos/1.mp4").hexdigest()[:16],  # as configured: the home may move
        generation="g1",
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


@pytest.mark.parametrize("places", ["one database", "two databases"])
def test_a_trigger_that_stamps_our_clearing_of_a_mark_does_not_make_a_row_look_new(database, tmp_path, places):
    database.create()
    database.insert(1, 2, 3, updated_at=datetime(2025, 1, 1))
    stamp_updates(database)
    state = {} if places == "one database" else {"state_url": SecretStr(f"sqlite:///{tmp_path}/state.db")}
    catalog = database.catalog(source_version_column="updated_at", **state)
    catalog.mark_extracted(catalog.begin(ALL, TODAY), {1: 3, 2: 3}, "f1")
    catalog.mark_done(catalog.plan(ALL, TODAY), {1: 3, 2: 3}, TODAY)
    decoded = {key: planned.content_version for key, planned in catalog.plan(ALL, TODAY).items()}
    database.execute("UPDATE insta_content SET path = 'new.mp4' WHERE id = 2")  # a new version all the same

    catalog.make_pending([3, 2, 1])

    plan = catalog.plan(ALL, TODAY)
    assert {key: planned.status for key, planned in plan.items()} == dict.fromkeys((1, 2, 3), "todo")
    assert (plan[1].content_version, plan[1].entry.source_version) == (decoded[1], plan[1].source_version)
    assert plan[2].content_version == plan[2].source_version != decoded[2]
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
    catalog = database.catalog()
    catalog.begin(ALL, TODAY)
    catalog.close()
    database.create(name="other")
    with pytest.raises(StateError, match=r"belong to table 'insta_content' in .*, not to table 'other' .*EXTRACTION_"):
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


def test_a_view_gets_no_index_of_its_own(database):
    database.create(ids=(1,))
    database.execute("CREATE VIEW good AS SELECT * FROM insta_content")
    catalog = database.catalog(source_table="good")
    assert make_pending_index(catalog.source, catalog.source_engine).state == "not needed"
    catalog.close()


def test_a_forced_beginning_gives_every_row_a_new_revision_whatever_became_of_it(sqlite_database):
    sqlite_database.create(ids=(1, 2, 3, 4, 5, 6, 7))
    catalog = sqlite_database.catalog()
    finish(catalog, 1, 7)
    catalog.mark_extracted(catalog.plan(ALL, TODAY), {6: 3}, "f0")
    sqlite_database.execute("UPDATE extraction_ledger SET embedding_fingerprint = 'e0' WHERE record_id = 7")
    sqlite_database.execute("UPDATE insta_content SET is_extracted = true, is_embedded = true WHERE id = 5")
    fail(catalog, [failure(2), failure(3, permanent=True)])
    before = {1: "done", 2: "waiting", 3: "parked", 4: "todo", 5: "done", 6: "todo", 7: "todo"}
    assert statuses(catalog) == before

    plan = catalog.begin(ALL, TODAY, force=True)

    assert {key: (item.status, item.video.content_version) for key, item in plan.items()} == dict.fromkeys(
        before, ("todo", "~1")
    )
    assert statuses(catalog) == dict.fromkeys(before, "todo")
    assert {planned.entry.state for planned in catalog.plan(ALL, TODAY).values()} == {"todo"}
    catalog.close()


def test_a_beginning_that_is_not_forced_leaves_finished_rows_alone(sqlite_database):
    sqlite_database.create(ids=(1, 2))
    catalog = sqlite_database.catalog()
    finish(catalog, 1)
    fail(catalog, [failure(2)])
    assert {key: item.status for key, item in catalog.begin(ALL, TODAY).items()} == {1: "done", 2: "waiting"}
    catalog.close()


# The address of a row's file is an input, as its version is.


def move(database, record_id, path="elsewhere.mp4"):
    database.execute("UPDATE insta_content SET path = :path WHERE id = :id", path=path, id=record_id)


@pytest.mark.parametrize(("changes", "status"), [("process", "todo"), ("report", "done")])
def test_a_done_row_whose_address_was_corrected_is_due_unless_it_is_only_to_be_told(database, changes, status):
    database.create(ids=(1, 2))
    catalog = database.catalog(address_changes=changes)
    finish(catalog, 1, 2)
    move(database, 2)
    assert statuses(catalog) == {1: "done", 2: status}
    assert catalog.num_pending(ALL) == (status == "todo")
    assert {key: item.status for key, item in catalog.begin(ALL, TODAY).items()} == {1: "done", 2: status}
    finish(catalog, 2)
    assert statuses(catalog) == {1: "done", 2: "done"}
    catalog.close()


@pytest.mark.parametrize("changes", ["process", "report"])
@pytest.mark.parametrize("permanent", [False, True])
def test_a_row_that_failed_is_due_at_once_when_its_address_is_corrected(database, changes, permanent):
    database.create(ids=(1, 2, 3))
    database.execute("UPDATE insta_content SET path = NULL WHERE id = 3")
    catalog = database.catalog(address_changes=changes, max_attempts=2, retry_delay_seconds=3600)
    catalog.begin(ALL, TODAY)
    fail(catalog, [failure(key, permanent=permanent) for key in (1, 2, 3)])
    held = "parked" if permanent else "waiting"
    assert statuses(catalog) == {1: held, 2: held, 3: held}
    move(database, 1)
    move(database, 3)
    assert statuses(catalog) == {1: "todo", 2: held, 3: "todo"}
    assert look(catalog) == [1, 3]
    assert fail(catalog, [failure(1)]) == {1: "failed"}  # its tries count from the beginning
    assert look(catalog) == [3]
    catalog.close()


def look(catalog):
    return scan(catalog, after_id=None, up_to_id=None, budget=100).pending_ids


def test_another_column_template_or_first_root_is_another_address(database, tmp_path):
    roots = {"allowed_roots": (str(tmp_path / "videos"),)}
    database.create(ids=(1,))
    catalog = database.catalog(**roots)
    finish(catalog, 1)
    catalog.close()
    for change in (
        {"source_uri_column": "code", **roots},
        {"source_uri_template": "{platform}/{code}.mp4", **roots},
        {"allowed_roots": (str(tmp_path / "elsewhere"), str(tmp_path / "videos"))},
    ):
        changed = database.catalog(**change)
        assert statuses(changed) == {1: "todo"}
        changed.close()
    same = database.catalog(
        source_uri_template="{code}", allowed_roots=(str(tmp_path / "videos"), str(tmp_path / "elsewhere"))
    )
    database.execute("UPDATE insta_content SET code = :uri", uri=f"file://{tmp_path}/videos/1.mp4")
    assert statuses(same) == {1: "done"}
    same.close()


def test_a_home_that_moves_with_its_videos_makes_no_file_another(database, tmp_path):
    database.create(ids=(1,))
    catalog = database.catalog()
    finish(catalog, 1)
    catalog.close()
    moved = database.catalog(home=tmp_path / "another disk")
    assert statuses(moved) == {1: "done"}
    moved.close()


def test_entries_of_an_earlier_release_take_the_present_addresses_once(database, caplog):
    database.create(ids=(1, 2, 3))
    catalog = database.catalog()
    catalog.begin(ALL, TODAY)
    finish(catalog, 1, 2)
    fail(catalog, [failure(3, permanent=True)])
    addresses = {key: entry.address for key, entry in catalog.ledger.entries(ALL).items()}
    database.execute("UPDATE extraction_ledger SET address = NULL")
    move(database, 2)
    assert statuses(catalog) == {1: "done", 2: "done", 3: "parked"}  # nobody knows what the old ones were
    catalog.begin(ALL, TODAY)
    adopted = {key: entry.address for key, entry in catalog.ledger.entries(ALL).items()}
    assert (adopted[1], adopted[3]) == (addresses[1], addresses[3])
    assert adopted[2] not in {None, addresses[2]}
    move(database, 1)
    catalog.adopt_addresses(catalog.source.rows(ALL))
    assert {key: entry.address for key, entry in catalog.ledger.entries(ALL).items()} == adopted
    assert statuses(catalog) == {1: "todo", 2: "done", 3: "parked"}
    assert caplog.records == []
    catalog.close()


def test_done_rows_that_have_moved_are_found_in_windows(database):
    database.create(ids=range(1, 11))
    catalog = database.catalog(address_changes="report")
    finish(catalog, *range(1, 10))
    for record_id in (2, 5, 6, 9, 10):  # the last one is not done
        move(database, record_id)
    database.execute("UPDATE extraction_ledger SET address = NULL WHERE record_id = 9")
    assert catalog.moved(after_id=None, budget=100) == Moved((2, 5, 6), None)
    assert catalog.moved(after_id=None, budget=5) == Moved((2, 5), 5)
    assert catalog.moved(after_id=5, budget=5) == Moved((6,), 10)
    assert catalog.moved(after_id=10, budget=5) == Moved((), None)
    assert catalog.moved(after_id=2, budget=5, up_to_id=5) == Moved((5,), None)
    move(database, 9, "another.mp4")  # what an earlier release did has been given its address by the first look
    assert catalog.moved(after_id=5, budget=5) == Moved((6, 9), 10)
    catalog.make_pending([5])
    assert look(catalog) == [5, 10]
    assert catalog.begin(ALL, TODAY)[5].status == "todo"
    catalog.close()
