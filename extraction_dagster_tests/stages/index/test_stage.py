"""The index stage: which collection is opened, which record fails alone, what a replacement leaves behind."""

import math

import grpc
import numpy as np
import pytest

from extraction_dagster.errors import RecordShapeError
from extraction_dagster.errors.index import (
    CollectionMismatchError,
    PointsMissingError,
    PointStoreError,
    StoreEngineError,
)
from extraction_dagster.records import EmbeddingBatch, Failure, VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.points import PointBatch, build_points, point_id
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.server.store import ServerStore
from extraction_dagster.stages.index.stage import (
    delete_records,
    index_records,
    open_for_reading,
    open_for_writing,
    open_point_store,
    replace_records,
)

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


MANY = {number: [0, 30] for number in range(1, 101)}


@pytest.fixture(params=["edge", "wire"])
def refusing(request, tmp_path, monkeypatch):
    """A store that takes no point of some records: `refusing(8, 9)`."""

    def refuse(*record_ids):
        if request.param == "edge":
            return edge_with_values_that_it_refuses(tmp_path, monkeypatch, record_ids)
        return wire_that_refuses(request, monkeypatch, record_ids)

    return refuse


def edge_with_values_that_it_refuses(tmp_path, monkeypatch, record_ids):
    """The engine itself has no number that is none; `build_points` makes null of it."""

    def build(*arguments, **options):
        batch = build_points(*arguments, **options)
        spoilt = [{**one, "x": math.nan} if one["record_id"] in record_ids else one for one in batch.payloads]
        return PointBatch(batch.ids, batch.vectors, spoilt)

    monkeypatch.setattr("extraction_dagster.stages.index.stage.build_points", build)
    return EdgeStore(tmp_path / "qdrant")


def wire_that_refuses(request, monkeypatch, record_ids):
    points = request.getfixturevalue("wire")._Points
    upsert = points.Upsert

    def choosy(self, asked, context):
        if {point.payload["record_id"].integer_value for point in asked.points} & {*record_ids}:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "Wrong input: x is no number")
        return upsert(self, asked, context)

    monkeypatch.setattr(points, "Upsert", choosy)
    return request.getfixturevalue("wire_store")


def test_a_point_that_the_store_does_not_take_fails_its_record_alone(refusing, embeddings, rows):
    bad = {8, 64, 65, 100}
    with refusing(*bad) as store:
        store.ensure_collection(OLD)
        done = index_records(store, embeddings(MANY), rows=rows(*MANY), generations=dict.fromkeys(MANY, "a"))
        assert store.count_by_record() == {key: 2 for key in MANY if key not in bad} == done.num_points
    assert {(failure.record_id, failure.error_type, failure.permanent) for failure in done.failures} == {
        (key, "PointRefusedError", True) for key in bad
    }
    assert done.failures[0].message.startswith("The points of record 8 are refused: ")


def test_a_single_record_that_is_not_taken_is_to_blame_where_others_would_be(refusing, embeddings, rows):
    with refusing(8) as store:
        store.ensure_collection(OLD)
        done = index_records(store, embeddings({8: [0]}), rows=rows(8), generations={8: "a"})
        assert [failure.error_type for failure in done.failures] == ["PointRefusedError"]


def test_a_store_that_takes_no_record_blames_none(refusing, embeddings, rows):
    with refusing(*FRAMES) as store:
        store.ensure_collection(OLD)
        with pytest.raises(PointStoreError, match="write points"):
            index_records(store, embeddings(FRAMES), rows=rows(*FRAMES), generations=dict.fromkeys(FRAMES, "a"))


def test_a_store_that_takes_no_write_at_all_blames_no_record(edge, embeddings, rows, monkeypatch):
    edge.ensure_collection(OLD)

    def full(*_):
        raise StoreEngineError("write points", "here", "No space left on device", may_be_content=True)

    monkeypatch.setattr(edge, "_write", full)
    monkeypatch.setattr(edge, "_remove", full)
    with pytest.raises(PointStoreError, match="No space left"):
        index_records(edge, embeddings({8: [0]}), rows=rows(8), generations={8: "a"})


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


def test_the_settings_choose_the_store(tmp_path):
    with open_point_store(Settings(home=tmp_path)) as store:
        assert isinstance(store, EdgeStore)
    with open_point_store(Settings(home=tmp_path, qdrant_url="http://127.0.0.1:1")) as store:
        assert isinstance(store, ServerStore)
    assert list(tmp_path.iterdir()) == []


BEFORE = {7: [0, 30, 60], 8: [0], 9: [0, 15]}
BATCH = {7: [0, 90], 8: [0, 30, 60]}


class Faulty:
    """A store that fails at the n-th call, before or after it is applied, and shows each state to a spy."""

    def __init__(self, store, *, fail_at=None, before=True, spy=lambda: None):
        self._store, self._fail_at, self._before, self._spy = store, fail_at, before, spy
        self.calls = []

    def __getattr__(self, name):
        method = getattr(self._store, name)
        if name not in ("upsert", "count", "delete", "point_ids", "flush"):
            return method

        def call(*args, **kwargs):
            fails = len(self.calls) == self._fail_at
            self.calls.append(name)
            if fails and self._before:
                raise ConnectionResetError(name)
            result = method(*args, **kwargs)
            self._spy()
            if fails:
                raise ConnectionResetError(name)
            return result

        return call


@pytest.fixture
def filled(opened, embeddings, rows):
    """Each store in turn, holding BEFORE with generation a."""
    replace_records(opened, embeddings(BEFORE), rows=rows(*BEFORE), generations=dict.fromkeys(BEFORE, "a"))
    return opened


