"""Stores of points: the embedded engine, the client's local engine, the wire stand-in, a real server."""

import importlib.util
import os
import sys
import uuid
import warnings
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from extraction_dagster.records import EmbeddingBatch, IdRange, VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.catalog import Catalog, Fingerprints
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.points import generation
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.reconcile import reconcile
from extraction_dagster.stages.index.server.retry import RetryPolicy
from extraction_dagster.stages.index.server.store import ServerStore
from extraction_dagster.stages.index.stage import replace_records

# Quick, and yet long enough for a connection that was reset to be made again.
QUICK = RetryPolicy(attempts=5, base_seconds=0.05, longest_seconds=1.0, longest_retry_after_seconds=0.01)


def _load(file):
    name = f"extraction_dagster_tests_{file}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{file}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def wire():
    """The wire stand-in's module: `wire.StandIn`, `wire.Fault`."""
    return _load("wire_stand_in")


@pytest.fixture
def replacing():
    """The module of the process that replaces points until it is killed, and of the searcher beside it."""
    return _load("replacing")


@pytest.fixture
def held(replacing):
    """`held(store)`: frame and generation of each of its points, by record."""
    return replacing.held


@pytest.fixture
def stand_in(wire):
    with wire.StandIn() as server:
        yield server


@pytest.fixture
def wire_store(stand_in, tmp_path):
    settings = Settings(home=tmp_path, qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port)
    with ServerStore.connect(settings, retry=QUICK) as store:
        yield store


@pytest.fixture(params=["edge", "local", "wire", pytest.param("server", marks=pytest.mark.qdrant_server)])
def store(request, tmp_path, spec):
    """Each store in turn, without an open collection."""
    if request.param == "wire":
        yield request.getfixturevalue("wire_store")
        return
    with _open(request.param, tmp_path) as store, warnings.catch_warnings():
        # The local engine says that it ignores payload indexes.
        warnings.filterwarnings("ignore", message="Payload indexes have no effect")
        yield store
        if request.param == "server":
            for name in (f"{spec.name}-staging", spec.name):
                _clean(store, name)


def _open(kind, tmp_path):
    if kind == "edge":
        return EdgeStore(tmp_path / "qdrant")
    if kind == "local":
        from qdrant_client import QdrantClient

        return ServerStore(QdrantClient(":memory:"), where="memory", wire="local", retry=QUICK)
    return ServerStore.connect(Settings(home=tmp_path, qdrant_url=_real_url()))


def _real_url():
    url = os.environ.get("EXTRACTION_TEST_QDRANT_URL")
    if not url:
        pytest.skip("EXTRACTION_TEST_QDRANT_URL names no Qdrant server")
    return url


def _clean(store, name):
    for alias in store._client.get_aliases().aliases:
        if alias.alias_name == name:
            from qdrant_client import models

            store._client.update_collection_aliases(
                [models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=name))]
            )
    for fingerprint in store.collections(name):
        store.drop(name, fingerprint)


@pytest.fixture
def real_server(tmp_path, spec):
    """Settings of a real Qdrant server; the collections of `spec`'s name are removed in the end."""
    settings = Settings(home=tmp_path, qdrant_url=_real_url(), collection_name=spec.name)
    yield settings
    with ServerStore.connect(settings) as store:
        _clean(store, spec.name)


@pytest.fixture
def spec():
    return CollectionSpec(f"frames_{uuid.uuid4().hex[:8]}", dim=8, fingerprint="abc123")


@pytest.fixture
def opened(store, spec):
    """Each store in turn, with an empty collection open."""
    store.ensure_collection(spec)
    return store


def unit_vectors(count, dim, *, seed):
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture
def embeddings():
    """`embeddings({7: [0, 30], 8: [5]}, seed=1)`: a batch with these frames of these records, 30 frames a second."""

    def make(frames, *, seed=0, dim=8):
        record_ids = [record_id for record_id, numbers in frames.items() for _ in numbers]
        numbers = np.array([number for part in frames.values() for number in part], dtype=np.int64)
        return EmbeddingBatch(
            unit_vectors(len(record_ids), dim, seed=seed), np.array(record_ids, np.int64), numbers, numbers / 30.0
        )

    return make


