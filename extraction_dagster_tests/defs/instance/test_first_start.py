"""The daemon's first start in a folder: nothing to warn of, and no older run is retried."""

import logging

import dagster as dg
import pytest
from dagster._daemon.auto_run_reexecution import event_log_consumer

from extraction_dagster.defs.instance.first_start import leave_older_runs_alone

EVENTS = event_log_consumer.DAGSTER_EVENT_TYPES


@pytest.fixture
def instance(tmp_path):
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def cursors(instance):
    """As the daemon reads them; it warns where one is missing."""
    return set(event_log_consumer._fetch_persisted_cursors(instance, EVENTS, logging.getLogger("daemon")).values())


def test_the_daemon_begins_behind_what_there_is_and_warns_of_nothing(instance, caplog):
    for _ in range(2):
        instance.report_runless_asset_event(dg.AssetMaterialization("a"))
    leave_older_runs_alone(instance)
    assert cursors(instance) == {2}
    assert caplog.messages == []


def test_where_the_daemon_has_been_at_work_it_goes_on_from_there(instance):
    event_log_consumer._persist_cursors(instance, dict.fromkeys(EVENTS, 0))
    instance.report_runless_asset_event(dg.AssetMaterialization("a"))
    leave_older_runs_alone(instance)
    assert cursors(instance) == {0}
