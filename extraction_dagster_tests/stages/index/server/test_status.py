"""What `extraction doctor` says of a server."""

import pytest

from extraction_dagster.cli import operations
from extraction_dagster.errors.index import CollectionUnnamedError
from extraction_dagster.settings import Settings
from extraction_dagster.stages.index.points import build_points
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.server.status import describe


@pytest.fixture
def aimed(stand_in, tmp_path):
    return Settings(home=tmp_path, qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port, collection_name="frames")


def test_a_server_without_the_collection_is_named_with_its_version(aimed):
    where = f"127.0.0.1:{aimed.qdrant_grpc_port} (gRPC)"
    assert describe(aimed) == f"server 1.18.3 at {where}; collection frames is made by the first run"
    assert operations._store(aimed) == describe(aimed)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("green", "green (all is indexed)"),
        ("yellow", "yellow (it is being indexed: searches find everything, and take longer)"),
        ("grey", "grey (indexing waits for the next write, as after a restart: searches find everything, and take"),
        ("red", "red (indexing failed: see the server's log)"),
    ],
)
def test_status_points_limits_peers_and_replicas_are_shown(  # noqa: PLR0913, PLR0917 - fixtures
    wire_store, stand_in, aimed, embeddings, rows, status, said
):
    wire_store.ensure_collection(CollectionSpec("frames", 8, "0123456789abcdef"))
    wire_store.upsert(build_points(embeddings({7: [0, 1]}), rows=rows(7), generations={7: "a"}))
    stand_in.rules.status = status
    stand_in.rules.strict["frames-0123456789abcdef"] = {"upsert_max_batchsize": 100, "search_allow_exact": False}
    shown = describe(aimed)
    assert f"collection frames is frames-0123456789abcdef: {said}" in shown
    assert "about 2 points, " in shown
    assert "% of their vectors in the search index" in shown
    assert "strict mode: search_allow_exact False, upsert_max_batchsize 100" in shown
    assert "3 peers, 2 shards, 3 of 4 replicas active, others Partial" in shown


def test_a_name_that_lost_its_alias_fails(wire_store, stand_in, aimed, embeddings, rows):
    wire_store.ensure_collection(CollectionSpec("frames", 8, "0123456789abcdef"))
    wire_store.upsert(build_points(embeddings({7: [0]}), rows=rows(7), generations={7: "a"}))
    stand_in.engine._client.aliases.clear()
    with pytest.raises(CollectionUnnamedError, match="publish 0123456789abcdef"):
        describe(aimed)
