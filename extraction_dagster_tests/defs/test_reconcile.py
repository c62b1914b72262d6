"""The reconcile job ends red while store and table differ, and repairs when it is told to."""

import sqlite3

import dagster as dg
import numpy as np
import pytest

from extraction_dagster.records import EmbeddingBatch, VideoRow
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.embed.models.registry import embedding_fingerprint
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.stage import replace_records

# Dagster itself reads pydantic's old attribute.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A table with records 1 and 2, and a store with a point of record 1 and two of record 7, which is in no table."""
    monkeypatch.setenv("EXTRACTION_HOME", str(tmp_path))
    with sqlite3.connect(tmp_path / "source.db") as connection:
        connection.execute(
            "CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path, is_extracted BOOLEAN DEFAULT 0, "
            "is_embedded BOOLEAN DEFAULT 0)"
        )
        connection.execute("INSERT INTO insta_content (id, path) VALUES (1, 'a.mp4'), (2, 'b.mp4')")
    ids, numbers = np.array([1, 7, 7], np.int64), np.array([0, 0, 1], np.int64)
    frames = EmbeddingBatch(np.eye(3, 4, dtype=np.float16), ids, numbers, numbers / 1.0)
    with EdgeStore(tmp_path / "qdrant") as store:
        store.ensure_collection(CollectionSpec("video_frames", 4, embedding_fingerprint(load_settings())))
        rows = {key: VideoRow(key, "g.mp4") for key in (1, 7)}
        replace_records(store, frames, rows=rows, generations={1: "a", 7: "a"})
    return tmp_path


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def run(instance, **options):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    result = defs.resolve_job_def("reconcile_job").execute_in_process(
        instance=instance, raise_on_error=False, **options
    )
    (evaluation,) = result.get_asset_check_evaluations()
    return result.success, evaluation


def num_points(home):
    with EdgeStore(home / "qdrant") as store:
        store.open_collection("video_frames")
        return store.count()


def test_the_job_ends_red_on_a_difference_and_names_it(home, instance):
    success, evaluation = run(instance)
    assert (success, evaluation.passed) == (False, False)
    assert (evaluation.asset_key, evaluation.check_name) == (dg.AssetKey("qdrant_points"), "points_agree_with_table")
    assert evaluation.description.startswith("Of 0 records with 0 points: 2 points gone (1 records). 1 records wait,")
    table = evaluation.metadata["differences"]
    assert [record.data for record in table.records] == [{"record_id": 7, "lost": None, "stale": None, "gone": 2}]
    assert num_points(home) == 3


def repair(instance, **config):
    op = "qdrant_points_points_agree_with_table"
    return run(instance, run_config={"ops": {op: {"config": {"repair": True, **config}}}})


def test_what_waits_is_told_and_is_no_failure_and_what_is_held_back_is_one_until_it_is_forced(
    home, instance, monkeypatch
):
    success, evaluation = repair(instance)
    assert (success, evaluation.passed, evaluation.metadata["gone_waiting_records"].value) == (True, True, 1)
    assert "wait, the first of them since" in evaluation.description
    monkeypatch.setenv("EXTRACTION_PURGE_AFTER_SECONDS", "0")
    monkeypatch.setenv("EXTRACTION_PURGE_SHARE", "0")
    success, evaluation = repair(instance)
    assert (success, evaluation.passed, evaluation.metadata["gone_held_back_records"].value) == (False, False, 1)
    assert "1 of 2 known records are gone, more than EXTRACTION_PURGE_SHARE (0)" in evaluation.description
    assert num_points(home) == 3
    success, evaluation = repair(instance, force=True)
    assert (success, evaluation.metadata["removed_points"].value) == (True, 2)
    assert num_points(home) == 1


def test_the_schedule_repairs_and_is_off_until_it_is_switched_on(home, instance, monkeypatch):
    monkeypatch.setenv("EXTRACTION_PURGE_AFTER_SECONDS", "0")
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    schedule = defs.resolve_schedule_def("reconcile_schedule")
    assert (schedule.default_status, schedule.cron_schedule) == (dg.DefaultScheduleStatus.STOPPED, "0 4 * * *")
    (request,) = schedule.evaluate_tick(dg.build_schedule_context(instance)).run_requests
    success, evaluation = run(instance, run_config=request.run_config)
    assert (success, evaluation.passed) == (True, True)
    assert evaluation.metadata["removed_points"].value == 2
    assert num_points(home) == 1
    success, evaluation = run(instance)
    assert evaluation.description == "The collection agrees with the table: 0 records, 0 points."


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("key", "passed"), [("1-5", True), ("5-9", False)])
def test_in_a_run_of_one_range_only_that_range_is_compared(instance, key, passed):
    instance.add_dynamic_partitions("id_ranges", [key])
    success, evaluation = run(instance, tags={"dagster/partition": key})
    assert (success, evaluation.passed) == (passed, passed)


def test_the_job_of_a_range_does_not_compare_everything():
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    nodes = [node.name for node in defs.resolve_job_def("extraction_job").nodes]
    assert sorted(nodes) == ["frame_embeddings", "qdrant_points", "video_frames"]
