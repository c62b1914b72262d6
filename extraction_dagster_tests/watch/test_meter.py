"""Figures taken from real databases and a real store, and what is said when one of them can't be read."""

import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import numpy as np
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.records import Failure, IdRange
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.index.points import PointBatch
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.stage import open_point_store
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.watch.meter import (
    InstanceFigures,
    Meter,
    MirrorFigures,
    census_seconds,
    recall_census,
    remember_census,
)
from extraction_dagster.watch.progress import Progress, ProgressMemory, remember_progress

TODAY = Fingerprints(frames="f1", embedding="e1")
EVERY_ID = IdRange(-100, 10_000)
NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""

    class Clock:
        now = time.time() + 100_000  # later than the marks that a test makes

        def pass_by(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr("extraction_dagster.watch.meter.time.time", lambda: clock.now)
    return clock


class Instance:
    """What Dagster's instance would say; `test_measuring.py` asks a real one."""

    def __init__(self):
        self.cursor, self.fault = None, None

    def __call__(self):
        if self.fault is not None:
            raise self.fault
        runs, rates = {"queued": 1, "started": 2, "canceling": 0}, {"videos": 0.5}
        return InstanceFigures(self.cursor, runs, {}, None, is_switched_on=True, daemons={}, rates=rates)

    def stands_at(self, catalog, last, frontier=None, floor=None):
        state = CursorState(catalog.source.identity, last, frontier, floor, updated_at=NOON)
        self.cursor = state.to_json()


@pytest.fixture
def instance():
    return Instance()


@pytest.fixture
def site(database, instance):
    """Ten rows: 1 to 4 done with three frames each, 5 failed, 6 parked, the others untouched; the watermark is at 4."""
    database.create(ids=range(1, 11))
    catalog = database.catalog()
    plan = catalog.plan(EVERY_ID, TODAY)
    done = dict.fromkeys(range(1, 5), 3)
    catalog.mark_extracted(plan, done, "f1")
    catalog.mark_done(plan, done, TODAY)
    failures = [
        Failure(5, "", "decode", "VideoDecodeError", "broken"),
        Failure(6, "", "fetch", "SchemeError", "odd", permanent=True),
    ]
    catalog.record_failures(plan, failures, run_id="r1")
    instance.stands_at(catalog, 4, 10)
    yield catalog
    catalog.close()


@pytest.fixture
def meter(site, instance):
    meter = Meter(site.settings, instance)
    yield meter
    meter.close()


def test_the_cheap_figures_say_where_the_watermark_is_and_what_is_above_it(meter, clock):
    figures = meter.measure()
    assert figures.parts == {"dagster": True, "table": True, "cursor": True}
    assert figures.progress == Progress(
        last_processed_id=4,
        frontier_id=10,
        newest_id=10,
        lag_ids=6,
        lag_rows=5,
        pending_rows=4,
        waiting_rows=1,
        failed_records=1,
        parked_records=1,
        active_runs=3,
        videos_per_second=0.5,
        moved_at=datetime.fromtimestamp(clock.now, UTC),
    )
    assert (figures.at, figures.mirror) == (clock.now, None)


def stalled(meter):
    return round(meter.measure().progress.stalled_seconds)


def test_a_watermark_that_stays_while_rows_are_pending_is_stalled_until_it_moves(meter, site, instance, clock):
    meter.measure()
    clock.pass_by(100)
    assert stalled(meter) == 100
    clock.pass_by(20)
    instance.stands_at(site, 5, 10)
    assert stalled(meter) == 0
    clock.pass_by(30)
    assert stalled(meter) == 30


def test_another_process_goes_on_with_the_same_time(meter, site, instance, clock):
    meter.measure()
    clock.pass_by(500)
    another = Meter(site.settings, instance)
    assert stalled(another) == 500
    another.close()


def test_where_nothing_is_pending_nothing_stalls_and_a_new_row_begins_the_time(meter, site, instance, database, clock):
    plan, left = site.plan(EVERY_ID, TODAY), dict.fromkeys((5, 7, 8, 9, 10), 1)  # 6 is parked
    site.mark_extracted(plan, left, "f1")
    site.mark_done(plan, left, TODAY)
    instance.stands_at(site, 4, 10)
    for _ in range(3):
        clock.pass_by(1000)
        progress = meter.measure().progress
        assert (progress.pending_rows, progress.stalled_seconds) == (0, 0)
    database.insert(11)
    clock.pass_by(10)
    assert stalled(meter) == 10
    another = Meter(site.settings, instance)  # knows of the time before by what was kept
    assert stalled(another) <= 70
    another.close()


def test_before_the_first_tick_every_row_that_is_not_done_lags(meter, instance):
    instance.cursor = None
    progress = meter.measure().progress
    assert (progress.last_processed_id, progress.lag_rows, progress.pending_rows) == (None, 5, 4)


def test_rows_below_the_operators_floor_are_left_alone(meter, site, instance):
    instance.stands_at(site, None, None, floor=10)
    progress = meter.measure().progress
    assert (progress.pending_rows, progress.lag_rows) == (0, 0)


def test_pending_rows_below_the_floor_are_in_no_count(meter, site, instance):
    instance.stands_at(site, 4, 10, floor=8)
    assert meter.measure().progress.pending_rows == 2
    assert meter.count(8, 8).rows == {"done": 4, "pending": 2}


def test_what_the_sensors_look_has_seen_move_is_no_stall_for_the_metrics(meter, site, clock):
    meter.measure()
    clock.pass_by(300)
    remember_progress(site.state_engine, ProgressMemory(4, datetime.fromtimestamp(clock.now, UTC)))
    clock.pass_by(100)
    assert stalled(meter) == 100


def test_a_lag_that_reaches_the_limit_is_left_to_the_census(meter, monkeypatch):
    for limit, is_counted in ((6, True), (5, False), (4, False)):
        monkeypatch.setattr("extraction_dagster.watch.progress.MOST_COUNTED", limit)
        assert meter.measure().progress.is_lag_counted is is_counted


def test_the_greatest_id_of_all_has_no_row_above(meter, site, instance):
    instance.stands_at(site, 2**63 - 1)
    assert meter.measure().progress.lag_rows == 0


def test_a_census_counts_every_row_frame_point_and_error(meter, clock):
    census = meter.count(4, None)
    assert (census.taken_at, census.rows) == (clock.now, {"done": 4, "pending": 4})
    assert (census.lag_rows, census.frames, census.points) == (5, 12, 12)
    assert census.errors == {("decode", "VideoDecodeError"): 1, ("fetch", "SchemeError"): 1}
    assert (census.collection_points, census.collection_is_up) == (0, True)  # the first run makes the collection


def test_a_census_is_used_until_it_is_old_by_other_processes_too(meter, site, instance, clock):
    first = meter.count(4, None)
    clock.pass_by(59)
    another = Meter(site.settings, instance)
    assert another.count(4, None) == first
    clock.pass_by(1)
    assert another.count(4, None).taken_at == clock.now
    another.close()


def test_a_census_that_took_long_is_taken_seldom(census):
    assert census_seconds(census) == 75  # of 1.5 s
    assert census_seconds(replace(census, seconds=0.01)) == 60


def test_the_table_may_be_read_only_to_us(database, instance, tmp_path):
    database.create(ids=range(1, 4))
    state = SecretStr(f"sqlite:///{tmp_path}/state.db")
    meter = Meter(database.settings(source_read_only=True, state_url=state), instance)
    assert meter.measure().progress.lag_rows == 3
    assert meter.count(None, None).rows == {"done": 0, "pending": 3}
    meter.close()


def points(number):
    ids = [str(UUID(int=index)) for index in range(1, number + 1)]
    vectors = np.ones((number, 4), np.float16) / 2
    payload = {"record_id": 1, "generation": "g", "platform": None, "created_at": "2025-06-01T00:00:00Z"}
    return PointBatch(ids, vectors, [payload] * number)


@pytest.fixture
def sqlite_meter(sqlite_database, instance):
    sqlite_database.create(ids=range(1, 4))
    meter = Meter(sqlite_database.settings(), instance)
    yield meter, meter._settings
    meter.close()


def test_the_collections_points_are_counted_and_a_store_that_a_run_holds_is_not_down(sqlite_meter, clock):
    meter, settings = sqlite_meter
    with open_point_store(settings) as store:
        store.ensure_collection(CollectionSpec(settings.collection_name, 4, "e1"))
        store.upsert(points(5))
    first = meter.count(None, None)
    assert (first.collection_points, first.collection_counted_at, first.collection_is_up) == (5, clock.now, True)
    counted_at = clock.now
    clock.pass_by(100)
    with open_point_store(settings) as store:
        store.open_collection(settings.collection_name)
        held = meter.count(None, None)
    assert (held.taken_at, held.collection_points) == (clock.now, 5)
    assert (held.collection_counted_at, held.collection_is_up) == (counted_at, True)


def test_a_qdrant_server_that_does_not_answer_is_down_and_the_rows_are_counted_all_the_same(sqlite_database, instance):
    sqlite_database.create(ids=range(1, 4))
    server = {"qdrant_url": "http://127.0.0.1:9", "qdrant_grpc_port": 9, "qdrant_timeout_seconds": 1}
    meter = Meter(sqlite_database.settings(**server), instance)
    census = meter.count(None, None)
    assert (census.collection_points, census.collection_is_up) == (None, False)
    assert census.rows["pending"] == 3
    meter.close()


def test_dagsters_storage_may_be_down_and_the_table_is_still_read(meter, instance, caplog):
    instance.fault = OSError("no storage\nat a line")
    figures = meter.measure()
    assert figures.parts == {"dagster": False, "table": True}
    assert (figures.instance, figures.progress) == (None, None)
    meter.measure()
    assert [record.getMessage() for record in caplog.records] == [
        "The figures of part 'dagster' can't be read: no storage"
    ]  # once, not at each scrape
    instance.fault = None
    assert meter.measure().parts == {"dagster": True, "table": True, "cursor": True}


def test_while_dagsters_storage_is_down_the_time_of_a_stall_goes_on(meter, instance, clock):
    meter.measure()
    clock.pass_by(100)
    instance.fault = OSError("no storage")
    meter.measure()
    clock.pass_by(100)
    instance.fault = None
    assert stalled(meter) == 200


def test_a_database_that_is_down_is_said_and_found_again_when_it_returns(meter, database, site):
    meter.measure()
    site.close()
    database.execute("ALTER TABLE insta_content RENAME TO away")
    figures = meter.measure()
    assert figures.parts == {"dagster": True, "table": False}
    assert figures.progress is None
    database.execute("ALTER TABLE away RENAME TO insta_content")
    assert meter.measure().parts == {"dagster": True, "table": True, "cursor": True}


def test_a_cursor_that_cannot_be_used_is_said(meter, instance):
    instance.cursor = json.dumps({"v": 2})
    figures = meter.measure()
    assert figures.parts == {"dagster": True, "table": True, "cursor": False}
    assert figures.progress is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, MirrorFigures("missing", None)),
        ('{"last_processed_id": 4, "updated_at": "2025-06-01T12:00:00Z"}', MirrorFigures("ok", 4)),
        ('{"last_processed_id": 3, "updated_at": "2025-06-01T12:00:00Z"}', MirrorFigures("behind", 3)),
        ('{"last_processed_id": null, "updated_at": "2025-06-01T12:00:00Z"}', MirrorFigures("behind", None)),
        ('{"last_processed_id": 9, "updated_at": "2025-06-01T12:00:00Z"}', MirrorFigures("ahead", 9)),
        ("{", MirrorFigures("corrupt", None)),
    ],
)
def test_the_mirror_is_compared_with_the_cursor(sqlite_database, instance, tmp_path, text, expected):
    sqlite_database.create(ids=range(1, 11))
    catalog = sqlite_database.catalog(checkpoint_mirror="json", checkpoint_path=tmp_path / "mirror")
    instance.stands_at(catalog, 4, 10)
    if text is not None:
        (tmp_path / "mirror").write_text(text)
    meter = Meter(catalog.settings, instance)
    figures = meter.measure()
    assert figures.mirror == expected
    assert figures.parts["mirror"]
    meter.close()
    catalog.close()


def test_a_mirror_that_cannot_be_reached_is_down(sqlite_database, instance, tmp_path):
    sqlite_database.create(ids=range(1, 11))
    (tmp_path / "mirror").mkdir()
    catalog = sqlite_database.catalog(checkpoint_mirror="json", checkpoint_path=tmp_path / "mirror")
    instance.stands_at(catalog, 4, 10)
    meter = Meter(catalog.settings, instance)
    figures = meter.measure()
    assert (figures.mirror, figures.parts["mirror"]) == (MirrorFigures("unreachable", None), False)
    assert figures.progress.lag_rows == 6
    meter.close()
    catalog.close()


def test_what_is_kept_survives_the_way_there_and_back_and_nonsense_is_forgotten(site, census):
    engine = site.state_engine
    assert recall_census(engine) is None
    remember_census(engine, census)
    assert recall_census(engine) == census
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE extraction_meta SET value = '[]' WHERE key = 'metrics_census'"))
    assert recall_census(engine) is None
