"""Replacing points: what is left afterwards, what a fault or a kill leaves behind, what a search sees meanwhile."""

import pytest

from extraction_dagster.errors.base import RecordShapeError
from extraction_dagster.errors.index import PointsMissingError
from extraction_dagster.settings import Settings
from extraction_dagster.stages.index.points import point_id
from extraction_dagster.stages.index.replace import count_by_record, delete_records, replace_records
from extraction_dagster.stages.index.server.store import ServerStore

OLD = {7: [0, 30, 60], 8: [0], 9: [0, 15]}
NEW = {7: [0, 90], 8: [0, 30, 60]}


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
    """Each store in turn, holding OLD with generation a."""
    replace_records(opened, embeddings(OLD), rows=rows(*OLD), generations=dict.fromkeys(OLD, "a"))
    return opened


@pytest.fixture
def replace_new(embeddings, rows):
    return lambda store: replace_records(store, embeddings(NEW, seed=1), rows=rows(*NEW), generations={7: "b", 8: "c"})


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
        replace_records(filled, embeddings(NEW), rows=rows(7), generations={7: "b", 8: "b"})
    assert set(held(filled)[7]) == {(0, "a"), (30, "a"), (60, "a")}


def test_removed_records_are_gone_and_others_stay(filled):
    assert delete_records(filled, [7, 8, 99]) == 4
    assert count_by_record(filled, [7, 8, 9, 99]) == {7: 0, 8: 0, 9: 2, 99: 0}
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
