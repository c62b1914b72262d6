"""A look at Dagster's storage says what Dagster says; whatever is otherwise than expected is no answer."""

import logging
import os
import sqlite3
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.assets.graph.asset_graph_subset import AssetGraphSubset
from dagster._core.events import DagsterEvent, StepMaterializationData
from dagster._core.events.log import EventLogEntry
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.scheduler.instigation import InstigatorStatus, InstigatorType
from dagster._core.test_utils import create_run_for_test
from dagster._daemon.types import DaemonHeartbeat

from extraction_dagster.defs.instance import SENSOR_NAME, runs
from extraction_dagster.defs.instance import glance as glance_module
from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.glance import Glance, glance, template
from extraction_dagster.defs.instance.launching import open_instance
from extraction_dagster.defs.instance.opening import ask, opened_when_needed
from extraction_dagster.defs.instance.private_api import new_sensor_state
from extraction_dagster.defs.instance.runs import active_runs, video_rate
from extraction_dagster.settings import load_settings

AT_REST = Glance(None, 0, goes_on=False)
RUN = dg.DagsterRunStatus


@pytest.fixture
def instance(monkeypatch):
    """This project's own instance, made, and without a run."""
    monkeypatch.setenv("DAGSTER_HOME", "")  # what opening sets is taken back
    with open_instance(load_settings()) as instance:
        yield instance


def look(**options):
    return glance(load_settings(), **options)


def materialize(instance, *, seconds_ago, videos):
    made = dg.AssetMaterialization("qdrant_points", metadata={"videos": videos, "rate": 0.5, "note": "x"})
    event = DagsterEvent("ASSET_MATERIALIZATION", "extraction_job", event_specific_data=StepMaterializationData(made))
    instance.store_event(EventLogEntry(None, logging.INFO, "", "", time.time() - seconds_ago, dagster_event=event))


def damage(file, *statements):
    with sqlite3.connect(load_settings().home / "dagster" / file) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def test_an_instance_in_which_nothing_ever_happened_is_at_rest(instance):
    assert look(with_rate=True) == AT_REST
    assert CursorStore(instance).read() is None


def test_the_cursor_is_the_stored_one(instance):
    store = CursorStore(instance)
    for cursor in ('{"v": 1, "note": "ä \\" \\\\"}', None, "x" * 5000):
        store.write(cursor)
        assert look().cursor == store.read() == cursor


@pytest.mark.parametrize("locations", [("another", "extraction_dagster"), ("extraction_dagster", "another")])
def test_of_the_cursors_of_several_locations_that_of_the_workspace_counts(instance, locations):
    for location in locations:
        instance.add_instigator_state(
            new_sensor_state(SENSOR_NAME, module="extraction_dagster.definitions", location=location, cursor=location)
        )
    assert look().cursor == CursorStore(instance).read() == "extraction_dagster"


def test_other_sensors_and_schedules_say_nothing_of_the_cursor(instance):
    other = new_sensor_state("progress_sensor", module="m", location="extraction_dagster", cursor="not this one")
    instance.add_instigator_state(other)
    assert look().cursor is None
    assert instance.all_instigator_state(instigator_type=InstigatorType.SENSOR)[0].status == (
        InstigatorStatus.DECLARED_IN_CODE
    )


def test_runs_that_are_queued_or_work_go_on(instance):
    for number, status in enumerate((RUN.NOT_STARTED, RUN.STARTING, RUN.STARTED, RUN.CANCELING), 1):
        create_run_for_test(instance, job_name="extraction_job", status=status)
        assert look() == Glance(None, number, goes_on=True)
        assert len(active_runs(instance)) == number
    assert set(glance_module._ACTIVE) == {status.value for status in runs._ACTIVE}


def test_runs_that_ended_do_not_go_on(instance):
    for status in (RUN.SUCCESS, RUN.FAILURE, RUN.CANCELED):
        create_run_for_test(instance, job_name="extraction_job", status=status)
    assert look() == AT_REST


def test_a_backfill_that_was_asked_for_goes_on_until_it_is_over(instance):
    backfill = PartitionBackfill.from_asset_graph_subset(
        backfill_id="b1",
        backfill_timestamp=time.time(),
        tags={},
        dynamic_partitions_store=instance,
        asset_graph_subset=AssetGraphSubset(),
        title=None,
        description=None,
        run_config=None,
    )
    instance.add_backfill(backfill)
    assert look().goes_on
    instance.update_backfill(backfill.with_status(BulkActionStatus.COMPLETED_SUCCESS))
    assert look() == AT_REST


def test_a_slot_that_a_run_holds_goes_on(instance):
    instance.event_log_storage.set_concurrency_slots("decode", 1)
    instance.event_log_storage.claim_concurrency_slot("decode", "a-run", "video_frames")
    assert look().goes_on
    instance.event_log_storage.free_concurrency_slots_for_run("a-run")
    assert look() == AT_REST


