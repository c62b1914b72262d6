"""`extraction_progress`: charted without a run, fresh while things move, on both kinds of Dagster's storage."""

import asyncio
import json
import logging
import time
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
from dagster._core.definitions import freshness_evaluator
from dagster._core.events import DagsterEvent, StepMaterializationData
from dagster._core.events.log import EventLogEntry
from dagster._core.storage.dagster_run import DagsterRunStatus
from dagster._core.test_utils import create_run_for_test, create_test_daemon_workspace_context
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster._daemon.freshness import FreshnessDaemon
from dagster._daemon.sensor import execute_sensor_iteration
from dagster._time import get_current_timestamp
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from typer.testing import CliRunner

from extraction_dagster.cli.main import app
from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.launching import open_instance, template
from extraction_dagster.defs.progress import extraction_progress, progress_events, report_progress
from extraction_dagster.records import Failure, IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import Fingerprints, open_catalog
from extraction_dagster.ticks.cursor import CursorState

# Dagster itself reads pydantic's old attribute.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")

MADE_WITH = Fingerprints(frames="f", embedding="e")
KEY = dg.AssetKey("extraction_progress")
CHECK = dg.AssetCheckKey(KEY, "watermark_moves")
START = datetime.now(UTC) + timedelta(days=1)  # after whatever the ledger writes down


@pytest.fixture(params=["sqlite", "postgresql"])
def instance(request, world, monkeypatch):  # noqa: ARG001 - the instance of the world's folder
    """The instance that our dagster.yaml makes, with its runs and events on either database."""
    if request.param == "postgresql":
        monkeypatch.setenv("EXTRACTION_POSTGRES_URL", request.getfixturevalue("postgres_url"))
    with open_instance(load_settings()) as instance:
        yield instance


def move_watermark(instance, catalog, last_processed_id, frontier_id):
    state = CursorState(catalog.source.identity, last_processed_id, frontier_id)
    CursorStore(instance).write(state.to_json())


def finish(*ids):
    with open_catalog(load_settings()) as catalog:
        plan = catalog.plan(IdRange(1, 100), MADE_WITH)
        catalog.mark_extracted(plan, dict.fromkeys(ids, 1), "f")
        catalog.mark_done(plan, dict.fromkeys(ids, 1), MADE_WITH)


def look(instance, *, minutes):
    """What the sensor would report at a time of the test's own clock; it is reported as the daemon does it."""
    with open_catalog(load_settings()) as catalog:
        events = progress_events(instance, catalog, now=START + timedelta(minutes=minutes))
    for event in events:
        instance.report_runless_asset_event(event)
    return [type(event).__name__.removeprefix("Asset") for event in events]


def verdicts(instance):
    history = instance.event_log_storage.get_asset_check_execution_history(CHECK, limit=50)
    return [(record.evaluation.passed, record.evaluation.description) for record in reversed(history)]


def test_figures_are_charted_without_any_run(instance):
    assert look(instance, minutes=0) == ["Materialization", "CheckEvaluation"]
    (record,) = instance.fetch_materializations(KEY, limit=5).records
    shown = {name: value.value for name, value in record.asset_materialization.metadata.items()}
    assert shown == {
        "newest_id": 4,
        "lag_rows": 4,
        "pending_rows": 4,
        "waiting_rows": 0,
        "failed_records": 0,
        "parked_records": 0,
        "active_runs": 0,
    }
    assert verdicts(instance) == [
        (
            True,
            f"4 rows are pending (no record is done yet), and the last sign of work was at {START:%Y-%m-%d %H:%M} UTC.",
        )
    ]
    assert instance.get_runs() == []


def test_what_does_not_change_is_not_reported_again_but_now_and_then(instance):
    finish(1, 2, 3, 4)
    assert look(instance, minutes=0) == ["Materialization", "CheckEvaluation"]
    assert [look(instance, minutes=minutes) for minutes in (5, 10, 14)] == [[], [], []]
    assert look(instance, minutes=15) == ["Materialization", "CheckEvaluation"]
    assert verdicts(instance)[-1] == (True, "No row is pending (no record is done yet).")


def test_while_rows_wait_and_nothing_moves_it_is_observed_only_and_the_check_fails_in_time(instance):
    with open_catalog(load_settings()) as catalog:
        move_watermark(instance, catalog, None, 4)
        assert look(instance, minutes=0) == ["Materialization", "CheckEvaluation"]
        assert look(instance, minutes=20) == ["Observation", "CheckEvaluation"]
        assert look(instance, minutes=60) == ["Observation", "CheckEvaluation"]
        assert [passed for passed, _ in verdicts(instance)] == [True, True, False]
        assert "more than 3600 s ago. Look at the newest runs" in verdicts(instance)[-1][1]
        assert len(instance.fetch_materializations(KEY, limit=5).records) == 1
        assert len(instance.fetch_observations(KEY, limit=5).records) == 2

        finish(1, 2)
        move_watermark(instance, catalog, 2, 4)
        assert look(instance, minutes=65) == ["Materialization", "CheckEvaluation"]
    assert verdicts(instance)[-1][0]
    assert "at ID 2" in verdicts(instance)[-1][1]


def test_runs_and_rates_are_among_the_figures(instance):
    create_run_for_test(instance, job_name="extraction_job", status=DagsterRunStatus.STARTED)
    for videos in (10, 3000):
        instance.report_runless_asset_event(dg.AssetMaterialization("qdrant_points", metadata={"videos": videos}))
    look(instance, minutes=0)
    (record,) = instance.fetch_materializations(KEY, limit=1).records
    metadata = record.asset_materialization.metadata
    assert metadata["active_runs"].value == 1
    assert metadata["videos_per_second"].value > 0
    assert metadata["eta_seconds"].value == round(4 / metadata["videos_per_second"].value)


