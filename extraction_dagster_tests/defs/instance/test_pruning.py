"""Old runs go, and what the partitions page shows stays; on real storages of Dagster, SQLite and PostgreSQL."""

import warnings
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.test_utils import create_run_for_test

from extraction_dagster.defs.instance.launching import open_instance
from extraction_dagster.defs.instance.pruning import Pruned, prune
from extraction_dagster.defs.partitions import id_ranges
from extraction_dagster.defs.sensors import history_sensor
from extraction_dagster.settings import load_settings

# Dagster itself reads pydantic's old attribute.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")
FRAMES, POINTS = dg.AssetKey("video_frames"), dg.AssetKey("qdrant_points")
CHECK = dg.AssetCheckKey(POINTS, "points_verified")
PROGRESS, PROGRESS_CHECK = dg.AssetKey("extraction_progress"), "watermark_moves"
RANGES = ["1-10", "11-20", "21-30"]


@dg.asset(partitions_def=id_ranges)
def video_frames(context):
    print("decoding")
    return dg.MaterializeResult(metadata={"run": context.run.run_id}, data_version=dg.DataVersion(context.run.run_id))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", dg.PreviewWarning)  # of partitions of a check
    SPEC = dg.AssetCheckSpec(CHECK.name, asset=POINTS, partitions_def=id_ranges)


@dg.asset(partitions_def=id_ranges, deps=[video_frames], check_specs=[SPEC])
def qdrant_points(context):
    if "fails" in context.run.tags:
        raise dg.Failure("the store is down")
    return dg.MaterializeResult(
        metadata={"run": context.run.run_id}, check_results=[dg.AssetCheckResult(passed=True, check_name=CHECK.name)]
    )


JOBS = dg.Definitions(
    assets=[video_frames, qdrant_points],
    jobs=[dg.define_asset_job(name, [FRAMES, POINTS]) for name in ("extraction_job", "anothers_job")],
    executor=dg.in_process_executor,
)


@pytest.fixture(params=["sqlite", "postgresql"])
def instance(request, monkeypatch, tmp_path):
    monkeypatch.setenv("EXTRACTION_HOME", str(tmp_path))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    if request.param == "postgresql":
        monkeypatch.setenv("EXTRACTION_POSTGRES_URL", request.getfixturevalue("postgres_url"))
    with open_instance(load_settings()) as instance:
        yield instance


def run(instance, key, *, job="extraction_job", **tags):
    instance.add_dynamic_partitions("id_ranges", RANGES)
    options = {"partition_key": key, "tags": tags, "raise_on_error": False}
    return JOBS.resolve_job_def(job).execute_in_process(instance=instance, **options).run_id


def shown(instance):
    """What the partitions page shows: the status of each range, its newest materialization, its newest check."""
    found = {}
    for asset in (FRAMES, POINTS):
        statuses = instance.get_status_by_partition(asset, RANGES, id_ranges)
        for key in RANGES:
            newest = instance.fetch_materializations(dg.AssetRecordsFilter(asset, asset_partitions=[key]), limit=1)
            seen = [(item.storage_id, item.asset_materialization) for item in newest.records]
            found[asset, key] = (statuses[key], seen, instance.get_latest_data_version_record(asset, partition_key=key))
    history = instance.event_log_storage.get_asset_check_execution_history(CHECK, limit=50)
    newest_checks = {}
    for record in history:
        newest_checks.setdefault(record.partition, (record.status, record.evaluation))
    return found, newest_checks


def rows(storage, table, run_id):
    connect = storage.index_connection if hasattr(storage, "index_connection") else storage.connect
    with connect() as connection:
        count = sa.text(f"SELECT count(*) FROM {table} WHERE run_id = :run_id")
        return connection.execute(count, {"run_id": run_id}).scalar_one()


def left_of(instance, run_id):
    """Rows of a run by table, and its files."""
    events, runs = instance.event_log_storage, instance.run_storage
    tables = [(events, "event_logs"), (events, "asset_check_executions"), (runs, "runs"), (runs, "run_tags")]
    found = {table: rows(storage, table, run_id) for storage, table in tables}
    folder = load_settings().home / "dagster"
    return found, sorted(path.name for path in folder.rglob(f"*{run_id}*"))


def later(**ago):
    return datetime.now(UTC) + timedelta(seconds=1) - timedelta(**ago)