@pytest.mark.parametrize(("seconds_ago", "goes_on"), [(170, True), (190, False)])
def test_a_daemon_goes_on_for_three_minutes_after_its_last_heartbeat(instance, seconds_ago, goes_on):
    instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - seconds_ago, "SENSOR", "here", None))
    assert look().goes_on is goes_on
    assert CursorStore(instance).is_ticking() is goes_on


@pytest.mark.parametrize(
    ("seconds_ago", "idle", "busy"),
    [
        ((800, 600, 400, 200, 100, 20), 0.6443, 0.6443),  # 515 videos since the first
        ((2000, 700, 500, 300, 100, 10), 0.5722, 0.5722),  # 515 in a quarter of an hour
        ((5000, 4000, 2000), None, 0.0406),  # 203 since the first
        ((10,), None, None),
    ],
)
def test_the_rate_is_that_of_the_metrics(instance, seconds_ago, idle, busy):
    for place, ago in enumerate(seconds_ago):
        materialize(instance, seconds_ago=ago, videos=100 + place)
    for expected in (idle, busy):
        found = look(with_rate=True).videos_per_second
        for rate in (found, video_rate(instance)):
            assert rate == (None if expected is None else pytest.approx(expected, rel=0.02))
        create_run_for_test(instance, job_name="extraction_job", status=RUN.STARTED)
    assert look().videos_per_second is None


def test_postgresql_says_the_same(postgres_url, monkeypatch):
    monkeypatch.setenv("EXTRACTION_POSTGRES_URL", postgres_url)
    monkeypatch.setenv("DAGSTER_HOME", "")
    assert look() is None
    with open_instance(load_settings()) as instance:
        assert look(with_rate=True) == AT_REST
        CursorStore(instance).write('{"v": 1}')
        for ago in (5000, 4000, 2000):
            materialize(instance, seconds_ago=ago, videos=100)
        create_run_for_test(instance, job_name="extraction_job", status=RUN.STARTED)
        assert look(with_rate=True) == Glance('{"v": 1}', 1, goes_on=True, videos_per_second=video_rate(instance))
        assert look().cursor == CursorStore(instance).read()


def test_nothing_is_made_by_looking(tmp_path):
    assert look() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("history/runs.db", "UPDATE alembic_version SET version_num = 'of-another-release'"),
        ("history/runs/index.db", "DROP TABLE pending_steps"),
        ("schedules/schedules.db", "UPDATE instigators SET instigator_body = '{\"origin\": {}}'"),
        ("schedules/schedules.db", "UPDATE instigators SET instigator_body = 'no JSON'"),
        ("history/runs.db", "INSERT INTO daemon_heartbeats (daemon_type, timestamp, body) VALUES ('X', '', '[]')"),
    ],
)
def test_a_storage_that_is_otherwise_than_expected_is_no_answer(instance, file, statement):
    CursorStore(instance).write("{}")
    assert look() is not None
    damage(file, statement)
    assert look() is None


def test_the_rate_of_an_asset_that_was_wiped_is_for_dagster_to_say(instance):
    materialize(instance, seconds_ago=10, videos=100)
    instance.wipe_assets([dg.AssetKey("qdrant_points")])
    assert look(with_rate=True) is None
    assert look() == AT_REST


@pytest.mark.usefixtures("instance")
def test_a_dagster_yaml_of_ones_own_may_differ_in_values(monkeypatch, tmp_path):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    ours = template("dagster.yaml")
    for text, is_known in [
        (ours, True),
        (ours.replace("max_concurrent_runs: 3", "max_concurrent_runs: 9"), True),
        (f"{ours}\nodd_section:\n  key: 1\n", False),
        (ours.replace("class: ExtractionStorage", "class: AnotherStorage"), False),
        ("storage: {sqlite: {base_dir: /tmp}}", False),
        (f"{ours}\nstorage:\n  sqlite: {{}}\n", False),
        ("[", False),
        ("", False),
    ]:
        Path("dagster.yaml").write_text(text)
        assert (look() is not None) is is_known, text


def test_where_a_look_is_no_answer_dagster_is_asked(instance):
    CursorStore(instance).write('{"v": 1}')
    create_run_for_test(instance, job_name="extraction_job", status=RUN.STARTED)
    seen = ask(load_settings())
    assert seen == Glance('{"v": 1}', 1, goes_on=True)
    damage("history/runs/index.db", "UPDATE alembic_version SET version_num = 'of-another-release'")
    assert look() is None
    assert ask(load_settings()) == seen


@pytest.mark.usefixtures("instance")
def test_an_instance_is_opened_once_something_goes_on_and_then_stays_open():
    with opened_when_needed(load_settings()) as late:
        assert late.at_rest() == AT_REST
        assert late.cursor() is None
        assert not late.is_ticking()
        late.store.write("{}")
        assert late.at_rest() is None
        assert late.cursor() == "{}"
    assert os.environ["DAGSTER_HOME"] == str(load_settings().home / "dagster")