def test_a_process_without_a_daemon_reports_no_more_often_than_the_sensor_would(instance):
    settings = load_settings()
    with open_catalog(settings) as catalog:
        move_watermark(instance, catalog, None, 4)
    report_progress(instance, settings)
    finish(1)
    report_progress(instance, settings)
    assert len(instance.fetch_materializations(KEY, limit=5).records) == 1
    report_progress(instance, settings, at_once=True)
    assert len(instance.fetch_materializations(KEY, limit=5).records) == 2


def test_the_check_can_be_run_by_hand(instance):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment
    from extraction_dagster.defs.progress import watermark_moves  # noqa: PLC0415
    from extraction_dagster.defs.resources import Extraction  # noqa: PLC0415

    job = dg.define_asset_job("look", selection=dg.AssetSelection.checks(watermark_moves))
    alone = dg.Definitions(
        assets=[extraction_progress],
        asset_checks=[watermark_moves],
        jobs=[job],
        resources={"extraction": Extraction()},
    )
    (found,) = alone.resolve_job_def("look").execute_in_process(instance=instance).get_asset_check_evaluations()
    assert found.passed
    assert {name: value.value for name, value in found.metadata.items()} == {
        "pending_rows": 4,
        "seconds_without_work": 0,
    }
    assert defs.resolve_sensor_def("progress_sensor").default_status == dg.DefaultSensorStatus.RUNNING


def made_lately(instance):
    """Ten videos 1000 s ago, and one in five seconds within the last quarter of an hour."""
    for seconds_ago, videos in ((1000, 10), *((100 * number, 36) for number in range(5))):
        made = dg.AssetMaterialization("qdrant_points", metadata={"videos": videos})
        data = StepMaterializationData(made)
        event = DagsterEvent("ASSET_MATERIALIZATION", "extraction_job", event_specific_data=data)
        moment = time.time() - seconds_ago
        instance.store_event(EventLogEntry(None, logging.INFO, "", "", moment, dagster_event=event))


def test_the_command_the_chart_and_prometheus_show_the_same_numbers_with_a_floor_set(instance):
    made_lately(instance)
    finish(3)
    with open_catalog(load_settings()) as catalog:
        failure = Failure(4, "", "decode", "VideoDecodeError", "broken", permanent=True)
        catalog.record_failures(catalog.plan(IdRange(4, 4), MADE_WITH), [failure], run_id="r")
        state = CursorState(catalog.source.identity, frontier_id=4, floor_id=1)
        CursorStore(instance).write(state.to_json())
    look(instance, minutes=0)
    (record,) = instance.fetch_materializations(KEY, limit=1).records
    chart = {name: value.value for name, value in record.asset_materialization.metadata.items()}
    status, prometheus = (CliRunner().invoke(app, command).stdout for command in (["status", "--json"], ["metrics"]))
    status = json.loads(status)
    metrics = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(prometheus)
        for sample in family.samples
    }
    # Row 1 is below the floor and 3 is done; 2 is pending, 4 is parked.
    assert status["pending"] == chart["pending_rows"] == metrics["extraction_due_rows",] == 1
    assert metrics["extraction_rows", "pending"] == 1
    assert status["lag_rows"] == chart["lag_rows"] == metrics["extraction_lag_rows",] == 1  # neither done nor parked
    assert status["floor_id"] == chart["floor_id"] == metrics["extraction_floor_id",] == 1
    assert status["videos_per_second"] == chart["videos_per_second"] == metrics["extraction_videos_per_second",] == 0.2
    assert status["eta_seconds"] == chart["eta_seconds"] == 5


@pytest.mark.slow
def test_the_daemon_reports_it_and_says_whether_it_is_fresh(instance, world, monkeypatch):
    (world.home / "workspace.yaml").write_text(template("workspace.yaml"))
    target = WorkspaceFileTarget([str(world.home / "workspace.yaml")])

    def state(context):
        (outcome,) = (node for node in context.create_request_context().asset_graph.asset_nodes if node.key == KEY)
        daemon = FreshnessDaemon()
        found = daemon._compute_asset_freshness_state(context.create_request_context(), outcome)
        return asyncio.run(found).value

    with create_test_daemon_workspace_context(target, instance) as context:
        assert state(context) == "UNKNOWN"
        list(execute_sensor_iteration(context, logging.getLogger("test"), None, None))
        assert len(instance.fetch_materializations(KEY, limit=5).records) == 1
        assert [passed for passed, _ in verdicts(instance)] == [True]
        assert state(context) == "PASS"
        for seconds, expected in ((1900, "WARN"), (3700, "FAIL")):
            later = get_current_timestamp() + seconds
            monkeypatch.setattr(freshness_evaluator, "get_current_timestamp", lambda later=later: later)
            assert state(context) == expected
        (state_of_sensor,) = (
            item for item in instance.all_instigator_state() if item.instigator_name == "progress_sensor"
        )
        (tick,) = instance.get_ticks(state_of_sensor.instigator_origin_id, state_of_sensor.selector_id)
        assert tick.skip_reason.startswith("4 rows are pending (no record is done yet)")
        code_servers = context._grpc_server_registry
    code_servers.wait_for_processes()
