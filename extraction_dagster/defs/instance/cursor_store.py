"""The sensor's cursor in Dagster's storage, for the commands: read it, write it, see whether a daemon uses it."""

import dagster as dg

from extraction_dagster.defs.instance import LOCATION_NAME, SENSOR_NAME
from extraction_dagster.defs.instance.private_api import (
    InstigatorState,
    InstigatorStatus,
    SensorInstigatorData,
    daemon_statuses,
    new_sensor_data,
    new_sensor_state,
    sensor_states,
)

_MODULE = "extraction_dagster.definitions"  # as in workspace.yaml


class CursorStore:
    """The sensor's cursor, where Dagster keeps it."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
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
            state = new_sensor_state(SENSOR_NAME, module=_MODULE, location=LOCATION_NAME, cursor=cursor)
            self._instance.add_instigator_state(state)
            return
        data = state.instigator_data
        known = data if isinstance(data, SensorInstigatorData) else new_sensor_data()
        self._instance.update_instigator_state(state.with_data(known._replace(cursor=cursor)))

    def last_tick_at(self) -> float | None:
        """When a daemon last began a tick of the sensor, in seconds since the epoch; None before the first."""
        state = self._state()
        data = state.instigator_data if state else None
        if not isinstance(data, SensorInstigatorData):
            return None
        return max(filter(None, (data.last_tick_start_timestamp, data.last_tick_timestamp)), default=None)

    def is_switched_on(self) -> bool:
        """Whether the sensor is on: it was not stopped."""
        state = self._state()
        return state is None or state.status != InstigatorStatus.STOPPED

    def is_ticking(self) -> bool:
        """Whether a daemon ticks the sensor: it gave a heartbeat within three minutes, errors or not."""
        if not self.is_switched_on():
            return False
        return bool(daemon_statuses(self._instance, ["SENSOR"], ignore_errors=True)["SENSOR"].healthy)

    def _state(self) -> InstigatorState | None:
        """The sensor's state; several locations may have loaded it, and the one of workspace.yaml comes first."""
        states = sensor_states(self._instance, SENSOR_NAME)
        states.sort(key=lambda state: state.origin.location_name != LOCATION_NAME)
        return states[0] if states else None
