"""How a collection is created: each option reaches the engine, and finding works with every one."""

import json

import pytest

from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.search import search_images
from extraction_dagster.stages.index.stage import replace_records

OPTIONS = [("float32", "none", False), ("float16", "scalar", True)]


@pytest.mark.parametrize(("dtype", "quantization", "on_disk"), OPTIONS)
def test_points_are_found_whatever_the_collections_options(  # noqa: PLR0913, PLR0917 - fixtures
    store, spec, embeddings, rows, dtype, quantization, on_disk
):
    chosen = CollectionSpec(spec.name, 8, "abc123", dtype, quantization, on_disk)
    store.ensure_collection(chosen)
    batch = embeddings({7: [0, 30], 8: [0]})
    replace_records(store, batch, rows=rows(7, 8), generations={7: "a", 8: "a"})
    store.optimize()
    assert search_images(store, batch.vectors[1], limit=1)[0].frame_number == 30
    store.ensure_collection(spec)  # other options are no other vectors
    assert store.count() == 3


def test_the_embedded_engine_is_told_every_option(edge_config):
    plain = edge_config(CollectionSpec("plain", 8, "a"))
    assert (plain["datatype"], plain.get("quantization_config")) == ("float16", None)
    chosen = edge_config(CollectionSpec("chosen", 8, "a", "float32", "scalar", on_disk=True))
    assert chosen["datatype"] == "float32"
    assert chosen["quantization_config"]["scalar"]["type"] == "int8"
    assert chosen["memory"] != plain.get("memory")


@pytest.fixture
def edge_config(tmp_path):
    """What the engine keeps of its configuration on disk."""

    def read(spec):
        with EdgeStore(tmp_path / "qdrant") as store:
            store.ensure_collection(spec)
            assert store.open_collection(spec.name) == spec
        path = tmp_path / "qdrant" / spec.name / "a" / "shard" / "edge_config.json"
        (vectors,) = json.loads(path.read_text())["vectors"].values()
        return vectors

    return read


def test_a_server_is_told_every_option(wire_store, spec):
    chosen = CollectionSpec(spec.name, 8, "abc123", "float32", "scalar", on_disk=True)
    wire_store.ensure_collection(chosen)
    asked = wire_store._client.get_collection(chosen.full_name).config.params.vectors
    assert asked.on_disk is True
    assert asked.quantization_config.scalar.type.value == "int8"
    assert wire_store.open_collection(spec.name) == chosen


def test_the_settings_choose_the_options(settings):
    chosen = settings(quantization="scalar", vectors_on_disk=True)
    assert CollectionSpec.of(chosen, dim=8, fingerprint="a") == CollectionSpec(
        "video_frames", 8, "a", "float16", "scalar", on_disk=True
    )
    assert CollectionSpec.of(settings(), dim=8, fingerprint="a") == CollectionSpec("video_frames", 8, "a")
