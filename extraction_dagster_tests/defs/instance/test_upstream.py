"""What we rely on in Dagster's private modules and undocumented methods: a failure says "the dependency changed"."""

import inspect
import logging
import os
import time

import dagster as dg
import pytest
from dagster._cli import api
from dagster._core.definitions.partitions.subset import DefaultPartitionsSubset
from dagster._core.test_utils import create_run_for_test
from dagster._daemon.auto_run_reexecution import event_log_consumer
from dagster._daemon.types import DaemonHeartbeat
from dagster._grpc import impl
from dagster._utils.error import SerializableErrorInfo

from extraction_dagster.defs.instance import private_api
from extraction_dagster.defs.instance.private_api import (
    BULK_ACTION_TERMINAL_STATUSES,
    AssetGraphSubset,
    BaseAssetGraph,
    BulkActionStatus,
    InstigatorStatus,
    PartitionBackfill,
    SensorInstigatorData,
    daemon_statuses,
    engine_messages,
    extract_data_provenance_from_entry,
    extract_data_version_from_entry,
    free_slots,
    make_new_backfill_id,
    new_sensor_data,
    new_sensor_state,
    newest_materializations,
    requested_backfills,
    retry_only_new_failures,
    sensor_states,
    slot_holders,
)

# Dagster itself reads pydantic's old attribute.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")

EVENTS = event_log_consumer.DAGSTER_EVENT_TYPES
RUN = dg.DagsterRunStatus


@pytest.fixture
def instance(tmp_path):
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


@pytest.mark.parametrize("name", private_api.__all__)
def test_every_name_is_still_where_it_was(name):
    assert getattr(private_api, name) is not None


def test_a_name_that_there_is_not_is_refused_as_by_any_module():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = private_api.no_such_name


# The daemon's first start in a folder: nothing to warn of, and no older run is retried


def retry_cursors(instance):
    """As the daemon reads them; it warns where one is missing."""
    return set(event_log_consumer._fetch_persisted_cursors(instance, EVENTS, logging.getLogger("daemon")).values())


def test_the_daemon_begins_behind_what_there_is_and_warns_of_nothing(instance, caplog):
    for _ in range(2):
        instance.report_runless_asset_event(dg.AssetMaterialization("a"))
    retry_only_new_failures(instance)
    assert retry_cursors(instance) == {2}
    assert caplog.messages == []


def test_where_the_daemon_has_been_at_work_it_goes_on_from_there(instance):
    event_log_consumer._persist_cursors(instance, dict.fromkeys(EVENTS, 0))
    instance.report_runless_asset_event(dg.AssetMaterialization("a"))
    retry_only_new_failures(instance)
    assert retry_cursors(instance) == {0}


# Daemons


def test_a_daemon_is_healthy_while_its_heartbeats_come_and_hold_no_error(instance):
    error = SerializableErrorInfo("a code location did not load", [], None)
    for seconds_ago, name, errors in ((100, "SENSOR", []), (200, "SCHEDULER", []), (0, "BACKFILL", [error])):
        instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - seconds_ago, name, None, errors))
    names = ["SENSOR", "SCHEDULER", "BACKFILL"]
    assert [daemon_statuses(instance, names)[name].healthy for name in names] == [True, False, False]
    assert daemon_statuses(instance, ["BACKFILL"], ignore_errors=True)["BACKFILL"].healthy


def test_an_instance_on_disk_needs_the_daemons_that_we_ask_about(instance):
    assert {"SENSOR", "BACKFILL", "QUEUED_RUN_COORDINATOR"} <= set(instance.get_required_daemon_types())


# Backfills


def make_backfill(instance):
    subset = DefaultPartitionsSubset({"1-9", "10-19"})
    return PartitionBackfill.from_asset_graph_subset(
        backfill_id=make_new_backfill_id(),
        backfill_timestamp=time.time(),
        tags={},
        dynamic_partitions_store=instance,
        asset_graph_subset=AssetGraphSubset(partitions_subsets_by_asset_key={dg.AssetKey("a"): subset}),
        title="two ranges",
        description=None,
        run_config=None,
    )


def test_a_backfill_that_is_added_is_found_by_its_id_and_by_its_status_until_it_is_cancelled(instance):
    first, second = make_backfill(instance), make_backfill(instance)
    assert first.backfill_id != second.backfill_id
    for backfill in (first, second):
        instance.add_backfill(backfill)
    assert {found.backfill_id for found in requested_backfills(instance)} == {first.backfill_id, second.backfill_id}
    instance.update_backfill(instance.get_backfill(first.backfill_id).with_status(BulkActionStatus.CANCELING))
    assert [found.backfill_id for found in requested_backfills(instance)] == [second.backfill_id]
    assert instance.get_backfill("unknown") is None


def test_a_backfill_says_what_it_targets_has_requested_has_made_and_could_not_make(instance):
    data = make_backfill(instance).asset_backfill_data
    (targeted,) = data.target_subset.partitions_subsets_by_asset_key.values()
    assert set(targeted.get_partition_keys()) == {"1-9", "10-19"}
    for subset in (data.requested_subset, data.materialized_subset, data.failed_and_downstream_subset):
        assert subset.partitions_subsets_by_asset_key == {}