@pytest.fixture
def replace_new(embeddings, rows):
    return lambda store: replace_records(
        store, embeddings(BATCH, seed=1), rows=rows(*BATCH), generations={7: "b", 8: "c"}
    )


AFTER = {7: [(0, "b"), (90, "b")], 8: [(0, "c"), (30, "c"), (60, "c")], 9: [(0, "a"), (15, "a")]}


def test_the_records_in_the_batch_hold_exactly_their_new_points(filled, replace_new, held):
    assert replace_new(filled) == {7: 2, 8: 3}
    assert held(filled) == AFTER


def test_doing_it_again_changes_nothing(filled, replace_new, held):
    replace_new(filled)
    assert replace_new(filled) == {7: 2, 8: 3}
    assert held(filled) == AFTER


def test_fewer_frames_of_the_same_generation_leave_no_surplus(filled, embeddings, rows, held):
    replace_records(filled, embeddings({7: [30]}), rows=rows(7), generations={7: "a"})
    assert held(filled) == {7: [(30, "a")], 8: [(0, "a")], 9: [(0, "a"), (15, "a")]}


def test_more_records_than_one_step_takes(opened, embeddings, rows):
    frames = {record_id: [0, 1] for record_id in range(1, 151)}
    counts = replace_records(opened, embeddings(frames), rows=rows(*frames), generations=dict.fromkeys(frames, "a"))
    assert counts == dict.fromkeys(range(1, 151), 2)
    assert opened.count() == 300


def test_nothing_is_removed_when_written_points_are_missing(filled, replace_new, monkeypatch, held):
    upsert = filled.upsert
    monkeypatch.setattr(filled, "upsert", lambda batch: upsert(next(batch.chunks(max_points=4, max_bytes=10**6))))
    with pytest.raises(
        PointsMissingError, match=r"4 points were found after writing them, expected exactly 5 \(record 8: 2 of 3\)"
    ):
        replace_new(filled)
    assert held(filled) == {
        7: [(0, "b"), (30, "a"), (60, "a"), (90, "b")],
        8: [(0, "c"), (30, "c")],
        9: [(0, "a"), (15, "a")],
    }


def test_points_that_were_not_removed_are_noticed(filled, replace_new, monkeypatch):
    monkeypatch.setattr(filled, "delete", lambda _: None)
    wanted = r"7 points were found after removing stale ones, expected exactly 5 \(record 7: 4 of 2\)"
    with pytest.raises(PointsMissingError, match=wanted):
        replace_new(filled)


def test_a_right_number_of_wrong_points_is_noticed(filled, replace_new, monkeypatch):
    ids = filled.point_ids
    monkeypatch.setattr(filled, "point_ids", lambda filters: ids(filters) - {point_id(7, 90)} | {point_id(7, 91)})
    with pytest.raises(PointsMissingError, match="4 points were found by their ids, expected exactly 5"):
        replace_new(filled)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("fail_at", range(6))
def test_a_fault_at_any_call_loses_nothing_and_the_next_try_arrives(filled, replace_new, fail_at, before, held):
    def no_record_is_missing():
        assert {7, 8, 9} <= set(filled.count_by_record())
        # A frame that was there before and is still sampled never disappears.
        assert {point_id(7, 0), point_id(8, 0), point_id(9, 0), point_id(9, 15)} <= filled.point_ids()

    store = Faulty(filled, fail_at=fail_at, before=before, spy=no_record_is_missing)
    with pytest.raises(ConnectionResetError):
        replace_new(store)
    assert store.calls == ["upsert", "count", "delete", "count", "point_ids", "flush"][: fail_at + 1]
    no_record_is_missing()
    replace_new(filled)
    assert held(filled) == AFTER


def test_a_record_without_a_row_is_refused_before_anything_is_written(filled, embeddings, rows, held):
    with pytest.raises(RecordShapeError, match="record 8 needs a row"):
        replace_records(filled, embeddings(BATCH), rows=rows(7), generations={7: "b", 8: "b"})
    assert set(held(filled)[7]) == {(0, "a"), (30, "a"), (60, "a")}


def test_removed_records_are_gone_and_others_stay(filled):
    assert delete_records(filled, [7, 8, 99]) == 4
    assert filled.count_by_record() == {9: 2}
    assert delete_records(filled, [7]) == 0
    assert delete_records(filled, []) == 0


def test_records_that_were_not_removed_are_noticed(filled, monkeypatch):
    monkeypatch.setattr(filled, "delete", lambda _: None)
    with pytest.raises(PointsMissingError, match=r"1 points were found after removing them, expected exactly 0"):
        delete_records(filled, [8])


def test_a_searcher_during_a_replacement_never_misses_a_record(  # noqa: PLR0913, PLR0917 - fixtures
    stand_in, wire_store, spec, embeddings, rows, tmp_path, replacing
):
    ids = range(1, 41)
    frames = {record_id: [0, 30, 60] for record_id in ids}
    wire_store.ensure_collection(spec)
    replace_records(wire_store, embeddings(frames, seed=1), rows=rows(*ids), generations=dict.fromkeys(ids, "a"))
    settings = Settings(home=tmp_path, qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port)
    with ServerStore.connect(settings) as other:
        other.open_collection(spec.name)
        with replacing.searching(other, ids, dim=spec.dim) as seen:
            before = seen.searches
            for round_number in range(6):
                # Other frames each time, so that old points are removed.
                numbers = [0, 15 * (round_number + 1), 600 + round_number]
                replace_records(
                    wire_store,
                    embeddings(dict.fromkeys(ids, numbers), seed=round_number),
                    rows=rows(*ids),
                    generations=dict.fromkeys(ids, f"b{round_number}"),
                )
    assert seen.missed == set()
    assert seen.searches > before > 0
    assert wire_store.count() == 120
