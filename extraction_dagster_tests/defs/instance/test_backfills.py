"""Backfills planned over a span, handed to Dagster's daemon, cancelled; on a real instance and a real table."""

import time
import uuid

import dagster as dg
import pytest
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.remote_origin import ManagedGrpcPythonEnvCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.test_utils import create_run_for_test
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._daemon.types import DaemonHeartbeat

from extraction_dagster.defs.instance import runs as runs_module
from extraction_dagster.defs.instance.backfills import (
    BackfillPlan,
    BackfillProgress,
    Backfills,
    Processed,
    process_here,
)
from extraction_dagster.defs.instance.launching import FinishedRun
from extraction_dagster.defs.instance.runs import ASSETS, InstanceRuns
from extraction_dagster.defs.partitions import add_ranges
from extraction_dagster.errors.runs import BackfillUnknownError, RangeBusyError
from extraction_dagster.records import IdRange

# Loading the definitions: Dagster looks at a resource's fields as it did with an older pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")


def ranges(*keys):
    return tuple(IdRange.parse(key) for key in keys)


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def on_disk():
    """An instance that needs daemons; one in memory does not."""
    with dg.DagsterInstance.local_temp() as instance:
        yield instance


@pytest.fixture
def catalog(sqlite_database):
    """Twelve rows, in batches of three."""
    sqlite_database.create(ids=range(1, 13))
    catalog = sqlite_database.catalog(batch_size=3)
    yield catalog
    catalog.close()


def plan(instance, catalog, span="1-50000", *, assets=ASSETS, stale_only=False):
    return Backfills(instance).plan(catalog, IdRange.parse(span), assets=assets, stale_only=stale_only)


def make_run(instance, key, status=dg.DagsterRunStatus.STARTED, **tags):
    tags = {"dagster/partition": key, **{f"dagster/{name}": value for name, value in tags.items()}}
    return create_run_for_test(instance, job_name="extraction_job", status=status, tags=tags)


def beat(instance, *, seconds_ago=0):
    """Say what living daemons say of themselves."""
    for kind in ("BACKFILL", "QUEUED_RUN_COORDINATOR"):
        instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - seconds_ago, kind, None, []))


def test_a_span_nobody_knows_is_cut_into_new_ranges_and_one_that_is_known_is_used(instance, catalog):
    add_ranges(instance, ranges("4-6"))
    instance.add_dynamic_partitions("id_ranges", ["by hand"])
    assert plan(instance, catalog) == BackfillPlan(
        span=IdRange(1, 50000),
        assets=("video_frames", "frame_embeddings", "qdrant_points"),
        ranges=ranges("1-3", "4-6", "7-9", "10-12"),
        new=ranges("1-3", "7-9", "10-12"),
        busy={},
        fresh=(),
    )


def test_assets_are_in_data_order_however_they_were_named(instance, catalog):
    assert plan(instance, catalog, assets=["qdrant_points", "frame_embeddings"]).assets == (
        "frame_embeddings",
        "qdrant_points",
    )


def test_a_range_that_a_run_works_on_is_left_out_and_the_run_named(instance, catalog):
    add_ranges(instance, ranges("1-3", "4-6", "7-9"))
    run = make_run(instance, "4-6")
    wide = make_run(instance, "7-1000")
    make_run(instance, "1-3", dg.DagsterRunStatus.FAILURE)
    found = plan(instance, catalog)
    assert found.busy == {
        IdRange(4, 6): f"run {run.run_id}",
        IdRange(7, 9): f"run {wide.run_id}",
        IdRange(10, 12): f"run {wide.run_id}",
    }
    assert (found.ranges, found.new) == (ranges("1-3"), ())


def test_a_run_on_a_part_of_a_range_does_not_keep_the_rest_from_being_done(instance, catalog):
    make_run(instance, "2-2")
    assert plan(instance, catalog, "1-3").ranges == ranges("1-3")


