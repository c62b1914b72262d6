"""`extraction run` from the inside: it follows a table, tries again what failed, and never ticks beside a daemon."""

import contextlib
import time
from types import SimpleNamespace

import dagster as dg
import pytest
from dagster._daemon.types import DaemonHeartbeat

from extraction_dagster.defs.instance import draining, launching
from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.draining import Drained, drain
from extraction_dagster.defs.instance.launching import FinishedRun, open_instance
from extraction_dagster.errors.runs import RangeBusyError, RunFailedError, SensorBusyError
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.embed.models.registry import embedding_fingerprint
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.stage import open_point_store
from extraction_dagster.ticks import looks
from extraction_dagster.ticks.cursor import CursorState, Requests
from extraction_dagster.ticks.memory import Memory, recall, remember
from extraction_dagster.watch import progress


@pytest.fixture
def instance(world, monkeypatch):  # noqa: ARG001 - the instance of the world's folder
    monkeypatch.setenv("EXTRACTION_MAX_WAIT_SECONDS", "0")
    monkeypatch.setenv("EXTRACTION_RUN_RETRY_DELAY_SECONDS", "1")
    with open_instance(load_settings()) as instance:
        yield instance


@pytest.fixture
def while_it_waits(monkeypatch):
    """Instead of each wait for new rows, the next of these happens; after the last one somebody presses Ctrl+C."""

    def script(*happenings):
        left = list(happenings)

        def wait(_seconds):
            if not left:
                raise KeyboardInterrupt
            left.pop(0)()

        monkeypatch.setattr(draining, "time", SimpleNamespace(sleep=wait))

    return script


def identity():
    with open_catalog(load_settings()) as catalog:
        return catalog.source.identity


def begin_to_tick(instance):
    instance.add_daemon_heartbeat(DaemonHeartbeat(time.time(), "SENSOR", "somebody", []))


def test_beside_a_daemon_nothing_is_started(instance, world):
    begin_to_tick(instance)
    with pytest.raises(SensorBusyError, match="A Dagster daemon is running the sensor"):
        drain(instance, load_settings(), follow=False)
    assert (instance.get_runs_count(), world.sql("SELECT count(*) FROM extraction_ledger")) == (0, [(0,)])


def test_a_daemon_that_starts_later_takes_over(instance, world, while_it_waits):
    world.sql("DELETE FROM insta_content")
    while_it_waits(lambda: begin_to_tick(instance))
    with pytest.raises(SensorBusyError, match="counts as running for three minutes more"):
        drain(instance, load_settings(), follow=True)


def test_who_follows_takes_rows_as_they_arrive_until_ctrl_c(instance, world, while_it_waits):
    seen = []

    def a_row_arrives():
        seen.append(world.ledger())
        world.sql("INSERT INTO insta_content (id, path) SELECT 7, path FROM insta_content WHERE id = 1")

    while_it_waits(a_row_arrives)
    with pytest.raises(KeyboardInterrupt):
        drain(instance, load_settings(), follow=True)
    assert seen == [[(1, "done"), (2, "done"), (3, "done"), (4, "parked")]]
    assert world.ledger() == [(1, "done"), (2, "done"), (3, "done"), (4, "parked"), (7, "done")]


def test_a_store_that_is_down_ends_the_command_and_is_waited_for_by_who_follows(
    instance, world, while_it_waits, monkeypatch
):
    monkeypatch.setenv("EXTRACTION_QDRANT_TIMEOUT_SECONDS", "1")
    settings = load_settings()
    with contextlib.ExitStack() as down:
        held = down.enter_context(open_point_store(settings))  # the embedded engine serves one at a time
        held.ensure_collection(CollectionSpec(settings.collection_name, 1280, embedding_fingerprint(settings)))
        with pytest.raises(RunFailedError, match="are held by process"):
            drain(instance, settings, follow=False)
        assert world.ledger() == [(1, "embedded"), (2, "embedded"), (3, "embedded"), (4, "parked")]
        assert CursorState.from_json(CursorStore(instance).read(), source=identity()).last_processed_id is None

        while_it_waits(down.close, lambda: time.sleep(2))
        with pytest.raises(KeyboardInterrupt):
            drain(instance, settings, follow=True)
    assert world.ledger() == [(1, "done"), (2, "done"), (3, "done"), (4, "parked")]
    assert world.points() == {1: 3, 2: 3, 3: 3}


@pytest.fixture
def launched(world, monkeypatch):
    """Ranges of one record each that a command launches: they succeed, but for what is in `launched.fails`."""
    monkeypatch.setenv("EXTRACTION_BATCH_SIZE", "1")
    kept = SimpleNamespace(ranges=[], fails={})

    def launch(_instance, id_range, *, floor_id):  # noqa: ARG001 - the interface
        kept.ranges.append(str(id_range))
        error = next(iter(kept.fails.get(str(id_range), ())), "")
        kept.fails[str(id_range)] = kept.fails.get(str(id_range), ())[1:]
        if isinstance(error, Exception):
            raise error
        if not error:
            first, last = id_range.first_id, id_range.last_id
            done = "UPDATE insta_content SET is_extracted = 1, is_embedded = 1 WHERE id BETWEEN ? AND ?"
            world.sql(done, first, last)
        return FinishedRun("r", success=not error, error=error)

    monkeypatch.setattr(launching, "launch", launch)
    return kept


