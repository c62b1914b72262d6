"""The cursor that a command writes is the one that the daemon finds, and the other way round."""

import time

import dagster as dg
import pytest
from dagster._core.scheduler.instigation import InstigatorStatus
from dagster._core.test_utils import create_test_daemon_workspace_context
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster._daemon.types import DaemonHeartbeat
from dagster._utils.error import SerializableErrorInfo

from extraction_dagster.defs.instance import SENSOR_NAME
from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.glance import template


@pytest.fixture
def instance(tmp_path):
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def test_an_empty_store_has_no_cursor(instance):
    assert CursorStore(instance).read() is None


def test_what_is_written_is_read_back_and_replaced(instance):
    store = CursorStore(instance)
    for cursor in ("first", "second", None, "third"):
        store.write(cursor)
        assert store.read() == cursor
    assert len(instance.all_instigator_state()) == 1


def test_without_a_daemon_nobody_ticks(instance):
    store = CursorStore(instance)
    assert not store.is_ticking()
    store.write("cursor")
    assert not store.is_ticking()


@pytest.mark.parametrize(
    ("seconds_ago", "errors", "ticks"),
    [
        (0, [], True),
        (60, [], True),
        (60, [SerializableErrorInfo("a code location did not load", [], None)], True),
        (600, [], False),
    ],
)
def test_a_daemon_ticks_until_it_was_silent_for_three_minutes(instance, seconds_ago, errors, ticks):
    instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - seconds_ago, "SENSOR", "somebody", errors))
    assert CursorStore(instance).is_ticking() is ticks


@pytest.mark.slow
def test_the_daemons_own_look_up_finds_what_a_command_wrote_and_its_change_is_read(tmp_path):
    (tmp_path / "workspace.yaml").write_text(template("workspace.yaml"))
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        CursorStore(instance).write("by a command")
        target = WorkspaceFileTarget([str(tmp_path / "workspace.yaml")])
        with create_test_daemon_workspace_context(target, instance) as context:
            (location,) = context.create_request_context().code_locations
            (repository,) = location.get_repositories().values()
            sensor = repository.get_sensor(SENSOR_NAME)
            state = instance.get_instigator_state(sensor.get_remote_origin_id(), sensor.selector_id)
            assert state.instigator_data.cursor == "by a command"
            assert sensor.get_current_instigator_state(state).status == InstigatorStatus.DECLARED_IN_CODE
            instance.update_instigator_state(state.with_data(state.instigator_data._replace(cursor="by the daemon")))
            code_servers = context._grpc_server_registry
        code_servers.wait_for_processes()  # else one of the next tests hears that it was never waited for
        assert CursorStore(instance).read() == "by the daemon"
        assert len(instance.all_instigator_state()) == 1