def test_old_runs_go_and_what_the_partitions_page_shows_stays(instance):
    first, second = run(instance, "1-10"), run(instance, "1-10")
    failed = run(instance, "11-20", fails="yes")
    before = shown(instance)
    assert [before[0][POINTS, key][0].name for key in RANGES[:2]] == ["MATERIALIZED", "FAILED"]

    assert prune(instance, before=later(hours=1)) == Pruned(0, 0, None)
    assert prune(instance, before=later()) == Pruned(2, 0, None)
    assert shown(instance) == before
    none = {"event_logs": 0, "asset_check_executions": 0, "runs": 0, "run_tags": 0}
    assert left_of(instance, first) == (none, [])
    # Of the second, the newest materialization and plan of each of the two assets, and the newest result of the check.
    assert left_of(instance, second) == (none | {"event_logs": 4, "asset_check_executions": 1}, [])
    assert [item.run_id for item in instance.get_runs()] == [failed]
    assert instance.all_logs(failed)

    third = run(instance, "11-20")
    after = shown(instance)
    assert after[0][POINTS, "11-20"][0].name == "MATERIALIZED"
    assert prune(instance, before=later()) == Pruned(2, 0, None)
    assert (shown(instance), left_of(instance, failed)[0]["event_logs"]) == (after, 0)
    assert left_of(instance, third)[0]["runs"] == 0
    fourth = run(instance, "1-10")  # and life goes on
    assert shown(instance)[0][FRAMES, "1-10"][1][0][1].metadata["run"].value == fourth


def test_what_goes_on_and_what_is_anothers_stays(instance):
    kept = [
        run(instance, "1-10", job="anothers_job"),
        run(instance, "1-10", **{"dagster/backfill": "alive"}),
        run(instance, "11-20"),
    ]
    alive = PartitionBackfill("alive", BulkActionStatus.REQUESTED, from_failure=False, tags={}, backfill_timestamp=0.0)
    instance.add_backfill(alive)
    started, waiting = dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.NOT_STARTED
    for status, parent in ((started, kept[2]), (waiting, None)):
        root = (
            {"parent_run_id": parent, "root_run_id": parent, "tags": {"dagster/parent_run_id": parent}}
            if parent
            else {}
        )
        kept.append(create_run_for_test(instance, job_name="extraction_job", status=status, **root).run_id)
    assert prune(instance, before=later()).runs == 0
    assert {item.run_id for item in instance.get_runs()} == set(kept)

    instance.update_backfill(alive.with_status(BulkActionStatus.COMPLETED_SUCCESS))
    assert prune(instance, before=later()).runs == 1


def test_a_look_ends_when_its_time_is_up_and_the_next_goes_on_there(instance):
    kept = run(instance, "1-10", job="anothers_job")
    run(instance, "11-20")
    first = prune(instance, before=later(), most_seconds=0)
    assert first == Pruned(0, 0, kept)
    assert prune(instance, before=later(), after=first.reached) == Pruned(1, 0, None)


def test_reports_of_progress_go_but_for_the_newest(instance):
    for number in range(3):
        for event in (
            dg.AssetMaterialization(PROGRESS, metadata={"lag_rows": number}),
            dg.AssetObservation(PROGRESS, metadata={"lag_rows": number}),
            dg.AssetCheckEvaluation(asset_key=PROGRESS, check_name=PROGRESS_CHECK, passed=True),
        ):
            instance.report_runless_asset_event(event)
    assert prune(instance, before=later()) == Pruned(0, 6, None)
    (made,) = instance.fetch_materializations(PROGRESS, limit=5).records
    (seen,) = instance.fetch_observations(PROGRESS, limit=5).records
    assert made.asset_materialization.metadata["lag_rows"].value == 2
    assert seen.asset_observation.metadata["lag_rows"].value == 2
    check = dg.AssetCheckKey(PROGRESS, PROGRESS_CHECK)
    assert len(instance.event_log_storage.get_asset_check_execution_history(check, limit=5)) == 1


@pytest.mark.parametrize(("kept_for", "said"), [("1h", "0 runs"), ("90", "0 runs"), ("all", "is all: every run stays")])
def test_the_sensor_says_what_it_removed(monkeypatch, tmp_path, kept_for, said):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    monkeypatch.setenv("EXTRACTION_HOME", str(tmp_path))
    monkeypatch.setenv("EXTRACTION_KEEP_RUNS", kept_for)
    with dg.DagsterInstance.local_temp() as instance:
        run(instance, "1-10", job="extraction_job")
        context = dg.build_sensor_context(instance, resources={"extraction": defs.resources["extraction"]})
        ticked = history_sensor.evaluate_tick(context)
        assert said in ticked.skip_message
        assert len(instance.get_runs()) == 1
