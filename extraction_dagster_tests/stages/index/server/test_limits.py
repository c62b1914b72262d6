"""Limits of a collection's strict mode: read, kept, and named where they can't be."""

import pytest

from extraction_dagster.errors.index import StoreLimitError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings
from extraction_dagster.stages.index.points import PointFilter, build_points
from extraction_dagster.stages.index.server.limits import ServerLimits, halves
from extraction_dagster.stages.index.server.retry import RetryPolicy
from extraction_dagster.stages.index.server.store import ServerStore
from extraction_dagster.stages.index.stage import replace_records

FRAMES = {record_id: [0, 30, 60] for record_id in range(1, 31)}
GENERATIONS = {record_id: f"g{record_id}" for record_id in FRAMES}
# Each so small that whoever does not keep it is refused.
TIGHT = {
    "upsert_max_batchsize": 20,
    "max_query_limit": 25,
    "filter_max_conditions": 9,
    "condition_max_size": 6,
    "search_allow_exact": False,
    "max_timeout": 30,
    "unindexed_filtering_retrieve": False,
}


@pytest.fixture
def opened(wire_store, stand_in, spec):
    """`opened(**limits)`: the store with a collection open that has these limits."""

    def make(**limits):
        stand_in.rules.strict[spec.full_name] = limits
        wire_store.ensure_collection(spec)
        return wire_store

    return make


@pytest.mark.parametrize("limits", [TIGHT, *({name: value} for name, value in TIGHT.items())], ids=str)
def test_replacing_and_reading_keep_the_limits_of_strict_mode(opened, embeddings, rows, limits):
    store = opened(**limits)
    batch = embeddings(FRAMES)
    expected = dict.fromkeys(FRAMES, 3)
    assert replace_records(store, batch, rows=rows(*FRAMES), generations=GENERATIONS) == expected
    renewed = {record_id: f"{name}b" for record_id, name in GENERATIONS.items()}
    assert replace_records(store, batch, rows=rows(*FRAMES), generations=renewed) == expected
    assert store.count_by_record(PointFilter(record_id_range=IdRange(1, 100))) == expected
    assert store.count(PointFilter(generations=renewed)) == store.count() == 90
    ids = store.point_ids()
    assert (len(ids), store.count(PointFilter(point_ids=tuple(ids)))) == (90, 90)
    assert sum(map(len, store.read())) == 90


def test_a_write_larger_than_the_rate_bucket_is_split_and_waits_for_its_turn(
    stand_in, spec, tmp_path, embeddings, rows
):
    stand_in.rules.strict[spec.full_name] = {"write_rate_limit": 40}
    stand_in.rules.minute_seconds = 0.5
    settings = Settings(home=tmp_path, qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port)
    retry = RetryPolicy(30.0, base_seconds=0.05, longest_retry_after_seconds=0.1)
    with ServerStore.connect(settings, retry=retry) as store:
        store.ensure_collection(spec)
        assert replace_records(store, embeddings(FRAMES), rows=rows(*FRAMES), generations=GENERATIONS)
        assert store.count() == 90


def test_a_limit_that_was_set_after_opening_is_met_by_halving(opened, stand_in, spec, embeddings, rows):
    store = opened()
    stand_in.rules.strict[spec.full_name] = {"upsert_max_batchsize": 20, "filter_max_conditions": 9}
    assert len(replace_records(store, embeddings(FRAMES), rows=rows(*FRAMES), generations=GENERATIONS)) == 30


def test_a_limit_that_no_part_can_keep_is_named_in_one_line(opened, embeddings, rows, stand_in):
    store = opened(filter_max_conditions=2)
    batch = build_points(embeddings({1: [0]}), rows=rows(1), generations={1: "a"})
    store.upsert(batch)
    said = r'refused to count points: INVALID_ARGUMENT: .*Limit exceeded 3 > 2 for "filter limit".*docs/collection\.md'
    stand_in.calls.clear()
    with pytest.raises(StoreLimitError, match=said) as caught:
        store.count(PointFilter(generations={1: "a"}))
    assert "\n" not in str(caught.value)
    assert stand_in.calls == []


def test_every_request_carries_the_time_that_it_may_take(opened, stand_in, embeddings, rows):
    store = opened()
    replace_records(store, embeddings(FRAMES), rows=rows(*FRAMES), generations=GENERATIONS)
    list(store.read())
    store.search(embeddings({1: [0]}).vectors[0], limit=3)
    asked = {(method, seconds) for method, seconds in stand_in.rules.timeouts if method != "Get"}
    methods = ("Create", "CreateFieldIndex", "UpdateAliases", "Upsert", "Count", "Delete", "Scroll", "Query")
    assert asked == {(method, 60) for method in methods}


def test_parts_select_the_same_points_together():
    generations = dict.fromkeys(range(5), "a") | dict.fromkeys(range(5, 9), "b")
    parts = ServerLimits(conditions=7).parts(PointFilter(generations=generations, platform="tube"))
    assert [dict(part.generations) for part in parts] == [
        {0: "a", 1: "a"},
        {2: "a", 3: "a"},
        {4: "a", 5: "b"},
        {6: "b", 7: "b"},
        {8: "b"},
    ]
    assert {part.platform for part in parts} == {"tube"}
    assert ServerLimits().parts(None) == ServerLimits(values=1).parts(None) == [None]
    assert [part.record_ids for part in halves(PointFilter(record_ids=(1, 2, 3)))] == [(1, 2), (3,)]
    assert halves(PointFilter(record_ids=(1,))) == halves(None) == []
