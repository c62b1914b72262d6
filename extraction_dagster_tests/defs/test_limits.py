"""How much works at once, and what works by itself, in an instance as `extraction init` makes it."""

import dagster as dg
import pytest
from dagster._core.instance.config import PoolGranularity

from extraction_dagster.defs.instance.glance import template


@pytest.fixture
def instance(tmp_path, monkeypatch):
    monkeypatch.setenv("EXTRACTION_HOME", str(tmp_path))
    (tmp_path / "dagster.yaml").write_text(template("dagster.yaml"))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance


def test_each_step_has_a_pool_of_its_own_and_one_of_them_works_at_a_time(instance):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    pools = {name: defs.get_assets_def(name).op.pool for name in ("video_frames", "frame_embeddings", "qdrant_points")}
    assert pools == {"video_frames": "decode", "frame_embeddings": "gpu", "qdrant_points": "qdrant"}
    limits = instance.get_concurrency_config()
    assert (limits.pool_config.default_pool_limit, limits.pool_config.pool_granularity) == (1, PoolGranularity.OP)


def test_three_runs_leave_the_queue_and_the_others_wait(instance):
    assert instance.get_concurrency_config().run_queue_config.max_concurrent_runs == 3


def test_sensors_work_by_themselves_schedules_and_notices_once_they_are_switched_on():
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    shown = {item.name: item.default_status.value for item in (*defs.sensors, *defs.schedules)}
    assert shown == {
        "extraction_sensor": "RUNNING",
        "progress_sensor": "RUNNING",
        "run_failure_notices": "STOPPED",
        "history_sensor": "RUNNING",
        "reconcile_schedule": "STOPPED",
    }
