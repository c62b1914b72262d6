"""A record that can't become points fails alone; vectors of another model go where they were staged."""

import numpy as np
import pytest

from extraction_dagster.errors.index import CollectionMismatchError, PointStoreError
from extraction_dagster.records import EmbeddingBatch, Failure, VideoRow
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.points import PointBatch, point_id
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.stage import index_records, open_for_reading, open_for_writing

FRAMES = {7: [0, 30], 8: [0], 9: [0, 15, 30]}
OLD, NEW = CollectionSpec("frames", 8, "old"), CollectionSpec("frames", 8, "new")


@pytest.fixture
def edge(tmp_path):
    with EdgeStore(tmp_path / "qdrant") as store:
        yield store


def test_a_value_without_json_form_fails_its_record_alone(edge, embeddings, rows):
    edge.ensure_collection(OLD)
    index_records(edge, embeddings({8: [0]}), rows=rows(8), generations={8: "a"})
    bad = VideoRow(8, "/videos/8.mp4", content_version="v2", payload={"likes": 2**70})
    done = index_records(edge, embeddings(FRAMES), rows={**rows(7, 9), 8: bad}, generations=dict.fromkeys(FRAMES, "b"))
    assert done.num_points == {7: 2, 9: 3}
    (failure,) = done.failures
    assert failure == Failure(8, "v2", "index", "PayloadError", failure.message, permanent=True)
    assert failure.message.startswith("Column 'likes' of record 8 can't be kept in a point's payload")
    assert edge.count_by_record() == {7: 2, 8: 1, 9: 3}


def test_vectors_that_are_not_normalised_fail_their_records_alone(edge, embeddings, rows):
    edge.ensure_collection(OLD)
    good = embeddings(FRAMES)
    vectors = good.vectors.copy()
    vectors[good.record_id == 7] *= np.float16(2)
    vectors[-1] = 0
    bad = EmbeddingBatch(vectors, good.record_id, good.frame_number, good.pts_seconds)
    done = index_records(edge, bad, rows=rows(7, 8, 9), generations=dict.fromkeys(FRAMES, "a"))
    assert done.num_points == {8: 1}
    assert [(item.record_id, item.error_type, item.permanent) for item in done.failures] == [
        (7, "VectorNormError", False),
        (9, "VectorNormError", False),
    ]
    assert edge.count_by_record() == {8: 1}


def test_when_every_record_fails_nothing_is_written(edge, embeddings):
    edge.ensure_collection(OLD)
    bad = {7: VideoRow(7, "v", payload={"likes": object()})}
    done = index_records(edge, embeddings({7: [0]}), rows=bad, generations={7: "a"})
    assert (done.num_points, len(done.failures), edge.count()) == ({}, 1, 0)


def test_a_fault_of_the_store_is_no_records_fault(edge, embeddings, rows):
    with pytest.raises(PointStoreError, match="no collection is open"):
        index_records(edge, embeddings({7: [0]}), rows=rows(7), generations={7: "a"})


def test_vectors_of_another_model_are_refused_until_a_collection_is_staged_for_them(edge):
    open_for_writing(edge, OLD)
    assert edge.collections("frames") == {"old": True}
    with pytest.raises(CollectionMismatchError, match="extraction collection stage"):
        open_for_writing(edge, NEW)
    edge.ensure_collection(NEW, staged=True)
    edge.close()
    open_for_writing(edge, NEW)
    assert edge.collections("frames") == {"new": False, "old": True}
    edge.publish()
    open_for_writing(edge, NEW)
    assert edge.collections("frames") == {"new": True, "old": False}


def test_a_first_collection_whose_publishing_was_cut_off_is_published(edge, tmp_path):
    open_for_writing(edge, OLD)
    edge.close()
    (tmp_path / "qdrant" / "frames" / "pointer.json").unlink()
    open_for_writing(edge, OLD)
    assert edge.collections("frames") == {"old": True}


def test_a_collection_in_use_or_staged_is_found_by_its_vectors(store, spec):
    assert not open_for_reading(store, spec.name, "abc123")
    store.ensure_collection(spec)
    store.ensure_collection(CollectionSpec(spec.name, dim=4, fingerprint="new"), staged=True)
    assert not open_for_reading(store, spec.name, "other")
    for fingerprint, dim in (("abc123", 8), ("new", 4)):
        assert open_for_reading(store, spec.name, fingerprint)
        store.upsert(PointBatch((point_id(7, 0),), np.ones((1, dim), np.float32), ({"record_id": 7},)))
        assert store.count() == 1
