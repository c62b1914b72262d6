"""`extraction run` from the inside: it follows a table, tries again what failed, and never ticks beside a daemon."""

import contextlib
import time
from types import SimpleNamespace

import pytest
from dagster._daemon.types import DaemonHeartbeat

from extraction_dagster.defs.instance import draining
from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.draining import drain
from extraction_dagster.defs.instance.launching import open_instance
from extraction_dagster.errors.runs import RunFailedError, SensorBusyError
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.embed.models.registry import embedding_fingerprint
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.stage import open_point_store
from extraction_dagster.ticks.cursor import CursorState


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
