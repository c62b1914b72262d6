"""One contract, every store."""

import re
from datetime import UTC, datetime

import numpy as np
import pytest

from extraction_dagster.errors import RecordShapeError
from extraction_dagster.errors.index import (
    CollectionInUseError,
    CollectionMismatchError,
    CollectionMissingError,
    StoreNotOpenError,
)
from extraction_dagster.records import IdRange
from extraction_dagster.stages.index import protocol
from extraction_dagster.stages.index.points import PointBatch, PointFilter, build_points, point_id
from extraction_dagster.stages.index.protocol import CollectionSpec, Hit, PointStore

BIG = 2**60


@pytest.fixture
def load(opened, embeddings, rows):
    """`load({7: [0, 30]}, generation="a")`: write the points of these frames."""

    def write(frames, *, generation="a", seed=0, created_at=None):
        batch = build_points(
            embeddings(frames, seed=seed),
            rows=rows(*frames),
            generations=dict.fromkeys(frames, generation),
            created_at=created_at,
        )
        opened.upsert(batch)
        return batch

    return write


def test_an_engine_that_lacks_a_part_of_the_interface_can_not_be_made(store):
    assert isinstance(store, PointStore)
    whole = type(store)
    lacking = type("Lacking", (whole,), {"drop": PointStore.drop})
    with pytest.raises(TypeError, match=r"abstract method '?drop"):
        lacking("home")


