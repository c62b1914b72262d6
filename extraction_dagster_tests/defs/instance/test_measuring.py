"""Dagster's part of the metrics, asked of a real instance."""

import time

import dagster as dg
import pytest
from dagster._core.scheduler.instigation import InstigatorStatus, SensorInstigatorData
from dagster._core.test_utils import create_run_for_test
from dagster._daemon.types import DaemonHeartbeat

from extraction_dagster.defs.instance import measuring
from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.measuring import InstanceMeter, read_instance, recent_rates
from extraction_dagster.errors.runs import InstanceError

RUN = dg.DagsterRunStatus


@pytest.fixture
def instance():
    with dg.DagsterInstance.local_temp() as instance:  # one in memory keeps no sensors
        yield instance


def make_run(instance, status):
    create_run_for_test(instance, job_name="extraction_job", status=status)


def materialize(instance, asset, **metadata):
    instance.report_runless_asset_event(dg.AssetMaterialization(asset, metadata=metadata))


def test_an_instance_that_has_seen_nothing_says_so(instance):
    found = read_instance(instance)
    assert (found.cursor, found.last_tick_at, found.is_switched_on) == (None, None, True)
    assert found.runs == {"queued": 0, "started": 0, "canceling": 0}
    assert found.ended_runs == {"success": 0, "failure": 0, "canceled": 0}
    assert found.rates == {"videos": 0.0, "frames": 0.0, "points": 0.0}
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


def test_rates_are_what_was_made_within_a_quarter_of_an_hour(instance):
    materialize(instance, "video_frames", videos=10, frames=450)
    materialize(instance, "qdrant_points", videos=9, points=360)
    materialize(instance, "qdrant_points", videos=9, points=90, seconds=1.5)
    materialize(instance, "frame_embeddings", videos=99, frames=99)
    assert recent_rates(instance, now=time.time()) == {"videos": 18 / 900, "frames": 0.5, "points": 0.5}
    assert recent_rates(instance, now=time.time() + 901) == {"videos": 0.0, "frames": 0.0, "points": 0.0}


def test_of_very_many_runs_the_newest_say_the_rate(instance, monkeypatch):
    monkeypatch.setattr(measuring, "_MOST_EVENTS", 2)
    for _ in range(3):
        materialize(instance, "qdrant_points", videos=100, points=500)
    assert recent_rates(instance, now=time.time() + 100)["videos"] == pytest.approx(2, rel=0.1)


def test_metadata_of_another_kind_is_no_number(instance):
    materialize(instance, "qdrant_points", videos="many", points=dg.MetadataValue.null())
    assert recent_rates(instance, now=time.time())["videos"] == 0


def test_an_instance_that_cannot_be_opened_is_tried_again(settings, monkeypatch, tmp_path):
    meter = InstanceMeter(settings())
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(InstanceError, match="it is no folder"):
        meter()
    (tmp_path / "nowhere").mkdir()
    assert meter().cursor is None
    meter.close()
