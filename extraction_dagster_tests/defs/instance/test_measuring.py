"""Dagster's part of the metrics, asked of a real instance."""

import logging
import time

import dagster as dg
import pytest
from dagster._core.events import DagsterEvent, StepMaterializationData
from dagster._core.events.log import EventLogEntry
from dagster._core.scheduler.instigation import InstigatorStatus, SensorInstigatorData
from dagster._core.test_utils import create_run_for_test
from dagster._daemon.types import DaemonHeartbeat

from extraction_dagster.defs.instance import glance, measuring
from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.measuring import InstanceMeter, read_instance
from extraction_dagster.defs.instance.runs import recent_rates, video_rate
from extraction_dagster.errors.runs import InstanceError

RUN = dg.DagsterRunStatus


@pytest.fixture
def instance():
    with dg.DagsterInstance.local_temp() as instance:  # one in memory keeps no sensors
        yield instance


def make_run(instance, status):
    create_run_for_test(instance, job_name="extraction_job", status=status)


def materialize(instance, asset="qdrant_points", *, seconds_ago=0.0, **metadata):
    """What a step reports at its end; at another time than now."""
    made = dg.AssetMaterialization(asset, metadata=metadata)
    event = DagsterEvent("ASSET_MATERIALIZATION", "extraction_job", event_specific_data=StepMaterializationData(made))
    entry = EventLogEntry(None, logging.INFO, "", "", time.time() - seconds_ago, dagster_event=event)
    instance.store_event(entry)


def test_an_instance_that_has_seen_nothing_says_so(instance):
    found = read_instance(instance)
    assert (found.cursor, found.last_tick_at, found.is_switched_on) == (None, None, True)
    assert found.runs == {"queued": 0, "started": 0, "canceling": 0}
    assert found.ended_runs == {"success": 0, "failure": 0, "canceled": 0}
    assert found.rates == {}
    assert not any(found.daemons.values())


def test_runs_are_counted_by_what_they_do(instance):
    for status in (RUN.NOT_STARTED, RUN.STARTING, RUN.STARTED, RUN.STARTED, RUN.CANCELING):
        make_run(instance, status)
    for status in (RUN.SUCCESS, RUN.FAILURE, RUN.FAILURE, RUN.CANCELED):
        make_run(instance, status)
    found = read_instance(instance)
    assert found.runs == {"queued": 1, "started": 3, "canceling": 1}
    assert found.ended_runs == {"success": 1, "failure": 2, "canceled": 1}


def test_runs_that_ended_long_ago_are_not_recent(instance, monkeypatch):
    make_run(instance, RUN.FAILURE)
    monkeypatch.setattr(measuring, "_RECENT", measuring.timedelta(0))
    time.sleep(0.01)
    assert read_instance(instance).ended_runs["failure"] == 0


def test_the_sensor_is_seen_as_dagster_keeps_it(instance):
    store = CursorStore(instance)
    store.write("{}")
    state = store._state()
    ticked = SensorInstigatorData(cursor="{}", last_tick_timestamp=100.5, last_tick_start_timestamp=200.5)
    instance.update_instigator_state(state.with_data(ticked))
    found = read_instance(instance)
    assert (found.cursor, found.last_tick_at, found.is_switched_on) == ("{}", 200.5, True)
    instance.update_instigator_state(store._state().with_status(InstigatorStatus.STOPPED))
    assert not read_instance(instance).is_switched_on


def test_a_daemon_that_is_silent_for_three_minutes_is_gone(instance):
    instance.add_daemon_heartbeat(DaemonHeartbeat(time.time(), "SENSOR", None, []))
    instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - 200, "SCHEDULER", None, []))
    daemons = read_instance(instance).daemons
    assert (daemons["sensor"], daemons["scheduler"]) == (True, False)


def rates(instance):
    return recent_rates(instance)


def test_rates_are_what_was_made_within_a_quarter_of_an_hour(instance):
    materialize(instance, seconds_ago=1000, videos=500, points=500)
    for number in reversed(range(5)):
        materialize(instance, seconds_ago=100 * number, videos=9, points=90, seconds=1.5)
        materialize(instance, "frame_embeddings", seconds_ago=100 * number, videos=99, frames=99)
    assert rates(instance) == {"videos": 0.05, "points": 0.5}
    assert video_rate(instance) == 0.05


def test_rates_of_the_three_come_from_the_steps_that_make_them(instance):
    for seconds_ago in (100, 0):
        materialize(instance, "video_frames", seconds_ago=seconds_ago, videos=10, frames=450)
        materialize(instance, seconds_ago=seconds_ago, videos=9, points=360)
    assert rates(instance) == pytest.approx({"videos": 0.09, "frames": 4.5, "points": 3.6}, rel=0.05)


def test_where_all_there_is_was_made_just_now_the_first_only_says_since_when(instance):
    for number in reversed(range(6)):
        materialize(instance, seconds_ago=20 * number, videos=10, points=0)
    assert rates(instance)["videos"] == pytest.approx(0.5, rel=0.05)


def test_of_very_many_runs_the_newest_say_the_rate(instance, monkeypatch):
    monkeypatch.setattr(glance, "_MOST_EVENTS", 6)
    for number in reversed(range(8)):
        materialize(instance, seconds_ago=20 * number, videos=10, points=0)
    assert rates(instance)["videos"] == pytest.approx(0.5, rel=0.05)


def test_ranges_that_take_longer_than_the_quarter_have_a_rate_while_they_are_at_work(instance):
    for number in range(6, 0, -1):
        materialize(instance, seconds_ago=2000 * number, videos=1000, points=5000)
    assert rates(instance) == {}
    make_run(instance, RUN.STARTED)
    assert rates(instance) == pytest.approx({"videos": 0.4, "points": 2.0}, rel=0.05)


def test_one_materialization_alone_says_no_rate(instance):
    materialize(instance, videos=10, points=50)
    assert (rates(instance), video_rate(instance)) == ({}, None)


def test_metadata_of_another_type_is_no_number(instance):
    for _ in range(2):
        materialize(instance, videos="many", points=dg.MetadataValue.null())
    assert rates(instance) == {"videos": 0, "points": 0}


def test_an_instance_that_cannot_be_opened_is_tried_again(settings, monkeypatch, tmp_path):
    meter = InstanceMeter(settings())
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(InstanceError, match="it is no folder"):
        meter()
    (tmp_path / "nowhere").mkdir()
    assert meter().cursor is None
    meter.close()