def test_a_range_that_fails_stops_no_other_and_is_what_the_command_ends_with(instance, world, launched):
    launched.fails["1-1"] = ["the first one is odd"]
    with pytest.raises(RunFailedError, match="the first one is odd"):
        drain(instance, load_settings(), follow=False)
    assert launched.ranges == ["1-1", "2-2", "3-3", "4-4"]
    drain(instance, load_settings(), follow=False)
    assert launched.ranges[4:] == ["1-1"]
    assert world.sql("SELECT count(*) FROM insta_content WHERE is_embedded") == [(4,)]


def test_three_ranges_that_fail_one_after_the_other_end_the_command(instance, launched):
    launched.fails |= {key: ["the store is down"] for key in ("1-1", "2-2", "3-3")}
    with pytest.raises(RunFailedError, match=r"1-1.*the store is down"):
        drain(instance, load_settings(), follow=False)
    assert launched.ranges == ["1-1", "2-2", "3-3"]


def test_a_range_that_somebody_else_has_just_launched_does_not_end_the_command(instance, launched):
    launched.fails["2-2"] = [RangeBusyError("2-2", "another run")]
    drain(instance, load_settings(), follow=False)
    assert launched.ranges == ["1-1", "2-2", "2-2", "3-3", "4-4"]


def test_a_command_that_was_stopped_within_its_look_at_the_whole_goes_on_there(instance, launched, monkeypatch):
    drain(instance, load_settings(), follow=False)
    monkeypatch.setattr(looks, "_STEP", 1)
    monkeypatch.setattr(looks, "_KEEP_EVERY_SECONDS", -1)
    monkeypatch.setenv("EXTRACTION_SOURCE_VERSION_COLUMN", "platform")
    scanned, scan = [], looks.scan

    def stops_at_the_third(catalog, **options):
        if options.get("every_row"):
            scanned.append(options["after_id"])
            if len(scanned) == 3:
                raise KeyboardInterrupt
        return scan(catalog, **options)

    monkeypatch.setattr(looks, "scan", stops_at_the_third)
    with open_catalog(load_settings()) as catalog:
        remember(catalog.state_engine, Memory(sweep_after_id=None))
    with pytest.raises(KeyboardInterrupt):
        drain(instance, load_settings(), follow=False)
    with open_catalog(load_settings()) as catalog:
        came_to = recall(catalog.state_engine).sweep_after_id
    assert came_to is not None
    drain(instance, load_settings(), follow=False)
    assert scanned[3] == came_to
    assert launched.ranges == ["1-1", "2-2", "3-3", "4-4"]


@pytest.fixture
def opened(monkeypatch):
    """How often a command opened Dagster's instance."""
    kept, open_really = [], launching.open_instance

    def opening(settings):
        kept.append(settings)
        return open_really(settings)

    monkeypatch.setattr(launching, "open_instance", opening)
    return kept


def test_where_nothing_is_due_and_nothing_goes_on_the_instance_is_not_opened(instance, world, launched, opened):
    drain(instance, load_settings(), follow=False)
    stored = CursorStore(instance).read()
    assert drain(None, load_settings(), follow=False) == Drained(0, 0, 0, 0)
    assert (opened, CursorStore(instance).read()) == ([], stored)
    world.sql("INSERT INTO insta_content (id, path) SELECT 7, path FROM insta_content WHERE id = 1")
    drain(None, load_settings(), follow=False)
    assert (launched.ranges[4:], len(opened)) == (["5-7"], 1)
    assert CursorState.from_json(CursorStore(instance).read(), source=identity()).last_processed_id == 7


def test_what_an_operator_asked_for_is_applied_without_a_row_that_is_due(instance, launched, opened):
    drain(instance, load_settings(), follow=False)
    with open_catalog(load_settings()) as catalog:
        Requests(catalog.state_engine).add("set", 2)
    drain(None, load_settings(), follow=False)
    assert CursorState.from_json(CursorStore(instance).read(), source=identity()).floor_id == 2
    assert (launched.ranges[4:], len(opened)) == ([], 1)


def test_the_charts_hear_again_of_what_does_not_change_once_it_is_long_ago(instance, launched, opened, monkeypatch):
    def reports():
        made = instance.fetch_materializations(dg.AssetKey("extraction_progress"), limit=10).records
        return len(made) + len(instance.fetch_observations(dg.AssetKey("extraction_progress"), limit=10).records)

    drain(instance, load_settings(), follow=False)
    before = reports()
    drain(None, load_settings(), follow=False)
    assert (reports(), opened) == (before, [])
    monkeypatch.setattr(progress, "_REPORTS_PER_STUCK", 10**9)  # any time is long
    drain(None, load_settings(), follow=False)
    assert (reports(), len(opened)) == (before + 1, 1)
    assert launched.ranges == ["1-1", "2-2", "3-3", "4-4"]


@pytest.mark.usefixtures("launched")
def test_a_daemon_is_seen_by_who_has_opened_nothing(instance, opened):
    drain(instance, load_settings(), follow=False)
    begin_to_tick(instance)
    with pytest.raises(SensorBusyError, match="A Dagster daemon is running the sensor"):
        drain(None, load_settings(), follow=False)
    assert len(opened) == 1
