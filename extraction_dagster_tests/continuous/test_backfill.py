"""A backfill of ids that nobody has seen, worked off by a real daemon beside the sensor, which wants the same rows."""

import json
import signal
import subprocess
import threading
from collections import Counter

import dagster as dg  # noqa: TID251 - asks the instance about its runs
import pytest

from extraction_dagster.defs.instance.launching import open_instance
from extraction_dagster.settings import load_settings

pytestmark = pytest.mark.soak


def runs_by_range():
    with open_instance(load_settings()) as instance:
        return Counter(run.tags["dagster/partition"] for run in instance.get_runs())


def backfill_runs(backfill_id):
    with open_instance(load_settings()) as instance:
        wanted = dg.RunsFilter(tags={"dagster/backfill": backfill_id})
        return sorted(run.tags["dagster/partition"] for run in instance.get_runs(wanted))


def test_a_backfill_and_the_sensor_share_the_work_and_no_range_has_two_runs(site, monkeypatch):
    monkeypatch.setenv("EXTRACTION_BATCH_SIZE", "200")
    site.add_rows(*range(1, 801))
    launched = json.loads(site.extraction("backfill", "1-50000", "--json"))
    assert launched["new_ranges"] == ["1-200", "201-400", "401-600", "601-800"]
    backfill_id = launched["backfill_id"]
    site.add_rows(*range(801, 1001))  # the sensor's, behind the backfill
    site.start_daemon()

    watching = subprocess.Popen(
        [*site.command("extraction"), "backfill", "--watch", backfill_id],
        cwd=site.folder,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(300, watching.kill)  # nobody reads for ever what is never written
    watchdog.start()
    for line in watching.stderr:
        if "ranges finished" in line:
            break
    watching.send_signal(signal.SIGINT)
    assert watching.wait(timeout=60) == 130
    said = watching.stderr.read()
    watching.stderr.close()
    watchdog.cancel()
    assert f"Stopped watching; backfill {backfill_id} goes on." in said

    assert f"Backfill {backfill_id} is done: 4 ranges." in site.extraction("backfill", "--watch", backfill_id)
    site.wait(lambda: site.states() == {"done": 1000}, seconds=240, what="every row is done")
    site.wait(lambda: site.cursor().last_processed_id == 1000, seconds=60, what="the watermark is at the last row")
    assert backfill_runs(backfill_id) == ["1-200", "201-400", "401-600", "601-800"]
    assert set(runs_by_range().values()) == {1}
    assert runs_by_range().keys() == {"1-200", "201-400", "401-600", "601-800", "801-1000"}

    # Nothing is left of it, and another one of two assets alone runs each range once more.
    again = json.loads(site.extraction("backfill", "1-400", "--only", "qdrant_points", "--wait", "--json"))
    assert (again["state"], again["finished"], again["failed_ranges"]) == ("done", 2, [])
    assert backfill_runs(again["backfill_id"]) == ["1-200", "201-400"]
    site.stop()
    assert site.points_by_record() == dict.fromkeys(range(1, 1001), 1)
