"""A scrape: whatever hangs or fails, an answer comes, and the census before is shown while one is taken."""

import threading
from dataclasses import replace

import pytest

from extraction_dagster.watch.meter import Meter
from extraction_dagster.watch.scrape import Scrape


@pytest.fixture
def scrape(monkeypatch, settings, figures, census):
    """A scrape whose figures and census come from `made`."""
    made = {"figures": lambda: figures, "census": lambda: census, "asked": []}
    monkeypatch.setattr(Meter, "measure", lambda _self: made["figures"]())

    def count(_self, last_processed_id):
        made["asked"].append(last_processed_id)
        return made["census"]()

    monkeypatch.setattr(Meter, "count", count)
    monkeypatch.setattr("extraction_dagster.watch.scrape._SCRAPE_SECONDS", 0.2)
    monkeypatch.setattr("extraction_dagster.watch.scrape._FIRST_CENSUS_SECONDS", 0.2)
    scrape = Scrape(settings(), lambda: None)
    scrape.made = made
    yield scrape
    scrape.close()


def test_figures_and_census_are_shown_together(scrape):
    text = scrape.now().openmetrics()
    assert "extraction_watermark_id 12345.0" in text
    assert "extraction_frames 5000.0" in text
    assert scrape.made["asked"] == [12345]


def test_scrapes_within_seconds_take_nothing_anew(scrape, figures):
    taken = []
    scrape.made["figures"] = lambda: taken.append(None) or figures
    for _ in range(5):
        scrape.soon()
    assert (len(taken), len(scrape.made["asked"])) == (1, 1)


def test_a_database_that_does_not_answer_makes_it_down_in_time(scrape):
    go_on = threading.Event()
    scrape.made["figures"] = lambda: go_on.wait(30)
    assert "extraction_up 0.0" in scrape.soon().openmetrics()
    go_on.set()


def test_a_first_census_that_takes_long_is_not_waited_for(scrape, census):
    go_on = threading.Event()

    def slow():
        go_on.wait(30)
        return census

    scrape.made["census"] = slow
    text = scrape.soon().openmetrics()
    assert "extraction_up 1.0" in text
    assert "extraction_frames 5000" not in text
    go_on.set()
    assert "extraction_frames 5000.0" in scrape.now().openmetrics()


def test_a_census_that_fails_costs_nothing_but_the_census(scrape):
    def fail():
        message = "the ledger is away"
        raise OSError(message)

    scrape.made["census"] = fail
    text = scrape.soon().openmetrics()
    assert "extraction_up 1.0" in text
    assert 'extraction_rows{state="done"}' not in text


def test_of_a_table_that_cannot_be_read_no_old_count_is_shown(scrape, figures):
    scrape.soon()
    parts = {"dagster": True, "table": False}
    scrape.made["figures"] = lambda: replace(figures, parts=parts, table=None, mirror=None)
    scrape._figures._taken_at = float("-inf")
    text = scrape.soon().openmetrics()
    assert "extraction_up 0.0" in text
    assert "extraction_rows" not in text
