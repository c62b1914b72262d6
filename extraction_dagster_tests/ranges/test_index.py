"""Which vectors become points, who may write them, and what becomes of a row whose vectors can't be read."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from extraction_dagster.ranges.decode import decode_range
from extraction_dagster.ranges.embed import embed_range
from extraction_dagster.ranges.index import index_range
from extraction_dagster.ranges.work import fingerprints_of, open_range
from extraction_dagster.records import EmbeddingBatch, IdRange
from extraction_dagster.shards.store import ShardRecord
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.index import stage
from extraction_dagster.stages.index.points import PointFilter
from extraction_dagster.stages.index.reconcile import reconcile
from extraction_dagster.stages.index.stage import open_point_store

RANGE = IdRange(1, 100)
EARLY, LATE = "20260102T030405000006Z-0a1b2c3d4e5f.parquet", "20260102T030405000007Z-0a1b2c3d4e5f.parquet"


@pytest.fixture
def table(sqlite_database):
    """Settings of a table with rows 1, 2 and 3; no run has begun."""
    sqlite_database.create(ids=(1, 2, 3))
    return sqlite_database.settings(source_version_column="code")


def vectors_of(frames):
    """Vectors of so many frames of each record."""
    ids = np.repeat(np.array(list(frames), np.int64), list(frames.values()))
    numbers = np.concatenate([np.arange(number) for number in frames.values()]).astype(np.int64)
    vectors = np.zeros((len(ids), 8), np.float16)
    vectors[:, 0] = 1
    return EmbeddingBatch(vectors, ids, numbers, numbers / 1.0)


def store_vectors(work, frames, *, name=EARLY, older_by=0):
    """Write an embedding shard of rows of a plan, as a run that claimed them so many claims earlier."""
    videos = {key: work.plan[key].video for key in frames}
    records = [
        ShardRecord(key, video.content_version, frames[key], address=video.address, claim=video.claim - older_by)
        for key, video in videos.items()
    ]
    return work.embedding_store.write(RANGE, name, vectors_of(frames), records=records)


def begin(settings, frames, **options):
    """Begin a run of the range, and store vectors of these records."""
    with open_range(settings, RANGE, begins=True) as work:
        return store_vectors(work, frames, **options)


def index(settings):
    with open_range(settings, RANGE) as work:
        return index_range(work)


def points(settings):
    with open_point_store(settings) as store:
        store.open_collection(settings.collection_name)
        return store.count_by_record()


def entries(settings):
    with open_catalog(settings) as catalog:
        return catalog.ledger.entries(RANGE)


def states(settings):
    return {key: entry.state for key, entry in entries(settings).items()}


def test_the_copy_of_the_latest_claim_becomes_points_whatever_its_name_says(table):
    with open_range(table, RANGE, begins=True) as work:
        store_vectors(work, {1: 2, 2: 2}, name=EARLY)
        store_vectors(work, {1: 5, 3: 1}, name=LATE, older_by=1)  # a frozen writer's
    assert index(table).num_points == {1: 2, 2: 2, 3: 1}
    assert points(table) == {1: 2, 2: 2, 3: 1}


def test_vectors_of_another_address_are_not_taken(table, sqlite_database):
    begin(table, {1: 2, 2: 2})
    sqlite_database.execute("UPDATE insta_content SET path = 'corrected.mp4' WHERE id = 2")
    assert index(table).num_points == {1: 2}


def test_the_ledger_keeps_what_the_points_are_made_from(table):
    begin(table, {1: 2})
    index(table)
    with open_point_store(table) as store:
        store.open_collection(table.collection_name)
        (batch,) = store.read()
    assert {payload["generation"] for payload in batch.payloads} == {entries(table)[1].generation}


def test_a_row_that_was_claimed_since_it_was_planned_keeps_its_points(table, sqlite_database, caplog):
    begin(table, {1: 2, 2: 2})
    index(table)
    with open_catalog(table) as catalog:
        catalog.make_pending([1, 2])
    with open_range(table, RANGE, begins=True) as work:
        store_vectors(work, {1: 3, 2: 3}, name=LATE)
        sqlite_database.execute("UPDATE extraction_ledger SET claim = claim + 1 WHERE record_id = 2")
        caplog.set_level(logging.WARNING)
        assert index_range(work).num_points == {1: 3}
    assert points(table) == {1: 3, 2: 2}
    assert states(table)[2] != "done"
    assert "Left out 1 records that were claimed by others meanwhile (records 2)" in caplog.text


@pytest.fixture
def overtaken(monkeypatch):
    """`overtaken(run)`: another run does this as soon as this one has written its first points."""

    def when_written(run):
        honest = stage.index_records

        def then_run(*arguments, **options):
            monkeypatch.setattr(stage, "index_records", honest)
            written = honest(*arguments, **options)
            run()
            return written

        monkeypatch.setattr(stage, "index_records", then_run)

    return when_written


def test_a_loser_that_may_have_written_over_newer_points_makes_its_row_pending(table, sqlite_database, overtaken):
    def newer_run():
        """Its points are gone in this test's one store, as if ours had been written over them."""
        sqlite_database.execute(
            "UPDATE extraction_ledger SET claim = claim + 1, state = 'done', generation = 'newer', num_points = 4, "
            "embedding_fingerprint = :made_with WHERE record_id = 2",
            made_with=fingerprints_of(table).embedding,
        )

    overtaken(newer_run)
    begin(table, {1: 2, 2: 2})
    assert index(table).num_points == {1: 2}
    assert (states(table)[1], states(table)[2]) == ("done", "todo")


