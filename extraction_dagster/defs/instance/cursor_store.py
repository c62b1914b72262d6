"""Dagster's cursor store, for those who are not the sensor: the commands, and `extraction run`."""

import dagster as dg
from dagster._core.definitions.sensor_definition import SensorType
from dagster._core.remote_origin import ManagedGrpcPythonEnvCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorType,
    SensorInstigatorData,
)
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin

from extraction_dagster.defs.instance.backfilled import SILENCE_SECONDS

SENSOR_NAME = "extraction_sensor"
LOCATION_NAME = "extraction_dagster"


class CursorStore:
    """The sensor's cursor, where Dagster keeps it."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        """Use this instance."""
        self._instance = instance

    def read(self) -> str | None:
        """The stored cursor; None when there is none."""
        state = self._state()
        data = state.instigator_data if state else None
        return data.cursor if isinstance(data, SensorInstigatorData) else None

    def write(self, cursor: str | None) -> None:
        """Store a cursor; only while no daemon ticks the sensor, for the store has no compare-and-swap."""
        state = self._state()
        if state is None:
            self._instance.add_instigator_state(_first_state(cursor))
            return
        data = state.instigator_data
        known = (
            data if isinstance(data, SensorInstigatorData) else SensorInstigatorData(sensor_type=SensorType.STANDARD)
        )
        self._instance.update_instigator_state(state.with_data(known._replace(cursor=cursor)))

    def last_tick_at(self) -> float | None:
        """When a daemon last began a tick of the sensor, in seconds since the epoch; None before the first."""
        state = self._state()
        data = state.instigator_data if state else None
        if not isinstance(data, SensorInstigatorData):
            return None
        return max(filter(None, (data.last_tick_start_timestamp, data.last_tick_timestamp)), default=None)

    def is_switched_on(self) -> bool:
        """Whether a daemon would tick the sensor: nobody has stopped it."""
        state = self._state()
        return state is None or state.status != InstigatorStatus.STOPPED

    def is_ticking(self) -> bool:
        """Whether a daemon ticks the sensor: it gave a sign of life within three minutes, be it of an error."""
        if not self.is_switched_on():
            return False
        from dagster._daemon.controller import get_daemon_statuses  # noqa: PLC0415 - half a CPU second, seldom needed

        statuses = get_daemon_statuses(
            self._instance, daemon_types=["SENSOR"], ignore_errors=True, heartbeat_tolerance_seconds=SILENCE_SECONDS
        )
        return bool(statuses["SENSOR"].healthy)

    def _state(self) -> InstigatorState | None:
        """The sensor's state; several locations may have loaded it, and the one of workspace.yaml comes first."""
        states = [
            state
            for state in self._instance.all_instigator_state(instigator_type=InstigatorType.SENSOR)
            if state.instigator_name == SENSOR_NAME
        ]
        states.sort(key=lambda state: state.origin.location_name != LOCATION_NAME)
        return states[0] if states else None


def _first_state(cursor: str | None) -> InstigatorState:
    """The state as the daemon would create it, for the location of workspace.yaml."""
    target = LoadableTargetOrigin(module_name="extraction_dagster.definitions")
    location = ManagedGrpcPythonEnvCodeLocationOrigin(loadable_target_origin=target, location_name=LOCATION_NAME)
    origin = RemoteRepositoryOrigin(code_location_origin=location, repository_name="__repository__")
    return InstigatorState(
        origin.get_instigator_origin(SENSOR_NAME),
        InstigatorType.SENSOR,
        InstigatorStatus.DECLARED_IN_CODE,
        SensorInstigatorData(cursor=cursor, sensor_type=SensorType.STANDARD),
    )
