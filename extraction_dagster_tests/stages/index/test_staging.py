"""Another model's collection is loaded beside the one in use and takes over once it is whole."""

import pytest

from extraction_dagster.errors.index import CollectionInUseError, CollectionMissingError, CollectionNotReadyError
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.points import PointFilter
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.staging import (
    CollectionInfo,
    list_collections,
    publish_collection,
    stage_collection,
)

NEW = Fingerprints(frames="f1", embedding="e2")
SPEC = CollectionSpec("video_frames", 8, "e2")


def publish(world, catalog, **options):
    with EdgeStore(world.home) as store:
        return publish_collection(store, catalog, name="video_frames", fingerprint="e2", **options)


def test_a_model_changes_while_the_old_points_are_searched(done, catalog):
    with EdgeStore(done.home) as store:
        assert stage_collection(store, SPEC)
        assert stage_collection(store, SPEC)
    assert done.process(catalog, IdRange(1, 3), made_with=NEW, staged=True) == [1, 2, 3]
    with pytest.raises(CollectionNotReadyError, match=r"2 of 5 records .*\(ids 40-41\).*launch FIRST-LAST.*--force"):
        publish(done, catalog)
    with EdgeStore(done.home) as store:
        assert list_collections(store, "video_frames") == [
            CollectionInfo("e1", in_use=True, dim=8, points=12),
            CollectionInfo("e2", in_use=False, dim=8, points=6),
        ]
        with pytest.raises(CollectionInUseError):
            store.drop("video_frames", "e1")
    assert done.process(catalog, IdRange(4, 99), made_with=NEW, staged=True) == [40, 41]
    assert publish(done, catalog) == 5
    with EdgeStore(done.home) as store:
        store.drop("video_frames", "e1")
        assert list_collections(store, "video_frames") == [CollectionInfo("e2", in_use=True, dim=8, points=12)]
    assert done.reconcile(catalog, embedding="e2").differences == []


def test_a_collection_that_lost_points_does_not_take_over_unless_it_is_forced(done, catalog):
    assert done.process(catalog, made_with=NEW, staged=True) == [1, 2, 3, 40, 41]
    with EdgeStore(done.home) as store:
        store.open_collection("video_frames", fingerprint="e2")
        store.delete(PointFilter(record_ids=(40,)))
    with pytest.raises(CollectionNotReadyError, match=r"1 of 5 records .*\(ids 40-40\)"):
        publish(done, catalog)
    assert publish(done, catalog, force=True) == 0
    with EdgeStore(done.home) as store:
        assert store.open_collection("video_frames").fingerprint == "e2"


def test_rows_that_failed_or_are_gone_hold_nothing_up(done, catalog):
    done.execute("DELETE FROM insta_content WHERE id IN (40, 41)")
    assert done.process(catalog, made_with=NEW, staged=True) == [1, 2, 3]
    assert publish(done, catalog) == 3


def test_the_first_collection_is_in_use_at_once_and_one_that_is_not_there_can_not_be_published(world, catalog):
    with pytest.raises(CollectionMissingError, match="There is no collection 'video_frames"):
        publish(world, catalog)
    with EdgeStore(world.home) as store:
        assert not stage_collection(store, SPEC)
        assert list_collections(store, "video_frames") == [CollectionInfo("e2", in_use=True, dim=8, points=0)]
