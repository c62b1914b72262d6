"""Stores of points: the embedded engine, the client's local engine, the wire stand-in, a real server."""

import importlib.util
import os
import sys
import uuid
import warnings
from pathlib import Path

import numpy as np
import pytest

from extraction_dagster.records import EmbeddingBatch, VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.stages.index.edge_store import EdgeStore
from extraction_dagster.stages.index.point_store import CollectionSpec
from extraction_dagster.stages.index.server_retry import RetryPolicy
from extraction_dagster.stages.index.server_store import ServerStore

QUICK = RetryPolicy(attempts=5, base_seconds=0.001, longest_seconds=0.01, longest_retry_after_seconds=0.01)


def _load_stand_in():
    name = "extraction_dagster_tests_wire_stand_in"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("wire_stand_in.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def wire():
    """The wire stand-in's module: `wire.StandIn`, `wire.Fault`."""
    return _load_stand_in()


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
            _clean(store, spec.name)


def _open(kind, tmp_path):
    if kind == "edge":
        return EdgeStore(tmp_path / "qdrant")
    if kind == "local":
        from qdrant_client import QdrantClient

        return ServerStore(QdrantClient(":memory:"), url="memory", wire="local", retry=QUICK)
    url = os.environ.get("EXTRACTION_TEST_QDRANT_URL")
    if not url:
        pytest.skip("EXTRACTION_TEST_QDRANT_URL names no Qdrant server")
    return ServerStore.connect(Settings(home=tmp_path, qdrant_url=url))


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
