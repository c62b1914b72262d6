"""What we rely on in a real Qdrant server (EXTRACTION_TEST_QDRANT_URL); the stand-in's rules say the same of 1.18.3."""

import threading

import pytest
from qdrant_client import models  # noqa: TID253 - what another program makes

from extraction_dagster.errors.index import CollectionUnfitError, CollectionUnnamedError, StoreLimitError
from extraction_dagster.stages.index.points import build_points
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.server.status import describe
from extraction_dagster.stages.index.server.store import ServerStore
from extraction_dagster.stages.index.stage import replace_records, require_store

pytestmark = pytest.mark.qdrant_server
FRAMES = {record_id: [0, 30, 60] for record_id in range(1, 31)}


@pytest.fixture
def real(real_server):
    with ServerStore.connect(real_server) as store:
        yield store


def set_limits(store, target, **limits):
    store.ask(
        "set limits",
        lambda client: client.update_collection(
            target, strict_mode_config=models.StrictModeConfig(enabled=True, **limits)
        ),
    )


def test_asking_before_work_makes_nothing(real, real_server, spec):
    require_store(real_server, spec.fingerprint)
    assert real.collections(spec.name) == {}
    real.ensure_collection(spec)
    require_store(real_server, spec.fingerprint)
    assert real.count() == 0


def test_eight_that_start_at_once_end_with_one_collection_and_one_alias(real, real_server, spec):
    gate, errors = threading.Barrier(8), []

    def start():
        with ServerStore.connect(real_server) as store:
            gate.wait()
            try:
                store.ensure_collection(spec)
            except Exception as error:  # noqa: BLE001 - counted
                errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert real.collections(spec.name) == {spec.fingerprint: True}


def test_one_create_moves_an_alias_and_a_missing_target_leaves_it(real, spec):
    real.ensure_collection(spec)
    newer = CollectionSpec(spec.name, 8, "def456")
    real.ensure_collection(newer, staged=True)
    real.publish()
    assert real.collections(spec.name) == {"abc123": False, "def456": True}
    real.drop(spec.name, "abc123")
    assert real.collections(spec.name) == {"def456": True}


@pytest.mark.parametrize(
    "limits",
    [
        {"upsert_max_batchsize": 20},
        {"max_query_limit": 25},
        {"filter_max_conditions": 9},
        {"condition_max_size": 6},
        {"search_allow_exact": False},
        {"max_timeout": 30},
        {"unindexed_filtering_retrieve": False, "unindexed_filtering_update": False},
    ],
    ids=str,
)
def test_limits_of_strict_mode_are_kept(real, spec, embeddings, rows, limits):
    real.ensure_collection(spec)
    set_limits(real, spec.full_name, **limits)
    real.ensure_collection(spec)
    generations = {record_id: f"g{record_id}" for record_id in FRAMES}
    assert len(replace_records(real, embeddings(FRAMES), rows=rows(*FRAMES), generations=generations)) == 30
    assert real.count() == 90
    assert sum(map(len, real.read())) == 90


def test_a_limit_that_can_not_be_kept_is_named(real, spec, embeddings):
    real.ensure_collection(spec)
    set_limits(real, spec.full_name, max_query_limit=2)
    real.ensure_collection(spec)
    with pytest.raises(StoreLimitError, match="Limit exceeded 3 > 2"):
        real.search(embeddings({1: [0]}).vectors[0], limit=3)


def test_a_name_that_lost_its_alias_is_told(real, spec, embeddings, rows):
    real.ensure_collection(spec)
    real.upsert(build_points(embeddings({7: [0]}), rows=rows(7), generations={7: "a"}))
    remove = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=spec.name))
    real.ask("lose an alias", lambda client: client.update_collection_aliases([remove]))
    with pytest.raises(CollectionUnnamedError, match="publish abc123"):
        real.ensure_collection(spec)


def test_an_index_of_another_kind_is_told(real, spec):
    real.ensure_collection(spec)
    real.ask("drop an index", lambda client: client.delete_payload_index(spec.full_name, "record_id"))
    kind = models.PayloadSchemaType.KEYWORD
    real.ask("make an index", lambda client: client.create_payload_index(spec.full_name, "record_id", kind))
    with pytest.raises(CollectionUnfitError, match="kind keyword on 'record_id'"):
        real.open_collection(spec.name)


def test_the_server_is_described(real, real_server, spec):
    real.ensure_collection(spec)
    shown = describe(real_server)
    assert shown.startswith("server 1.")
    assert f"{spec.full_name}: green (all is indexed), about 0 points, no strict mode" in shown
