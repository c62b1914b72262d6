"""Every use of Dagster's private modules, and of the storages behind its instance: what an upgrade may break.

Other files import these names from here, and `test_boundaries.py` refuses an import from `dagster._…` anywhere else.
`test_upstream.py` asserts what we rely on, so that its failure reads "the dependency changed". Beside these, methods of
`DagsterInstance` are used that Dagster does not document: runs are read, counted, tagged and failed, backfills and
instigator states are read and written. And `glance.py` reads the tables of its storages without loading it.
"""

import importlib
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import sqlalchemy as sa

# A backfill of assets is a record that Dagster's daemon works off and the UI shows; no public call makes one.
from dagster._core.definitions.assets.graph.asset_graph_subset import AssetGraphSubset

# The type of what `Definitions.resolve_asset_graph` returns.
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph

# What a materialization says of the code and the inputs it was made with.
from dagster._core.definitions.data_version import extract_data_provenance_from_entry, extract_data_version_from_entry
from dagster._core.definitions.sensor_definition import SensorType
from dagster._core.execution.asset_backfill import AssetBackfillData
from dagster._core.execution.backfill import (
    BULK_ACTION_TERMINAL_STATUSES,
    BulkActionsFilter,
    BulkActionStatus,
    PartitionBackfill,
)

# The state of a sensor, cursor included, and the origin under which the daemon looks for it.
from dagster._core.remote_origin import ManagedGrpcPythonEnvCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, InstigatorType, SensorInstigatorData

# The tag that says on which host a run's worker was started.
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.utils import make_new_backfill_id

if TYPE_CHECKING:
    from dagster._core.storage.base_storage import DagsterStorage
    from dagster._core.storage.compute_log_manager import CapturedLogContext
    from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
    from dagster._core.storage.root import LocalArtifactStorage
    from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
    from dagster._daemon.types import DaemonStatus
    from dagster._serdes import ConfigurableClass, ConfigurableClassData

__all__ = [
    "BULK_ACTION_TERMINAL_STATUSES",
    "GRPC_INFO_TAG",
    "AssetBackfillData",
    "AssetGraphSubset",
    "BaseAssetGraph",
    "BulkActionStatus",
    "CapturedLogContext",
    "ConfigurableClass",
    "ConfigurableClassData",
    "DagsterSqliteStorage",
    "DagsterStorage",
    "InstigatorState",
    "InstigatorStatus",
    "LocalArtifactStorage",
    "LocalComputeLogManager",
    "PartitionBackfill",
    "SensorInstigatorData",
    "extract_data_provenance_from_entry",
    "extract_data_version_from_entry",
    "make_new_backfill_id",
]

# The bases of our classes in dagster.yaml. They load half a CPU second of modules: only those who open an instance pay.
_STORAGE_CLASSES = {
    "CapturedLogContext": "dagster._core.storage.compute_log_manager",
    "ConfigurableClass": "dagster._serdes",
    "ConfigurableClassData": "dagster._serdes",
    "DagsterSqliteStorage": "dagster._core.storage.sqlite_storage",
    "DagsterStorage": "dagster._core.storage.base_storage",
    "LocalArtifactStorage": "dagster._core.storage.root",
    "LocalComputeLogManager": "dagster._core.storage.local_compute_log_manager",
}
_OF_CHECKS = {dg.DagsterEventType.ASSET_CHECK_EVALUATION, dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED}
_SILENCE_SECONDS = 150.0  # beside the 30 s between two heartbeats: after three minutes a daemon counts as gone
# Where Dagster's daemon keeps how far it has read the events of runs that it may retry.
_RETRY_CURSORS = {f"EVENT_LOG_CONSUMER_CURSOR-{event}" for event in ("PIPELINE_FAILURE", "PIPELINE_SUCCESS")}


def __getattr__(name: str) -> object:
    if name not in _STORAGE_CLASSES:
        raise AttributeError(name)
    return getattr(importlib.import_module(_STORAGE_CLASSES[name]), name)


def daemon_statuses(
    instance: dg.DagsterInstance, daemon_types: Sequence[str], *, ignore_errors: bool = False
) -> Mapping[str, "DaemonStatus"]:
    """Whether daemons are healthy: each gave a heartbeat within three minutes, and one without errors.

    Args:
        instance: The instance.
        daemon_types: SENSOR, BACKFILL and so on.
        ignore_errors: Count a daemon that reports errors as healthy.
    """
    from dagster._daemon.controller import get_daemon_statuses

    return get_daemon_statuses(
        instance, daemon_types, ignore_errors=ignore_errors, heartbeat_tolerance_seconds=_SILENCE_SECONDS
    )


