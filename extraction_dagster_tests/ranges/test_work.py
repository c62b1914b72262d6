"""What a step begins with, and a whole range without Dagster."""

from datetime import UTC, datetime, timedelta

import pytest

from extraction_dagster.errors.catalog import EmptyRangeError
from extraction_dagster.ranges.decode import decode_range
from extraction_dagster.ranges.embed import embed_range
from extraction_dagster.ranges.index import index_range
from extraction_dagster.ranges.work import fingerprints_of, open_range
from extraction_dagster.records import Failure, IdRange
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.catalog.error_retention import prune_errors, removed_errors


def test_a_whole_range_runs_in_plain_python(sqlite_database, make_settings):
    settings, id_range = make_settings(), IdRange.parse("1-100")
    with open_range(settings, id_range, begins=True) as work:
        decoded = decode_range(work).numbers
    with open_range(settings, id_range) as work:
        embedded = embed_range(work).numbers
    with open_range(settings, id_range) as work:
        indexed = index_range(work).numbers
        states = {record_id: entry.state for record_id, entry in work.entries().items()}

    counts = ("videos", "videos_kept", "videos_partial", "frames")
    assert [decoded[name] for name in counts] == [2, 0, 0, 6]
    assert (embedded["videos"], embedded["frames"], embedded["shards"]) == (2, 6, 1)
    assert (indexed["videos"], indexed["points"], indexed["points_in_range"]) == (2, 6, 6)
    assert states == {1: "done", 2: "done", 3: "failed"}
    marks = sqlite_database.rows("SELECT id, is_extracted, is_embedded FROM insta_content ORDER BY id")
    assert marks == [(1, 1, 1), (2, 1, 1), (3, 0, 0)]


def test_the_stores_of_a_step_stay_those_of_the_settings_with_which_it_began(make_settings, monkeypatch):
    settings = make_settings()
    made_with = fingerprints_of(settings)
    with open_range(settings, IdRange(1, 3)) as work:
        monkeypatch.setenv("EXTRACTION_FPS", "7")
        assert work.frame_store.fingerprint == made_with.frames == work.fingerprints.frames
        assert work.settings.fps == 1
    assert made_with.frames != fingerprints_of(make_settings(fps=7)).frames


def test_the_first_step_refuses_a_range_without_an_eligible_row(make_settings):
    with (
        pytest.raises(EmptyRangeError, match=r"Range 50-60 holds no eligible row of 'insta_content'"),
        open_range(make_settings(), IdRange(50, 60), begins=True),
    ):
        pytest.fail("there is nothing to work on")


def test_rows_at_or_below_the_floor_are_not_planned(make_settings):
    with open_range(make_settings(), IdRange(1, 3), within=IdRange(3, 3), begins=True) as work:
        assert list(work.pending) == [3]
        assert work.id_range == IdRange(1, 3)


def test_only_a_forced_step_selects_rows_that_are_done(make_settings):
    settings = make_settings()
    made_with = fingerprints_of(settings)
    with open_range(settings, IdRange(1, 3)) as work:
        work.catalog.mark_extracted(work.plan, {1: 3}, made_with.frames)
        work.catalog.mark_done(work.plan, {1: 3}, made_with)
    with open_range(settings, IdRange(1, 3)) as work:
        assert (list(work.pending), list(work.selected)) == ([2, 3], [2, 3])
    with open_range(settings, IdRange(1, 3), force=True) as work:
        assert (list(work.pending), list(work.selected)) == ([2, 3], [1, 2, 3])


def steps(settings, run_id="r"):
    """A whole run of the range; returns what failed while it decoded."""
    id_range = IdRange(1, 100)
    with open_range(settings, id_range, begins=True, run_id=run_id) as work:
        failures = decode_range(work).failures
    with open_range(settings, id_range, run_id=run_id) as work:
        embed_range(work)
    with open_range(settings, id_range, run_id=run_id) as work:
        index_range(work)
    return {failure.record_id: failure.error_type for failure in failures}


def states(settings):
    with open_range(settings, IdRange(1, 100)) as work:
        return {record_id: entry.state for record_id, entry in work.entries().items()}