def test_stale_only_leaves_out_what_is_up_to_date(instance, catalog, monkeypatch):
    monkeypatch.setattr("extraction_dagster.defs.instance.backfills.stale_ranges", lambda *_: {IdRange(4, 6)})
    found = plan(instance, catalog, stale_only=True)
    assert (found.ranges, found.fresh) == (ranges("4-6"), ranges("1-3", "7-9", "10-12"))


def test_stale_only_asks_the_projects_own_assets(instance, catalog):
    assert plan(instance, catalog, stale_only=True).fresh == ()  # nothing was ever materialized


def test_a_backfill_is_dagsters_own_and_its_ranges_are_registered(instance, catalog):
    settings = catalog.settings.model_copy(update={"max_run_seconds": 77})
    backfills = Backfills(instance)
    backfill_id = backfills.start(plan(instance, catalog, assets=ASSETS[1:]), settings)
    assert set(instance.get_dynamic_partitions("id_ranges")) == {"1-3", "4-6", "7-9", "10-12"}
    (backfill,) = instance.get_backfills()
    assert (backfill.backfill_id, backfill.status) == (backfill_id, BulkActionStatus.REQUESTED)
    assert backfill.tags == {"dagster/max_runtime_seconds": "77", "dagster/priority": "-1"}
    assert backfill.title == "extraction backfill 1-50000"
    assert [key.to_user_string() for key in backfill.asset_selection] == ["frame_embeddings", "qdrant_points"]
    targets = backfill.asset_backfill_data.target_subset.partitions_subsets_by_asset_key
    assert {key.to_user_string(): set(subset.get_partition_keys()) for key, subset in targets.items()} == {
        "frame_embeddings": {"1-3", "4-6", "7-9", "10-12"},
        "qdrant_points": {"1-3", "4-6", "7-9", "10-12"},
    }
    assert backfills.progress(backfill_id) == BackfillProgress("running", 4, 0, (), queued=0, started=0)


@pytest.mark.parametrize(
    ("assets", "amounts"),
    [(ASSETS, '{"cpu": "4", "nvidia.com/gpu": "1"}'), (ASSETS[2:], '{"cpu": "4"}')],
)
def test_runs_of_a_backfill_get_the_pods_that_the_settings_ask_for(instance, catalog, assets, amounts):
    settings = catalog.settings.model_copy(update={"run_cpu": "4", "run_gpus": 1})
    backfill_id = Backfills(instance).start(plan(instance, catalog, assets=assets), settings)
    expected = f'{{"container_config": {{"resources": {{"limits": {amounts}, "requests": {amounts}}}}}}}'
    assert instance.get_backfill(backfill_id).tags["dagster-k8s/config"] == expected


def test_more_new_ranges_than_one_call_takes_are_registered_all(settings, on_disk):
    many = tuple(IdRange(number, number) for number in range(1, 40_002))
    wanted = BackfillPlan(IdRange(1, 40_001), ASSETS, many, many, {}, ())
    Backfills(on_disk).start(wanted, settings())  # SQLite takes so many parameters in one statement
    assert len(on_disk.get_dynamic_partitions("id_ranges")) == 40_001


def test_what_waits_in_one_backfill_is_not_launched_by_another(instance, catalog):
    first = Backfills(instance).start(plan(instance, catalog, "1-6"), catalog.settings)
    found = plan(instance, catalog)
    assert found.busy == {IdRange(1, 3): f"backfill {first}", IdRange(4, 6): f"backfill {first}"}
    assert found.ranges == ranges("7-9", "10-12")