@pytest.fixture
def rows():
    """`rows(7, 8)`: the rows of these records."""
    return lambda *ids: {
        record_id: VideoRow(record_id, f"/videos/{record_id}.mp4", platform="insta", code=f"c{record_id}")
        for record_id in ids
    }


# Record of the world: how many frames it has.
FRAMES = {1: 2, 2: 3, 3: 1, 40: 2, 41: 4}
ALL = IdRange(1, 99)
TODAY = Fingerprints(frames="f1", embedding="e1")


def generation_of(catalog, planned, made_with=TODAY):
    """The generation of a row's points."""
    return generation(
        embedding_fingerprint=made_with.embedding,
        frames_fingerprint=made_with.frames,
        content_version=planned.video.content_version,
        source=catalog.source.identity,
        address=planned.video.address,
    )


class World:
    """A table of videos and a store, brought forward as the assets do it."""

    def __init__(self, settings, tmp_path):
        self.engine = sa.create_engine(settings.resolved_source_url, poolclass=sa.NullPool)
        self.execute(
            "CREATE TABLE insta_content (id INTEGER PRIMARY KEY AUTOINCREMENT, platform TEXT, code TEXT, path TEXT, "
            "is_extracted BOOLEAN NOT NULL DEFAULT 0, is_embedded BOOLEAN NOT NULL DEFAULT 0, "
            "is_removed BOOLEAN NOT NULL DEFAULT 0)"
        )
        self.settings, self.home = settings, tmp_path / "qdrant"
        self.opened = 0

    def execute(self, sql, *rows):
        with self.engine.begin() as connection:
            connection.execute(sa.text(sql), *([list(rows)] if rows else []))

    def rows(self, sql):
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(sql))]

    def add(self, *ids):
        self.execute(
            "INSERT INTO insta_content (id, platform, code, path) VALUES (:id, 'tube', 'c', 'v.mp4')",
            *({"id": record_id} for record_id in ids),
        )

    def open_store(self):
        self.opened += 1
        return EdgeStore(self.home)

    def store(self, fingerprint="e1", *, staged=False):
        store = EdgeStore(self.home)
        store.ensure_collection(CollectionSpec("video_frames", 8, fingerprint), staged=staged)
        return store

    def process(self, catalog, within=ALL, frames=None, made_with=TODAY, *, staged=False):
        """What the three assets do with the pending rows of a range. Returns the records that it wrote."""
        plan = catalog.begin(within, made_with)
        todo = {key: planned for key, planned in plan.items() if planned.status == "todo"}
        numbers = {key: (frames or FRAMES)[key] for key in todo}
        if not numbers:
            return []
        catalog.mark_extracted(plan, numbers, made_with.frames)
        catalog.mark_embedded(numbers, made_with.embedding)
        with self.store(made_with.embedding, staged=staged) as store:
            generations = {key: generation_of(catalog, planned, made_with) for key, planned in todo.items()}
            rows = {key: planned.video for key, planned in todo.items()}
            written = replace_records(store, self.embeddings_of(numbers), rows=rows, generations=generations)
        catalog.mark_done(plan, written, made_with, generations=generations)
        return sorted(written)

    def points(self, fingerprint=None):
        with EdgeStore(self.home) as store:
            store.open_collection("video_frames", fingerprint=fingerprint)
            return store.count_by_record()

    def reconcile(self, catalog, **options):
        options = {"collection_name": "video_frames", "embedding": "e1", **options}
        return reconcile(catalog, self.open_store, **options)

    @staticmethod
    def embeddings_of(frames):
        ids = np.repeat(np.array(list(frames), np.int64), list(frames.values()))
        numbers = np.concatenate([np.arange(number) for number in frames.values()]).astype(np.int64)
        vectors = np.random.default_rng(1).standard_normal((len(ids), 8))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return EmbeddingBatch(vectors.astype(np.float16), ids, numbers, numbers / 1.0)


@pytest.fixture
def world(settings, tmp_path):
    """What is gone is removed by the first reconciliation; that it waits otherwise is shown in test_purge.py."""
    return World(settings(source_predicate="NOT is_removed", purge_after_seconds=0), tmp_path)


@pytest.fixture
def catalog(world):
    catalog = Catalog(world.settings)
    yield catalog
    catalog.close()


@pytest.fixture
def done(world, catalog):
    """The world with every record done."""
    world.add(*FRAMES)
    assert world.process(catalog) == [1, 2, 3, 40, 41]
    return world