def test_a_row_that_can_not_be_read_fails_alone_and_is_done_once_it_is_corrected(sqlite_database, make_settings):
    settings = make_settings()
    ((path,),) = sqlite_database.rows("SELECT path FROM insta_content WHERE id = 2")
    sqlite_database.execute("UPDATE insta_content SET path = CAST(x'66ff2e6d7034' AS TEXT) WHERE id = 2")
    assert steps(settings) == {2: "UnreadableRowError", 3: "FileUnavailableError"}
    assert states(settings) == {1: "done", 2: "failed", 3: "failed"}
    with open_range(settings, IdRange(1, 100)) as work:
        (error,) = work.catalog.ledger.errors(limit=9, error_type="UnreadableRowError")
    assert (error.record_id, error.stage, error.run_id) == (2, "catalog", "r")
    assert error.error_message == (
        "Column 'path' of record 2 in 'insta_content' can't be used: it is no UTF-8; expected TEXT. Nothing was "
        "written for it; the range goes on. Correct the value; the record is tried again later, and with "
        "'extraction retry 2' once it is parked."
    )
    sqlite_database.execute("UPDATE insta_content SET path = :path WHERE id = 2", path=path)
    assert steps(settings) == {}
    assert states(settings) == {1: "done", 2: "done", 3: "failed"}


def test_a_step_works_under_the_claim_that_its_run_took(make_settings):
    settings = make_settings()
    with open_range(settings, IdRange(1, 100), begins=True) as work:
        claims = {record_id: planned.video.claim for record_id, planned in work.plan.items()}
    for options in ({}, {"force": True}):
        with open_range(settings, IdRange(1, 100), **options) as work:
            assert {record_id: planned.video.claim for record_id, planned in work.plan.items()} == claims
    with open_range(settings, IdRange(1, 100), claims=True) as work:
        assert {record_id: planned.video.claim - 1 for record_id, planned in work.plan.items()} == claims
        assert {planned.content_version for planned in work.plan.values()} == {""}


def test_the_later_steps_of_a_run_leave_rows_alone_that_another_run_has_claimed_since(make_settings):
    late, newer = make_settings(fps=1.0), make_settings(fps=2.0)
    with open_range(late, IdRange(1, 100), begins=True, run_id="late") as work:
        decode_range(work)
    steps(newer, run_id="newer")
    assert states(newer) == {1: "done", 2: "done", 3: "failed"}
    with open_catalog(newer) as catalog:
        before = catalog.ledger.entries(IdRange(1, 100))
    with open_range(late, IdRange(1, 100), run_id="late") as work:
        assert not work.pending
        assert embed_range(work).numbers["videos"] == 0
    with open_range(late, IdRange(1, 100), run_id="late") as work:
        assert index_range(work).numbers["points"] == 0
        assert work.entries() == before
    with open_range(late, IdRange(1, 100), begins=True, run_id="a run of its own") as work:
        assert set(work.pending) == {1, 2}  # whoever asks for these settings gets them


def test_the_first_failures_of_a_step_are_told_and_the_others_summed_up(sqlite_database, make_settings, caplog):
    make_settings()
    sqlite_database.insert(*range(4, 104), path="/nowhere/missing.mp4")
    with caplog.at_level("WARNING"), open_range(make_settings(), IdRange(1, 200), begins=True) as work:
        work.record_failures([_failed(work, key) for key in range(4, 104)])
    said = [record.getMessage() for record in caplog.records if record.name.endswith("work")]
    assert (len(said), said[0], said[49]) == (51, "no file 4 (failed)", "no file 53 (failed)")
    assert said[50] == "50 more records failed (50 FileUnavailableError); 'extraction errors' lists them"
    assert len(sqlite_database.rows("SELECT id FROM extraction_errors")) == 100


def _failed(work, record_id):
    version = work.plan[record_id].content_version
    return Failure(record_id, version, "fetch", "FileUnavailableError", f"no file {record_id}")


def test_old_errors_go_where_new_ones_come_and_are_still_counted(sqlite_database, make_settings):
    settings = make_settings(keep_errors_days=30, retry_delay_seconds=0)
    for _ in range(3):
        with open_range(settings, IdRange(1, 3), begins=True) as work:
            work.record_failures([_failed(work, 1)])
    with open_range(settings, IdRange(1, 3), begins=True) as work:
        work.record_failures([_failed(work, 2)])
        work.catalog.mark_done(work.plan, {2: 3}, work.fingerprints)
    old = datetime.now(UTC) - timedelta(days=31)
    sqlite_database.execute("UPDATE extraction_errors SET occurred_at = :old", old=old.isoformat(" "))
    with open_range(settings, IdRange(1, 3), begins=True) as work:
        work.record_failures([_failed(work, 3)])
        engine = work.catalog.state_engine
    # Of record 1, which is parked, the last one stays; record 2 is done.
    with open_catalog(settings) as catalog:
        assert [error.record_id for error in catalog.ledger.errors(limit=9, current_only=False)] == [3, 1]
        assert removed_errors(engine) == {("fetch", "FileUnavailableError"): 3}
        assert prune_errors(engine, keep_days=30) == 0
