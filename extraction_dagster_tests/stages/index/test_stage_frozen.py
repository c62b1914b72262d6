"""A writer that is frozen with older vectors, and goes on or dies when newer ones are in place: real processes."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from extraction_dagster.errors.index import PointsChangedError
from extraction_dagster.ranges.index import index_range
from extraction_dagster.ranges.work import fingerprints_of, open_range
from extraction_dagster.records import EmbeddingBatch, IdRange
from extraction_dagster.shards.store import ShardRecord
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.index.reconcile import reconcile
from extraction_dagster.stages.index.stage import open_point_store

RANGE = IdRange(1, 100)
WRITER = """
import os, signal, sys
from extraction_dagster.ranges.index import index_range
from extraction_dagster.ranges.work import open_range
from extraction_dagster.records import IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import Catalog
from extraction_dagster.stages.index.server.store import ServerStore

method, when, end = sys.argv[1:]
honest = getattr(ServerStore, method)

def freeze_once(store, what):
    setattr(ServerStore, method, honest)
    if when == "before":
        os.kill(os.getpid(), signal.SIGSTOP)
    honest(store, what)
    if when == "after":
        os.kill(os.getpid(), signal.SIGSTOP)

setattr(ServerStore, method, freeze_once)
if end == "dies":
    Catalog.mark_done = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
with open_range(load_settings(), IdRange(1, 100)) as work:
    index_range(work)
"""


class Site:
    """A table with one video, whose vectors are stored by hand and whose points go to the wire stand-in."""

    def __init__(self, database, stand_in):
        database.create(ids=(1,))
        self.database = database
        self.settings = database.settings(
            qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port, source_version_column="code"
        )

    def new_version(self, version, num_frames):
        """The row's file has changed: claim it, and store its vectors."""
        self.database.execute("UPDATE insta_content SET code = :version", version=version)
        with open_range(self.settings, RANGE, begins=True) as work:
            video = work.plan[1].video
            vectors = np.zeros((num_frames, 8), np.float16)
            vectors[:, 0] = 1
            numbers = np.arange(num_frames, dtype=np.int64)
            batch = EmbeddingBatch(vectors, np.ones(num_frames, np.int64), numbers, numbers / 1.0)
            record = ShardRecord(1, video.content_version, num_frames, address=video.address, claim=video.claim)
            work.embedding_store.write(RANGE, work.embedding_store.next_name(), batch, records=[record])
            work.catalog.mark_extracted(work.plan, {1: num_frames}, work.fingerprints.frames)

    def run(self):
        with open_range(self.settings, RANGE) as work:
            return index_range(work).num_points

    def start_writer(self, *arguments):
        """Another process that indexes what is stored now, and is frozen at the given moment."""
        environment = {
            **os.environ,
            "EXTRACTION_HOME": str(self.settings.home),
            "EXTRACTION_SOURCE_URL": self.settings.resolved_source_url,
            "EXTRACTION_SOURCE_VERSION_COLUMN": "code",
            "EXTRACTION_QDRANT_URL": self.settings.qdrant_url,
            "EXTRACTION_QDRANT_GRPC_PORT": str(self.settings.qdrant_grpc_port),
        }
        writer = subprocess.Popen([sys.executable, "-c", WRITER, *arguments], env=environment)
        _, status = os.waitpid(writer.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the writer ended with {status}"
        return writer

    def reconcile(self):
        with open_catalog(self.settings) as catalog:
            return reconcile(
                catalog,
                lambda: open_point_store(self.settings),
                collection_name=self.settings.collection_name,
                embedding=fingerprints_of(self.settings).embedding,
                repair=True,
            )

    def entry(self):
        with open_catalog(self.settings) as catalog:
            return catalog.ledger.entries(RANGE)[1]

    def generations(self):
        """The generation of each point."""
        with open_point_store(self.settings) as store:
            store.open_collection(self.settings.collection_name)
            return [payload["generation"] for batch in store.read() for payload in batch.payloads]


@pytest.fixture
def site(sqlite_database, stand_in):
    return Site(sqlite_database, stand_in)


def overtake(site, no_longer_than_minutes, *arguments):
    """Freeze a writer of an old version, do the new one meanwhile, thaw the writer. Returns the new generation."""
    site.new_version("v1", 3)
    writer = site.start_writer(*arguments)
    no_longer_than_minutes(writer)
    site.new_version("v2", 4)
    assert site.run() == {1: 4}
    newer = site.entry().generation
    assert site.generations() == [newer] * 4
    writer.send_signal(signal.SIGCONT)
    writer.wait(100)
    return newer


@pytest.mark.parametrize("moment", [("_write", "before"), ("_write", "after"), ("_remove", "before")])
def test_a_frozen_writer_that_returns_ends_with_the_newer_points_after_one_more_run(
    site, no_longer_than_minutes, moment
):
    returns_and_ends_with_the_newer_points(site, no_longer_than_minutes, *moment)


def test_the_same_holds_on_postgresql(make_database, settings, postgres_url, stand_in, no_longer_than_minutes):
    database = make_database(postgres_url, settings)
    returns_and_ends_with_the_newer_points(Site(database, stand_in), no_longer_than_minutes, "_write", "before")
    database.engine.dispose()


def returns_and_ends_with_the_newer_points(site, no_longer_than_minutes, *moment):
    newer = overtake(site, no_longer_than_minutes, *moment, "returns")
    assert site.entry().generation == newer
    assert site.generations() == [newer] * 4 or site.entry().state == "todo"
    assert site.run() in ({}, {1: 4})
    assert site.generations() == [newer] * 4
    assert site.entry().state == "done"
    assert site.reconcile().differences == []


def test_one_that_dies_in_between_is_found_by_reconcile(site, no_longer_than_minutes):
    newer = overtake(site, no_longer_than_minutes, "_write", "before", "dies")
    assert newer not in site.generations()
    assert [item.lost for item in site.reconcile().differences] == [{1: 4}]
    assert site.run() == {1: 4}
    assert site.generations() == [newer] * 4


def test_one_that_dies_in_between_is_found_by_the_next_run_of_its_range(site, no_longer_than_minutes):
    newer = overtake(site, no_longer_than_minutes, "_write", "before", "dies")
    with pytest.raises(PointsChangedError, match=r"4 verified points are gone and 3 are too many"):
        site.run()
    assert site.run() == {1: 4}
    assert site.generations() == [newer] * 4
