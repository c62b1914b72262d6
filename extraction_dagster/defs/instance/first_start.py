"""What Dagster's daemon would warn of at its first start, settled before it."""

import dagster as dg

_EVENTS = (dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.RUN_SUCCESS)


def leave_older_runs_alone(instance: dg.DagsterInstance) -> None:
    """Have the daemon retry what fails from now on, as it would at its first start, with a warning for each event."""
    names = {f"EVENT_LOG_CONSUMER_CURSOR-{event.value}" for event in _EVENTS}
    missing = names - instance.daemon_cursor_storage.get_cursor_values(names).keys()
    if missing:
        newest = instance.event_log_storage.get_maximum_record_id() or 0
        instance.daemon_cursor_storage.set_cursor_values(dict.fromkeys(missing, str(newest)))
