"""Points that are lost, stale or gone are found, at the cost of reading the range once."""

from types import SimpleNamespace

import pytest

from extraction_dagster.records import IdRange
from extraction_dagster.stages.index.compare import Differences, ExpectedPoints, compare_points
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.points import PointFilter, point_id
from extraction_dagster.stages.index.stage import replace_records

FRAMES = {5: [0], 7: [0, 30, 60], 8: [0, 15], 9: [0], 20: [0, 1]}
EXPECTED = {7: ExpectedPoints(3, "a"), 8: ExpectedPoints(2, "a"), 9: ExpectedPoints(1, "a")}
RANGE = IdRange(6, 10)


@pytest.fixture
def filled(opened, embeddings, rows):
    """Each store in turn, holding FRAMES with generation a."""
    replace_records(opened, embeddings(FRAMES), rows=rows(*FRAMES), generations=dict.fromkeys(FRAMES, "a"))
    return opened


def test_a_store_that_agrees_says_so_whatever_lies_outside_the_range(filled):
    found = compare_points(filled, EXPECTED, within=RANGE)
    assert found == Differences(RANGE, compared=3, held=6)
    assert found.agrees


def test_lost_points_are_found(filled):
    filled.delete(PointFilter(point_ids=(point_id(7, 30), point_id(9, 0))))
    found = compare_points(filled, EXPECTED, within=RANGE)
    assert found == Differences(RANGE, compared=3, held=6, lost={7: 1, 9: 1})
    assert not found.agrees


def test_points_of_a_record_that_should_have_none_are_gone(filled):
    found = compare_points(filled, {7: EXPECTED[7]}, within=RANGE)
    assert found == Differences(RANGE, compared=1, held=3, gone={8: 2, 9: 1})
    assert compare_points(filled, {}, within=IdRange(1, 6)) == Differences(IdRange(1, 6), gone={5: 1})


def test_points_of_another_generation_are_lost_and_stale(filled):
    wanted = {**EXPECTED, 8: ExpectedPoints(4, "b")}
    found = compare_points(filled, wanted, within=RANGE)
    assert found == Differences(RANGE, compared=3, held=8, lost={8: 4}, stale={8: 2})


def test_more_points_than_were_verified_are_stale(filled):
    wanted = {**EXPECTED, 7: ExpectedPoints(2, "a")}
    found = compare_points(filled, wanted, within=RANGE)
    assert found == Differences(RANGE, compared=3, held=5, stale={7: 1})


MANY = {key: ExpectedPoints(2, f"g{key}") for key in range(1, 41)}


def fill_many(store, embeddings, rows):
    """40 records of two points, each with a generation of its own, as a version column gives them."""
    generations = {key: want.generation for key, want in MANY.items()}
    replace_records(store, embeddings({key: [0, 30] for key in MANY}), rows=rows(*MANY), generations=generations)


def test_records_with_generations_of_their_own_are_read_and_never_counted_one_by_one(
    wire_store, spec, stand_in, embeddings, rows
):
    wire_store.ensure_collection(spec)
    fill_many(wire_store, embeddings, rows)
    stand_in.calls.clear()
    assert compare_points(wire_store, MANY, within=IdRange(1, 100)) == Differences(IdRange(1, 100), 40, 80)
    assert stand_in.calls == ["Scroll"]


def test_the_embedded_engine_is_only_asked_for_pages(tmp_path, spec, embeddings, rows):
    with EdgeStore(tmp_path / "qdrant") as store:
        store.ensure_collection(spec)
        fill_many(store, embeddings, rows)
        store._engine = SimpleNamespace(scroll=store._engine.scroll, close=store._engine.close)
        within = IdRange(1, 100)
        assert compare_points(store, MANY, within=within) == Differences(within, compared=40, held=80)
        swapped = {**MANY, 1: MANY[2], 2: MANY[1]}  # every number agrees
        found = compare_points(store, swapped, within=within)
        assert (found.lost, found.stale) == ({1: 2, 2: 2}, {1: 2, 2: 2})


def test_of_a_run_its_own_records_are_compared_and_of_the_others_their_number(
    wire_store, spec, stand_in, embeddings, rows
):
    wire_store.ensure_collection(spec)
    fill_many(wire_store, embeddings, rows)
    within = IdRange(1, 100)

    def look(expected=MANY, only=(7, 8)):
        stand_in.calls.clear()
        return compare_points(wire_store, expected, within=within, only=only), list(stand_in.calls)

    assert look() == (Differences(within, compared=40, held=80), ["Scroll", "Count"])
    assert look(only=tuple(range(1, 21)))[1] == ["Scroll"]  # half of them: each is compared
    found, calls = look({**MANY, 7: ExpectedPoints(2, "another"), 9: ExpectedPoints(2, "another")})
    assert (found.lost, found.stale, calls) == ({7: 2, 9: 2}, {7: 2, 9: 2}, ["Scroll", "Scroll"])
    wire_store.delete(PointFilter(point_ids=(point_id(30, 0),)))
    found, calls = look()
    assert (found.lost, found.stale, calls) == ({30: 1}, {}, ["Scroll", "Count", "Scroll"])
    assert look({key: want for key, want in MANY.items() if key != 30})[0].gone == {30: 1}