def test_what_is_written_is_read_back(opened, load):
    batch = load({7: [0, 30], 8: [5]}, created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    (read,) = opened.read()
    order = [list(read.ids).index(point) for point in batch.ids]
    assert [read.payloads[index] for index in order] == list(batch.payloads)
    assert np.allclose(read.vectors[order], batch.vectors, atol=1e-3)
    assert batch.payloads[0] == {
        "record_id": 7,
        "platform": "insta",
        "video_code": "c7",
        "frame_number": 0,
        "frame_second": 0.0,
        "path": "/videos/7.mp4",
        "created_at": "2026-01-02T03:04:05.000Z",
        "generation": "a",
    }


def test_values_of_every_kind_are_read_back(opened):
    payload = {
        "none": None,
        "yes": True,
        "text": "\u00e9",
        "int": 2**53 + 1,
        "float": 0.1,
        "list": [1, {"a": [None, "b"]}],
    }
    vector = np.eye(1, 8, dtype=np.float32)
    opened.upsert(PointBatch((point_id(7, 0),), vector, ({"record_id": 7, **payload},)))
    (read,) = opened.read()
    assert (read.ids, read.payloads) == ((point_id(7, 0),), ({"record_id": 7, **payload},))
    assert (read.vectors.tolist(), read.vectors.dtype) == (vector.tolist(), np.float32)
    read.vectors[0, 0] = 0.5  # its own memory


def test_writing_twice_leaves_one_point_a_frame(opened, load):
    load({7: [0, 30]}, generation="a")
    load({7: [0, 30]}, generation="b", seed=1)
    assert opened.count() == 2
    assert opened.count(PointFilter(generations={7: "b"})) == 2


def test_reading_in_pages_gives_every_point_once(opened, load):
    batch = load({record_id: [0, 1, 2] for record_id in range(1, 8)})
    pages = list(opened.read(batch_size=4))
    assert [len(page) for page in pages] == [4, 4, 4, 4, 4, 1]
    assert {point for page in pages for point in page.ids} == set(batch.ids)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (None, {-5: 1, 7: 2, 8: 1, BIG: 1, BIG + 1: 1, BIG + 3: 1}),
        (PointFilter(record_ids=(7, 8, 99)), {7: 2, 8: 1}),
        (PointFilter(exclude_record_ids=(7, BIG)), {-5: 1, 8: 1, BIG + 1: 1, BIG + 3: 1}),
        (PointFilter(record_id_range=IdRange(-5, 7)), {-5: 1, 7: 2}),
        (PointFilter(record_id_range=IdRange(BIG + 1, BIG + 2)), {BIG + 1: 1}),
        (PointFilter(record_id_range=IdRange(BIG + 2, 2**63 - 1)), {BIG + 3: 1}),
        (PointFilter(record_id_range=IdRange(-(2**63), 6)), {-5: 1}),
        (PointFilter(point_ids=(point_id(7, 30), point_id(8, 0))), {7: 1, 8: 1}),
        (PointFilter(generations={7: "a", 8: "b", -5: "a"}), {7: 2, -5: 1}),
        (PointFilter(generations={7: "a", 8: "b", -5: "b"}, stale=True), {8: 1, -5: 1}),
        (PointFilter(platform="insta", record_ids=(8,)), {8: 1}),
        (PointFilter(platform="tiktok"), {}),
        (PointFilter(created_from=datetime(2026, 1, 2, tzinfo=UTC)), {BIG: 1, BIG + 1: 1, BIG + 3: 1}),
        (PointFilter(created_before=datetime(2026, 1, 2, tzinfo=UTC)), {-5: 1, 7: 2, 8: 1}),
    ],
)
def test_a_filter_selects_exactly_its_points(opened, load, filters, expected):
    load({-5: [0], 7: [0, 30], 8: [0]}, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    load({BIG: [0], BIG + 1: [0], BIG + 3: [0]}, created_at=datetime(2026, 1, 3, tzinfo=UTC))
    assert opened.count_by_record(filters) == expected
    assert opened.count(filters) == sum(expected.values())
    assert len(opened.point_ids(filters)) == sum(expected.values())


def test_records_are_counted_beyond_one_page_of_the_engine(opened, load, monkeypatch):
    load({record_id: [0, 1] for record_id in range(1, 21)})
    monkeypatch.setattr(protocol, "_PAGE", 2)
    load({20: [2]}, generation="b")
    assert opened.count_by_record() == {**dict.fromkeys(range(1, 20), 2), 20: 3}
    by_generation = {**{(record_id, "a"): 2 for record_id in range(1, 21)}, (20, "b"): 1}
    assert opened.count_by_generation() == by_generation
    assert opened.count_by_generation(PointFilter(record_ids=(20, 99))) == {(20, "a"): 2, (20, "b"): 1}
    assert len(opened.point_ids()) == 41


def test_removing_takes_exactly_the_named_points(opened, load):
    load({7: [0, 30], 8: [0], 9: [0]})
    opened.delete(PointFilter(record_ids=(7, 9)))
    assert opened.point_ids() == {point_id(8, 0)}


def test_a_record_without_points_is_not_counted_after_they_were_removed(opened, load):
    load({7: [0, 30], 8: [0]})
    opened.delete(PointFilter(record_ids=(7,)))
    assert opened.count_by_record() == {8: 1}


def test_removing_without_naming_records_is_refused(opened, load):
    load({7: [0]})
    with pytest.raises(RecordShapeError, match="removing needs records or points by name"):
        opened.delete(PointFilter(platform="insta"))
    assert opened.count() == 1


def test_search_gives_the_nearest_first_with_its_payload(opened, load):
    batch = load({7: [0, 30], 8: [15]})
    first, *others = opened.search(batch.vectors[1], limit=3)
    assert first == Hit(7, 30, 1.0, pytest.approx(1.0, abs=1e-3), "insta", "c7", "/videos/7.mp4")
    assert [hit.score for hit in others] == sorted((hit.score for hit in others), reverse=True)
    assert len(others) == 2


def test_search_keeps_to_its_filter_and_threshold(opened, load):
    batch = load({7: [0, 30], 8: [15]})
    assert [
        hit.record_id for hit in opened.search(batch.vectors[0], limit=9, filters=PointFilter(record_ids=(8,)))
    ] == [8]
    assert [hit.frame_number for hit in opened.search(batch.vectors[0], limit=9, score_threshold=0.99)] == [0]


def test_vectors_of_another_length_are_refused(opened, embeddings, rows):
    batch = build_points(embeddings({7: [0]}, dim=4), rows=rows(7), generations={7: "a"})
    with pytest.raises(RecordShapeError, match="takes dim 8; got dim 4"):
        opened.upsert(batch)


def test_nothing_is_written_by_an_empty_batch(opened):
    opened.upsert(PointBatch((), np.empty((0, 8), np.float32), ()))
    assert opened.count() == 0


def test_using_a_store_before_opening_a_collection_is_refused(store):
    with pytest.raises(StoreNotOpenError, match="no collection is open"):
        store.count()


def test_opening_what_was_never_created_is_refused(store, spec):
    with pytest.raises(CollectionMissingError, match=f"no collection '{spec.name}'.*extraction collection list"):
        store.open_collection(spec.name)


def test_opening_by_name_says_what_the_collection_holds(opened, load, spec):
    load({7: [0]})
    found = opened.open_collection(spec.name)
    assert (found.name, found.dim, found.fingerprint) == (spec.name, 8, "abc123")
    assert opened.count() == 1


@pytest.mark.parametrize(("dim", "fingerprint"), [(9, "abc123"), (8, "other")])
def test_other_vectors_are_refused_by_naming_both_and_the_fix(opened, load, spec, dim, fingerprint):
    load({7: [0]})
    wanted = re.escape(
        f"holds vectors of dim 8, fingerprint abc123, but the settings give dim {dim}, fingerprint {fingerprint}"
    )
    with pytest.raises(CollectionMismatchError, match=f"{wanted}.*extraction collection stage"):
        opened.ensure_collection(CollectionSpec(spec.name, dim, fingerprint))
    opened.ensure_collection(spec)
    assert opened.count() == 1


def test_a_collection_whose_name_begins_alike_is_a_neighbour_and_not_touched(opened, embeddings, rows, spec):
    neighbour = CollectionSpec(f"{spec.name}-staging", 8, "abc123")
    opened.ensure_collection(neighbour)
    opened.upsert(build_points(embeddings({7: [0]}), rows=rows(7), generations={7: "a"}))
    assert opened.collections(spec.name) == {"abc123": True}
    assert opened.collections(neighbour.name) == {"abc123": True}
    for fingerprint in ("staging", "staging-abc123", f"../{neighbour.name}/abc123"):
        with pytest.raises(CollectionMissingError, match="There is no collection"):
            opened.drop(spec.name, fingerprint)
        with pytest.raises(CollectionMissingError, match="There is no collection"):
            opened.open_collection(spec.name, fingerprint=fingerprint)
    opened.open_collection(neighbour.name)
    assert opened.count() == 1


def test_another_model_is_loaded_beside_and_takes_over_in_one_step(opened, embeddings, rows, spec):
    new = CollectionSpec(spec.name, dim=4, fingerprint="new")
    opened.upsert(build_points(embeddings({7: [0]}), rows=rows(7), generations={7: "a"}))
    opened.ensure_collection(new, staged=True)
    opened.upsert(build_points(embeddings({7: [0, 1]}, dim=4), rows=rows(7), generations={7: "b"}))
    assert opened.collections(spec.name) == {"abc123": True, "new": False}
    opened.open_collection(spec.name)
    assert opened.count() == 1
    opened.ensure_collection(new, staged=True)
    opened.publish()
    assert opened.open_collection(spec.name).fingerprint == "new"
    assert opened.count() == 2
    with pytest.raises(CollectionInUseError, match="is the one in use"):
        opened.drop(spec.name, "new")
    opened.drop(spec.name, "abc123")
    assert opened.collections(spec.name) == {"new": True}
    with pytest.raises(CollectionMissingError, match="abc123"):
        opened.drop(spec.name, "abc123")