def test_progress_counts_runs_by_what_they_do(instance, catalog):
    backfills = Backfills(instance)
    backfill_id = backfills.start(plan(instance, catalog), catalog.settings)
    make_run(instance, "1-3", dg.DagsterRunStatus.SUCCESS, backfill=backfill_id)
    make_run(instance, "4-6", backfill=backfill_id)
    make_run(instance, "7-9", dg.DagsterRunStatus.NOT_STARTED, backfill=backfill_id)
    make_run(instance, "10-12", backfill="another")
    assert backfills.progress(backfill_id) == BackfillProgress("running", 4, 1, (), queued=1, started=1)


def test_a_cancelled_backfill_is_left_to_the_daemon_and_gives_its_ranges_back(instance, catalog):
    backfills = Backfills(instance)
    backfill_id = backfills.start(plan(instance, catalog), catalog.settings)
    assert backfills.cancel(backfill_id)
    assert backfills.progress(backfill_id).state == "canceling"
    assert plan(instance, catalog).busy == {}
    (backfill,) = instance.get_backfills()
    instance.update_backfill(backfill.with_status(BulkActionStatus.CANCELED))
    assert not backfills.cancel(backfill_id)
    assert backfills.progress(backfill_id).is_over


def test_a_backfill_nobody_knows_is_refused(instance):
    for ask in (Backfills(instance).progress, Backfills(instance).cancel):
        with pytest.raises(BackfillUnknownError, match="No backfill 'nope' can be shown or cancelled"):
            ask("nope")


def test_backfills_are_served_while_their_daemons_say_that_they_live(on_disk):
    backfills = Backfills(on_disk)
    assert not backfills.has_daemons()
    beat(on_disk)
    assert backfills.has_daemons()
    beat(on_disk, seconds_ago=400)
    assert not backfills.has_daemons()


def test_the_sensor_hears_of_ranges_that_wait_in_a_backfill_and_of_its_runs(on_disk, catalog):
    backfill_id = Backfills(on_disk).start(plan(on_disk, catalog, "1-6"), catalog.settings)
    make_run(on_disk, "7-9", backfill=backfill_id)
    make_run(on_disk, "10-12")
    runs = InstanceRuns(on_disk)
    assert runs.active() == [IdRange(10, 12)]
    assert runs.backfilled() == [IdRange(7, 9)]  # no daemon: what waits is nobody's, so that a command may take it
    assert sorted(InstanceRuns(on_disk, under_daemon=True).backfilled()) == list(ranges("1-3", "4-6", "7-9"))
    beat(on_disk)
    assert sorted(runs.backfilled()) == list(ranges("1-3", "4-6", "7-9"))


def test_a_queued_run_that_no_daemon_will_start_keeps_its_range_from_no_command(on_disk):
    location = ManagedGrpcPythonEnvCodeLocationOrigin(LoadableTargetOrigin(module_name="m"), "extraction_dagster")
    origin = RemoteRepositoryOrigin(location, "__repository__").get_job_origin("extraction_job")
    queued = {"status": dg.DagsterRunStatus.QUEUED, "tags": {"dagster/partition": "1-3"}, "remote_job_origin": origin}
    on_disk.add_run(dg.DagsterRun("extraction_job", run_id=str(uuid.uuid4()), **queued))
    make_run(on_disk, "4-6")
    assert InstanceRuns(on_disk).active() == list(ranges("4-6"))
    assert sorted(InstanceRuns(on_disk, under_daemon=True).active()) == list(ranges("1-3", "4-6"))
    beat(on_disk)
    assert sorted(InstanceRuns(on_disk).active()) == list(ranges("1-3", "4-6"))


def begin_earlier(instance, backfill_id, seconds):
    """As if a backfill had begun before."""
    backfill = instance.get_backfill(backfill_id)
    instance.update_backfill(backfill._replace(backfill_timestamp=time.time() - seconds))