def retry_only_new_failures(instance: dg.DagsterInstance) -> None:
    """Have Dagster's daemon retry what fails from now on, and not the runs of before its first start.

    At its first start the daemon does so itself, with a warning for each kind of event.
    """
    missing = _RETRY_CURSORS - instance.daemon_cursor_storage.get_cursor_values(_RETRY_CURSORS).keys()
    if missing:
        newest = instance.event_log_storage.get_maximum_record_id() or 0
        instance.daemon_cursor_storage.set_cursor_values(dict.fromkeys(missing, str(newest)))


def slot_holders(instance: dg.DagsterInstance) -> set[str]:
    """The ids of the runs that hold a slot of a pool; none where the storage knows no pools."""
    storage = instance.event_log_storage
    return set(storage.get_concurrency_run_ids()) if storage.supports_global_concurrency_limits else set()


def free_slots(instance: dg.DagsterInstance, run_id: str) -> None:
    """Give back the pool slots that a run holds."""
    instance.event_log_storage.free_concurrency_slots_for_run(run_id)


def engine_messages(instance: dg.DagsterInstance, run_id: str) -> list[tuple[str, float]]:
    """What Dagster's engine wrote of a run, and when, in seconds since the epoch; oldest first."""
    events = instance.event_log_storage.get_logs_for_run(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
    return [(event.message, event.timestamp) for event in events]


def newest_materializations(instance: dg.DagsterInstance, asset: dg.AssetKey) -> Mapping[str, int]:
    """The storage id of the newest materialization of each partition of an asset, in one query."""
    event = dg.DagsterEventType.ASSET_MATERIALIZATION
    return instance.event_log_storage.get_latest_storage_id_by_partition(asset, event)


def newest_asset_events(instance: dg.DagsterInstance, run_id: str) -> Mapping[int, tuple[str, str | None, str]]:
    """A run's events that are the newest of their kind of an asset's partition: what the partitions page shows.

    Returns:
        By storage id: the asset's key as it is stored, the partition, the kind of event.
    """
    events = _events().c
    mine = sa.select(events.id, events.asset_key, events.partition, events.dagster_event_type).where(
        events.run_id == run_id, events.asset_key.is_not(None)
    )
    newest = {}
    with instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]  # of SQL storages
        for row_id, asset, partition, kind in connection.execute(mine).all():
            same = (events.asset_key == asset, events.dagster_event_type == kind, events.partition == partition)
            if connection.execute(sa.select(sa.func.max(events.id)).where(*same)).scalar_one() == row_id:
                newest[row_id] = (asset, partition, kind)
    return newest


def forget_run(instance: dg.DagsterInstance, run_id: str, *, keep: Mapping[int, tuple[str, str | None, str]]) -> None:
    """Remove a run, its tags, what its steps printed, its checks' results, and its events but for some.

    `DagsterInstance.delete_run` would take each partition's materialization along, and on SQLite leave the tags and the
    run's own file. The run's row goes last, so that what a kill left undone is done again.

    Args:
        instance: Its storages are SQLite's or PostgreSQL's.
        run_id: Of a run that has ended.
        keep: Events that stay, as `newest_asset_events` gives them.
    """
    from dagster._core.storage.event_log import SqliteEventLogStorage
    from dagster._core.storage.runs.schema import RunTagsTable

    storage: Any = instance.event_log_storage
    results = storage.get_logs_for_run(run_id, of_type=_OF_CHECKS)
    checks = {event.dagster_event.event_specific_data.asset_check_key for event in results}
    shown = {(asset, partition) for asset, partition, _ in keep.values()}
    mine = _events().c.run_id == run_id
    with storage.index_connection() as connection:
        for key in checks:
            _forget_check(connection, key, run_id, shown)
        _forget_events(connection, sa.and_(mine, _events().c.id.not_in(keep)))
    storage.free_concurrency_slots_for_run(run_id)
    if isinstance(storage, SqliteEventLogStorage):
        for suffix in ("", "-wal", "-shm"):
            Path(storage.path_for_shard(run_id) + suffix).unlink(missing_ok=True)
        storage._initialized_dbs.discard(run_id)  # noqa: SLF001 - it takes the file for made
    with suppress(NotImplementedError):
        instance.compute_log_manager.delete_logs(prefix=[run_id])
    with instance.run_storage.connect() as connection:  # type: ignore[attr-defined]  # as above
        connection.execute(sa.delete(RunTagsTable).where(RunTagsTable.c.run_id == run_id))
    instance.run_storage.delete_run(run_id)