def test_a_loser_whose_winner_is_not_done_yet_leaves_the_row_to_it(table, sqlite_database, overtaken):
    overtaken(lambda: sqlite_database.execute("UPDATE extraction_ledger SET claim = claim + 1 WHERE record_id = 2"))
    begin(table, {1: 2, 2: 2})
    claim = entries(table)[2].claim
    assert index(table).num_points == {1: 2}
    assert entries(table)[2].claim == claim + 1


def test_a_damaged_shard_is_set_aside_and_its_rows_alone_wait_for_new_vectors(table, caplog):
    with open_range(table, RANGE, begins=True) as work:
        store_vectors(work, {1: 2}, name=EARLY)
        damaged = Path(store_vectors(work, {2: 2, 3: 1}, name=LATE).path)
    content = bytearray(damaged.read_bytes())
    content[20:60] = bytes(40)
    damaged.write_bytes(content)
    report = index(table)
    assert (report.num_points, report.numbers["videos_without_vectors"]) == ({1: 2}, 2)
    assert not damaged.exists()
    assert {key for key, state in states(table).items() if state == "done"} == {1}
    assert "set" in caplog.text.lower()
    begin(table, {2: 2, 3: 1}, name=LATE)
    assert index(table).num_points == {2: 2, 3: 1}
    assert points(table) == {1: 2, 2: 2, 3: 1}


def test_an_older_copy_of_the_same_file_takes_the_place_of_a_damaged_one(table):
    with open_range(table, RANGE, begins=True) as work:
        store_vectors(work, {1: 2}, name=EARLY)
        damaged = Path(store_vectors(work, {1: 2}, name=LATE).path)
    damaged.write_bytes(damaged.read_bytes()[:20] + bytes(40) + damaged.read_bytes()[60:])
    assert index(table).num_points == {1: 2}


@pytest.mark.parametrize("keep_frames", ["none", "all"])
@pytest.mark.parametrize("is_stamped", [True, False])
def test_lost_points_come_back_from_stored_vectors_without_a_file(
    sqlite_database, tmp_path, clips, keep_frames, is_stamped
):
    videos = shutil.copytree(clips, tmp_path / "videos")
    sqlite_database.create(ids=(1, 2))
    sqlite_database.execute("UPDATE insta_content SET path = :folder || '/' || path", folder=str(videos))
    if is_stamped:
        sqlite_database.execute("UPDATE insta_content SET updated_at = '2026-01-01'")
        sqlite_database.execute(
            "CREATE TRIGGER stamp AFTER UPDATE ON insta_content BEGIN "
            "UPDATE insta_content SET updated_at = datetime(updated_at, '+1 second') WHERE id = NEW.id; END"
        )
    settings = sqlite_database.settings(
        allowed_roots=(str(videos),),
        decode_workers=1,
        keep_frames=keep_frames,
        source_version_column="updated_at" if is_stamped else "",
    )

    def run():
        with open_range(settings, RANGE, begins=True) as work:
            decoded = decode_range(work).numbers["frames"]
        for step in (embed_range, index_range):
            with open_range(settings, RANGE) as work:
                step(work)
        return decoded

    assert run() == 6
    shutil.rmtree(videos)
    with open_point_store(settings) as store:
        store.open_collection(settings.collection_name)
        store.delete(PointFilter(record_ids=(1, 2)))
    with open_catalog(settings) as catalog:
        found = reconcile(
            catalog,
            lambda: open_point_store(settings),
            collection_name=settings.collection_name,
            embedding=fingerprints_of(settings).embedding,
            repair=True,
        )
    assert [item.lost for item in found.differences] == [{1: 3, 2: 3}]
    assert run() == 0
    assert points(settings) == {1: 3, 2: 3}
    assert states(settings) == {1: "done", 2: "done"}
