"""What goes wrong on an ordinary day, with a real daemon: the store is down, one record is poison."""

import itertools
import json
from datetime import datetime

import pytest

from extraction_dagster.settings import load_settings
from extraction_dagster.stages.embed.models.registry import embedding_fingerprint
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.stage import open_point_store

pytestmark = pytest.mark.soak


def test_a_store_that_is_down_holds_the_checkpoint_and_drains_by_itself_when_it_returns(site, monkeypatch):
    monkeypatch.setenv("EXTRACTION_BATCH_SIZE", "200")
    monkeypatch.setenv("EXTRACTION_QDRANT_TIMEOUT_SECONDS", "5")  # a run gives up soon
    site.add_rows(*range(1, 501))
    settings = load_settings()
    with open_point_store(settings) as held:  # the embedded engine serves one process at a time
        held.ensure_collection(CollectionSpec(settings.collection_name, 8, embedding_fingerprint(settings)))
        site.start_daemon()
        site.wait(lambda: site.num_runs("FAILURE") >= 3, seconds=240, what="three runs have failed")
        cursor = site.cursor()
        assert (cursor.last_processed_id, site.states().keys() & {"done", "parked", "failed"}) == (None, set())
        assert site.rows("SELECT count(*) FROM insta_content WHERE is_embedded") == [(0,)]
        assert site.rows("SELECT count(*) FROM extraction_errors") == [(0,)]
    site.wait(lambda: site.states() == {"done": 500}, seconds=240, what="every row is done")
    site.wait(lambda: site.cursor().last_processed_id == 500, seconds=60, what="the watermark is at the last row")
    site.stop()
    assert site.points_by_record() == dict.fromkeys(range(1, 501), 1)
    assert site.rows("SELECT count(*) FROM insta_content WHERE is_extracted AND is_embedded") == [(500,)]


def test_one_poison_record_leaves_the_others_done_is_parked_after_three_tries_and_can_be_brought_back(
    site, monkeypatch
):
    monkeypatch.setenv("EXTRACTION_RETRY_DELAY_SECONDS", "4")
    site.poison(500)
    site.add_rows(*range(1, 1001))
    site.start_daemon()
    site.wait(lambda: site.states() == {"done": 999, "failed": 1}, seconds=240, what="all but the poison are done")
    assert site.rows("SELECT record_id, attempts FROM extraction_ledger WHERE state = 'failed'") == [(500, 1)]
    assert site.cursor().last_processed_id in {None, 499}
    site.wait(lambda: site.states() == {"done": 999, "parked": 1}, seconds=240, what="the poison is parked")
    site.wait(lambda: site.cursor().last_processed_id == 1000, seconds=60, what="a parked row lets the watermark pass")

    tries = json.loads(site.extraction("errors", "--history", "--json"))["errors"]
    assert [(row["record_id"], row["error_type"], row["state"]) for row in tries] == [
        (500, "PoisonError", "parked")
    ] * 3
    moments = [datetime.fromisoformat(row["occurred_at"]) for row in reversed(tries)]
    waits = [(late - early).total_seconds() for early, late in itertools.pairwise(moments)]
    assert waits[0] >= 4
    assert waits[1] >= 8
    assert "500 parked, decode, PoisonError" in site.extraction("errors")

    site.poison()
    assert "1 records are pending now" in site.extraction("retry", "500")
    site.wait(lambda: site.states() == {"done": 1000}, seconds=240, what="the record that was brought back is done")
    assert "No record has failed" in site.extraction("errors")
    site.stop()
    assert site.cursor().last_processed_id == 1000
    assert site.points_by_record() == dict.fromkeys(range(1, 1001), 1)


def test_two_daemons_a_backfill_and_an_overlapping_range_at_once_end_in_the_right_state(site, monkeypatch):
    monkeypatch.setenv("EXTRACTION_BATCH_SIZE", "500")
    site.add_rows(*range(1, 1501))
    site.start_daemon()
    site.start_daemon()
    site.wait(lambda: "1-500" in site.partitions(), seconds=120, what="the sensor has cut its first range")
    site.dagster("job", "launch", "-j", "extraction_job", "--tags", json.dumps({"dagster/partition": "250-1250"}))
    site.dagster("job", "backfill", "-j", "extraction_job", "--partitions", "1-500", "--noprompt")
    site.add_rows(*range(1501, 2001))
    site.wait(lambda: site.states() == {"done": 2000}, seconds=300, what="every row is done")
    site.wait(lambda: not site.num_active_runs(), seconds=240, what="every run has ended")
    site.wait(lambda: site.cursor().last_processed_id == 2000, seconds=60, what="the watermark is at the last row")
    site.stop()
    assert {"1-500", "250-1250"} <= site.partitions()
    assert site.rows("SELECT count(*) FROM insta_content WHERE is_extracted AND is_embedded") == [(2000,)]
    assert site.states() == {"done": 2000}
    assert site.points_by_record() == dict.fromkeys(range(1, 2001), 1)