def test_the_statuses_of_a_backfill_are_those_that_we_name():
    over = {"CANCELED", "COMPLETED", "COMPLETED_SUCCESS", "COMPLETED_FAILED", "FAILED"}
    assert {status.value for status in BULK_ACTION_TERMINAL_STATUSES} == over
    assert {status.value for status in BulkActionStatus} == {*over, "REQUESTED", "CANCELING", "FAILING"}


# The cursor of a sensor


def test_a_sensors_state_is_found_by_its_name_and_its_data_can_be_replaced(instance):
    state = new_sensor_state("ours", module="m", location="l", cursor="first")
    instance.add_instigator_state(state)
    instance.add_instigator_state(new_sensor_state("another", module="m", location="l", cursor=None))
    (found,) = sensor_states(instance, "ours")
    assert (found.instigator_data.cursor, found.status, found.origin.location_name) == (
        "first",
        InstigatorStatus.DECLARED_IN_CODE,
        "l",
    )
    instance.update_instigator_state(found.with_data(new_sensor_data()._replace(cursor="second")))
    (found,) = sensor_states(instance, "ours")
    assert isinstance(found.instigator_data, SensorInstigatorData)
    assert found.instigator_data.cursor == "second"


# Runs


def test_the_slots_of_a_pool_are_held_until_they_are_given_back(instance):
    storage, run = instance.event_log_storage, create_run_for_test(instance, status=RUN.STARTED)
    storage.set_concurrency_slots("decode", 1)
    assert storage.claim_concurrency_slot("decode", run.run_id, "step").is_claimed
    assert slot_holders(instance) == {run.run_id}
    free_slots(instance, run.run_id)
    assert slot_holders(instance) == set()


def test_an_instance_in_memory_knows_no_pools():
    with dg.DagsterInstance.ephemeral() as instance:
        assert slot_holders(instance) == set()


def test_what_the_engine_wrote_of_a_run_is_read_in_order_and_with_its_time(instance):
    run = create_run_for_test(instance)
    for message in ("first", "second"):
        instance.report_engine_event(message, run)
    (first, began), (second, ended) = engine_messages(instance, run.run_id)
    assert (first, second) == ("first", "second")
    assert time.time() - 600 < began <= ended <= time.time()


@pytest.mark.parametrize("module", [api, impl])
def test_dagster_writes_the_process_id_of_a_run_in_the_words_that_we_look_for(module):
    assert 'f"Started process for run (pid: {pid})."' in inspect.getsource(module)
    assert private_api.GRPC_INFO_TAG == ".dagster/grpc_info"


def test_a_run_can_be_tagged_counted_and_failed(instance):
    run = create_run_for_test(instance, status=RUN.STARTED)
    instance.add_run_tags(run.run_id, {".dagster/own": str(os.getpid())})
    own = dg.RunsFilter(tags={".dagster/own": str(os.getpid())})
    assert (instance.get_runs_count(own), [found.run_id for found in instance.get_runs(own)]) == (1, [run.run_id])
    instance.report_run_failed(run, "its process is gone")
    assert instance.get_run_by_id(run.run_id).status == RUN.FAILURE
    assert instance.get_runs_count(dg.RunsFilter(statuses=[RUN.STARTED])) == 0


# What a materialization says of itself


PARTITIONS = dg.StaticPartitionsDefinition(["1-9", "10-19"])


@dg.asset(partitions_def=PARTITIONS, code_version="c1")
def source():
    return dg.MaterializeResult(data_version=dg.DataVersion("d1"))


@dg.asset(partitions_def=PARTITIONS, code_version="c2", deps=[source])
def derived():
    pass


def test_the_newest_materialization_of_each_partition_is_known_by_its_storage_id(instance):
    for key in ("1-9", "10-19", "1-9"):
        dg.materialize([source], instance=instance, partition_key=key)
    newest, _, oldest = instance.fetch_materializations(source.key, limit=9).records
    found = newest_materializations(instance, source.key)
    assert found["1-9"] == newest.storage_id > found["10-19"] > oldest.storage_id


def test_a_materialization_says_its_code_version_and_which_inputs_it_read(instance):
    dg.materialize([source, derived], instance=instance, partition_key="1-9")
    (made,) = instance.fetch_materializations(source.key, limit=9).records
    (record,) = instance.fetch_materializations(derived.key, limit=9).records
    assert extract_data_version_from_entry(made.event_log_entry).value == "d1"
    provenance = extract_data_provenance_from_entry(record.event_log_entry)
    assert (provenance.code_version, provenance.input_storage_ids) == ("c2", {source.key: made.storage_id})
    assert set(provenance.input_data_versions) == {source.key}


def test_a_graph_of_assets_says_parents_code_versions_and_partitions():
    graph = dg.Definitions(assets=[source, derived]).resolve_asset_graph()
    assert isinstance(graph, BaseAssetGraph)
    node = graph.get(derived.key)
    assert (node.parent_keys, node.code_version, node.partitions_def) == ({source.key}, "c2", PARTITIONS)
    assert graph.materializable_asset_keys == {source.key, derived.key}