def forget_runless_events(instance: dg.DagsterInstance, asset: dg.AssetKey, *, before: datetime, most: int) -> int:
    """Remove old events of an asset that no run made, but for the newest of each kind. Returns how many, up to `most`.

    Args:
        instance: Its storages are SQLite's or PostgreSQL's.
        asset: The asset, without partitions.
        before: Timezone-aware.
        most: Of a kind, at one time.
    """
    from dagster._core.storage.event_log import SqliteEventLogStorage

    storage: Any = instance.event_log_storage
    events, checks, key = _events().c, _checks().c, asset.to_string()
    old = before.astimezone(UTC).replace(tzinfo=None)  # as Dagster stores moments
    newest = sa.select(sa.func.max(events.id)).where(events.asset_key == key).group_by(events.dagster_event_type)
    shown = sa.select(sa.func.max(checks.id)).where(checks.asset_key == key).group_by(checks.check_name)
    of_asset = sa.select(events.id).where(
        events.asset_key == key, events.run_id == "", events.timestamp < old, events.id.not_in(newest)
    )
    of_checks = sa.select(checks.id, checks.evaluation_event_storage_id).where(
        checks.asset_key == key,
        checks.run_id == "",
        checks.evaluation_event_timestamp < old,
        checks.id.not_in(shown),
    )
    with storage.index_connection() as connection:
        ids = list(connection.execute(of_asset.order_by(events.id).limit(most)).scalars())
        results = connection.execute(of_checks.order_by(checks.id).limit(most)).all()
        ids += [event_id for _, event_id in results if event_id is not None]
        _forget_events(connection, events.id.in_(ids))
        connection.execute(sa.delete(_checks()).where(checks.id.in_([row_id for row_id, _ in results])))
    if ids and isinstance(storage, SqliteEventLogStorage):  # there, they are in a file of their own as well
        with storage.run_connection("") as connection:
            mine = sa.or_(events.asset_key == key, events.asset_key.is_(None))
            connection.execute(sa.delete(_events()).where(mine, events.timestamp < old))
    return len(ids)


def _forget_events(connection: sa.Connection, which: sa.ColumnElement[bool]) -> None:
    from dagster._core.storage.event_log.schema import AssetEventTagsTable

    ids = sa.select(_events().c.id).where(which)
    connection.execute(sa.delete(AssetEventTagsTable).where(AssetEventTagsTable.c.event_id.in_(ids)))
    connection.execute(sa.delete(_events()).where(which))


def _forget_check(
    connection: sa.Connection, key: dg.AssetCheckKey, run_id: str, shown: Container[tuple[str, str | None]]
) -> None:
    """Remove a check's results in a run, but for those of shown partitions and the check's newest of all."""
    checks, asset = _checks().c, key.asset_key.to_string()
    same = (checks.asset_key == asset, checks.check_name == key.name)
    newest = connection.execute(sa.select(sa.func.max(checks.id)).where(*same)).scalar_one()
    mine = sa.select(checks.id, checks.partition).where(*same, checks.run_id == run_id)
    rows = connection.execute(mine).all()
    gone = [row_id for row_id, partition in rows if row_id != newest and (asset, partition) not in shown]
    connection.execute(sa.delete(_checks()).where(checks.id.in_(gone)))


def _events() -> sa.Table:
    from dagster._core.storage.event_log.schema import SqlEventLogStorageTable

    return SqlEventLogStorageTable


def _checks() -> sa.Table:
    from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable

    return AssetCheckExecutionsTable


def has_sql_storages(instance: dg.DagsterInstance) -> bool:
    """Whether runs and events lie in databases whose tables are known here."""
    return hasattr(instance.event_log_storage, "index_connection") and hasattr(instance.run_storage, "connect")


def live_backfills(instance: dg.DagsterInstance) -> set[str]:
    """The ids of the backfills that have not ended."""
    alive = [status for status in BulkActionStatus if status not in BULK_ACTION_TERMINAL_STATUSES]
    return {found.backfill_id for found in instance.get_backfills(BulkActionsFilter(statuses=alive))}


def requested_backfills(instance: dg.DagsterInstance) -> Sequence[PartitionBackfill]:
    """The backfills that go on; one that is being cancelled asks for no more runs."""
    wanted = BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED])
    return instance.get_backfills(wanted) if instance.get_backfills_count(wanted) else []


def sensor_states(instance: dg.DagsterInstance, name: str) -> list[InstigatorState]:
    """The states of a sensor: one for each code location that has loaded it."""
    states = instance.all_instigator_state(instigator_type=InstigatorType.SENSOR)
    return [state for state in states if state.instigator_name == name]


def new_sensor_state(name: str, *, module: str, location: str, cursor: str | None) -> InstigatorState:
    """The state of a sensor as the daemon would create it, for a code location that is a module."""
    target = LoadableTargetOrigin(module_name=module)
    origin = ManagedGrpcPythonEnvCodeLocationOrigin(loadable_target_origin=target, location_name=location)
    repository = RemoteRepositoryOrigin(code_location_origin=origin, repository_name="__repository__")
    data = new_sensor_data()._replace(cursor=cursor)
    instigator = repository.get_instigator_origin(name)
    return InstigatorState(instigator, InstigatorType.SENSOR, InstigatorStatus.DECLARED_IN_CODE, data)


def new_sensor_data() -> SensorInstigatorData:
    """What is kept of a sensor before its first tick."""
    return SensorInstigatorData(sensor_type=SensorType.STANDARD)
