"""What a step begins with, and a whole range without Dagster."""

import pytest

from extraction_dagster.errors.catalog import EmptyRangeError
from extraction_dagster.ranges.decode import decode_range
from extraction_dagster.ranges.embed import embed_range
from extraction_dagster.ranges.index import index_range
from extraction_dagster.ranges.work import fingerprints_of, open_range
from extraction_dagster.records import IdRange


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