def test_a_backfill_that_nobody_works_off_keeps_its_ranges_for_an_hour(on_disk, catalog):
    runs = InstanceRuns(on_disk, under_daemon=True)
    stuck, at_work = (Backfills(on_disk).start(plan(on_disk, catalog, s), catalog.settings) for s in ("1-3", "4-9"))
    begin_earlier(on_disk, stuck, 3500)
    assert sorted(runs.backfilled()) == list(ranges("1-3", "4-6", "7-9"))
    make_run(on_disk, "7-9", backfill=at_work)
    for backfill_id in (stuck, at_work):
        begin_earlier(on_disk, backfill_id, 3700)
    assert sorted(set(runs.backfilled())) == list(ranges("4-6", "7-9"))
    make_run(on_disk, "1-3", dg.DagsterRunStatus.FAILURE, backfill=stuck)  # one of its runs has ended lately
    assert sorted(set(runs.backfilled())) == list(ranges("1-3", "4-6", "7-9"))


def test_a_backfill_that_can_not_be_read_hides_no_other(on_disk, catalog, monkeypatch, caplog):
    runs = InstanceRuns(on_disk, under_daemon=True)
    odd, _ = (Backfills(on_disk).start(plan(on_disk, catalog, span), catalog.settings) for span in ("1-3", "4-6"))
    range_keys = runs_module.range_keys

    def breaks_at_first(subset):
        if "1-3" in range_keys(subset):
            message = "of another day"
            raise ValueError(message)
        return range_keys(subset)

    monkeypatch.setattr(runs_module, "range_keys", breaks_at_first)
    assert runs.backfilled() == list(ranges("4-6"))
    assert f"Backfill {odd} can't be read: of another day" in caplog.text


def test_the_sensor_hears_of_a_backfill_of_every_range_that_the_ui_launched(on_disk, catalog):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    beat(on_disk)
    add_ranges(on_disk, ranges("1-3", "4-6"))
    on_disk.add_backfill(
        PartitionBackfill.from_asset_partitions(
            backfill_id="abcdefgh",
            asset_graph=defs.resolve_asset_graph(),
            partition_names=None,
            asset_selection=[dg.AssetKey(name) for name in ASSETS],
            backfill_timestamp=time.time(),
            tags={},
            dynamic_partitions_store=on_disk,
            all_partitions=True,
            title=None,
            description=None,
            run_config=None,
        )
    )
    assert sorted(InstanceRuns(on_disk).backfilled()) == list(ranges("1-3", "4-6"))
    assert plan(on_disk, catalog).busy == {
        IdRange(1, 3): "backfill abcdefgh",
        IdRange(4, 6): "backfill abcdefgh",
    }


def here(monkeypatch, instance, outcomes):
    """Process ranges whose runs end as told: 'ok', 'busy', or with an error's text."""
    launched, left = [], list(outcomes)

    def launch(_instance, id_range, *, assets):
        launched.append((str(id_range), assets))
        became = left.pop(0)
        if became == "busy":
            raise RangeBusyError(id_range.partition_key, "r1")
        return FinishedRun("r2", success=became == "ok", error="" if became == "ok" else became)

    monkeypatch.setattr("extraction_dagster.defs.instance.backfills.launch", launch)
    many = tuple(IdRange(number, number) for number in range(1, 7))
    done = process_here(instance, BackfillPlan(IdRange(1, 6), ("qdrant_points",), many, (), {}, ()))
    return done, launched


def test_here_one_failed_range_does_not_stop_the_next(monkeypatch, instance):
    done, launched = here(monkeypatch, instance, ["ok", "it broke", "busy", "it broke again", "ok", "ok"])
    assert done == Processed(3, ranges("2-2", "4-4"), "Range 2-2: it broke")
    assert launched == [(f"{number}-{number}", ("qdrant_points",)) for number in range(1, 7)]


def test_here_three_failures_in_a_row_end_it(monkeypatch, instance):
    done, launched = here(monkeypatch, instance, ["ok", "store down", "store down", "store down"])
    assert done == Processed(1, ranges("2-2", "3-3", "4-4", "5-5", "6-6"), "Range 2-2: store down")
    assert len(launched) == 4
