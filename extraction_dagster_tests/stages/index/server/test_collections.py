"""Names, aliases and other people's collections on a server that behaves as 1.18.3 does."""

import threading

import pytest
from qdrant_client import models  # noqa: TID253 - what another program makes

from extraction_dagster.errors.index import (
    CollectionInUseError,
    CollectionMismatchError,
    CollectionMissingError,
    CollectionRightsError,
    CollectionUnfitError,
    CollectionUnnamedError,
    PointStoreError,
    StoreRefusedError,
)
from extraction_dagster.settings import Settings
from extraction_dagster.stages.index.points import build_points
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.server.store import ServerStore
from extraction_dagster.stages.index.stage import require_store
from extraction_dagster.stages.index.staging import stage_collection

VECTORS = models.VectorParams(size=8, distance=models.Distance.COSINE)
OLD, NEW = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture
def connect(stand_in, tmp_path):
    """`connect(key)`: a store of its own on the stand-in."""
    stores = []

    def make(key=None):
        settings = Settings(home=tmp_path, qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port, qdrant_api_key=key)
        stores.append(ServerStore.connect(settings))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def points(embeddings, rows):
    """`points(7)`: one point of a record."""
    return lambda record_id: build_points(
        embeddings({record_id: [0]}), rows=rows(record_id), generations={record_id: "a"}
    )


def aliases(stand_in):
    return dict(stand_in.engine._client.aliases)


def collections(stand_in):
    return sorted(stand_in.engine._client.collections)


def test_eight_that_start_at_once_on_an_empty_server_end_with_one_collection_and_one_alias(stand_in, connect, points):
    for number in range(6):
        spec, gate, errors = CollectionSpec(f"frames{number}", 8, OLD), threading.Barrier(8), []

        def start(record_id, spec=spec, gate=gate, errors=errors):
            store = connect()
            gate.wait()
            try:
                store.ensure_collection(spec)
                store.upsert(points(record_id))
            except Exception as error:  # noqa: BLE001 - counted
                errors.append(error)

        threads = [threading.Thread(target=start, args=(record_id,)) for record_id in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert stand_in.engine.count(spec.full_name).count == 8
    assert collections(stand_in) == [f"frames{number}-{OLD}" for number in range(6)]
    assert aliases(stand_in) == {f"frames{number}": f"frames{number}-{OLD}" for number in range(6)}


def test_an_alias_that_is_made_between_two_looks_is_no_collection(wire_store, stand_in, spec, connect):
    connect().ensure_collection(spec)
    hidden, real = [True], stand_in.rules._after

    def late(method, request, answer, key):
        if method == "ListAliases" and hidden:
            hidden.clear()
            return type(answer)()
        return real(method, request, answer, key)

    stand_in.rules._after = late
    wire_store.ensure_collection(spec)
    assert hidden == []
    assert wire_store.target == spec.full_name


@pytest.mark.filterwarnings("ignore:Api key is used")
def test_a_key_that_may_see_only_the_alias_is_told_which_right_is_missing(stand_in, connect):
    connect().ensure_collection(CollectionSpec("frames", 8, OLD))
    stand_in.rules.names = {"narrow": {"frames"}}
    for use in (
        lambda store: store.ensure_collection(CollectionSpec("frames", 8, OLD)),
        lambda store: store.open_collection("frames"),
    ):
        with pytest.raises(CollectionRightsError, match=r"right to read and write the collections 'frames-\.\.\.'"):
            use(connect("narrow"))
    assert collections(stand_in) == [f"frames-{OLD}"]


def test_publishing_what_was_dropped_meanwhile_leaves_the_name_as_it_is(wire_store, stand_in):
    wire_store.ensure_collection(CollectionSpec("frames", 8, OLD))
    wire_store.ensure_collection(CollectionSpec("frames", 8, NEW), staged=True)
    stand_in.engine.delete_collection(f"frames-{NEW}")
    with pytest.raises(StoreRefusedError, match="NOT_FOUND"):
        wire_store.publish()
    assert aliases(stand_in) == {"frames": f"frames-{OLD}"}


def test_what_somebody_elses_alias_stands_for_is_not_dropped(wire_store, stand_in):
    wire_store.ensure_collection(CollectionSpec("frames", 8, OLD))
    wire_store.ensure_collection(CollectionSpec("frames", 8, NEW), staged=True)
    stand_in.engine._client.aliases["production"] = f"frames-{NEW}"
    with pytest.raises(CollectionInUseError, match=f"frames-{NEW}"):
        wire_store.drop("frames", NEW)
    assert aliases(stand_in) == {"frames": f"frames-{OLD}", "production": f"frames-{NEW}"}


def test_an_alias_is_not_dropped_as_if_it_were_a_collection(wire_store, stand_in):
    wire_store.ensure_collection(CollectionSpec("frames", 8, OLD))
    stand_in.engine.create_collection("another", VECTORS)
    stand_in.engine._client.aliases[f"frames-{NEW}"] = "another"
    with pytest.raises(CollectionMissingError, match=f"frames-{NEW}"):
        wire_store.drop("frames", NEW)


def test_an_alias_where_our_collection_should_be_is_not_written_through(wire_store, stand_in):
    stand_in.engine.create_collection("another", VECTORS)
    stand_in.engine._client.aliases[f"frames-{OLD}"] = "another"
    with pytest.raises(CollectionRightsError, match=f"frames-{OLD}"):
        wire_store.ensure_collection(CollectionSpec("frames", 8, OLD))
    assert (collections(stand_in), stand_in.indexes) == (["another"], {})


def test_an_answer_that_nothing_was_dropped_is_believed(wire_store, stand_in, monkeypatch):
    wire_store.ensure_collection(CollectionSpec("frames", 8, OLD))
    wire_store.ensure_collection(CollectionSpec("frames", 8, NEW), staged=True)
    monkeypatch.setattr(stand_in.engine, "delete_collection", lambda _: False)
    with pytest.raises(StoreRefusedError, match="nothing was removed"):
        wire_store.drop("frames", NEW)


def test_one_that_an_earlier_try_dropped_is_dropped(wire_store, stand_in, wire):
    wire_store.ensure_collection(CollectionSpec("frames", 8, OLD))
    wire_store.ensure_collection(CollectionSpec("frames", 8, NEW), staged=True)
    stand_in.faults.append(wire.Fault("DeleteCollection", "lost"))
    wire_store.drop("frames", NEW)
    assert collections(stand_in) == [f"frames-{OLD}"]


def test_a_name_that_lost_its_alias_is_told_and_mended_by_publishing(wire_store, stand_in, connect, points, tmp_path):
    wire_store.ensure_collection(CollectionSpec("frames", 8, OLD))
    wire_store.upsert(points(7))
    stand_in.engine._client.aliases.clear()  # by hand; or restored from a snapshot, which has none
    settings = Settings(
        home=tmp_path, qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port, collection_name="frames"
    )
    for use in (
        lambda store: store.ensure_collection(CollectionSpec("frames", 8, OLD)),
        lambda store: store.ensure_collection(CollectionSpec("frames", 8, NEW)),
        lambda store: store.open_collection("frames"),
        lambda store: stage_collection(store, CollectionSpec("frames", 8, NEW)),
        lambda _: require_store(settings, NEW),
    ):
        with pytest.raises(CollectionUnnamedError, match=f"frames-{OLD} with points.* publish {OLD}"):
            use(connect())
    assert collections(stand_in) == [f"frames-{OLD}"]
    store = connect()
    store.open_collection("frames", fingerprint=OLD)
    store.publish()
    assert aliases(stand_in) == {"frames": f"frames-{OLD}"}
    assert connect().open_collection("frames").fingerprint == OLD


def test_a_first_run_that_was_killed_before_its_alias_is_finished_by_the_next(wire_store, stand_in):
    stand_in.engine.create_collection(f"frames-{OLD}", VECTORS)
    stand_in.engine.create_collection(f"frames-{NEW}", VECTORS)
    wire_store.ensure_collection(CollectionSpec("frames", 8, OLD))
    assert aliases(stand_in) == {"frames": f"frames-{OLD}"}


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        ({"image": VECTORS, "text": VECTORS}, "vectors named 'image', 'text', expected one vector without a name"),
        ({}, "no vectors, expected one vector"),
        (models.VectorParams(size=8, distance=models.Distance.DOT), "distance Dot, expected Cosine"),
        (
            models.VectorParams(size=8, distance=models.Distance.COSINE, datatype=models.Datatype.UINT8),
            "vectors of uint8, expected float16 or float32",
        ),
    ],
)
@pytest.mark.parametrize("has_alias", [True, False])
def test_somebody_elses_vectors_are_told_before_anything_is_written(wire_store, stand_in, vectors, said, has_alias):
    stand_in.engine.create_collection("theirs" if has_alias else "frames", vectors)
    if has_alias:
        stand_in.engine._client.aliases["frames"] = "theirs"
    before = collections(stand_in)
    for use in (
        lambda: wire_store.ensure_collection(CollectionSpec("frames", 8, OLD)),
        lambda: wire_store.open_collection("frames"),
    ):
        with pytest.raises(CollectionUnfitError, match=said) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert (collections(stand_in), stand_in.indexes) == (before, {})


def test_an_index_of_another_kind_is_told_instead_of_counting_nothing(wire_store, stand_in, points):
    from qdrant_client import grpc as q

    wire_store.ensure_collection(CollectionSpec("frames", 8, OLD))
    wire_store.upsert(points(7))
    stand_in.indexes[f"frames-{OLD}"]["record_id"] = q.PayloadSchemaType.Keyword
    said = "an index of kind keyword on 'record_id', expected integer"
    with pytest.raises(CollectionUnfitError, match=said):
        wire_store.open_collection("frames")
    with pytest.raises(CollectionUnfitError, match=said):
        wire_store.ensure_collection(CollectionSpec("frames", 8, OLD))


def _asked(stand_in, tmp_path, fingerprint, key=None):
    settings = Settings(
        home=tmp_path,
        qdrant_url=stand_in.url,
        qdrant_grpc_port=stand_in.port,
        qdrant_api_key=key,
        collection_name="frames",
    )
    require_store(settings, fingerprint)


@pytest.mark.filterwarnings("ignore:Api key is used")
@pytest.mark.parametrize("is_there", [True, False])
def test_a_key_that_may_not_write_is_known_before_work(stand_in, connect, tmp_path, is_there):
    if is_there:
        connect().ensure_collection(CollectionSpec("frames", 8, OLD))
    stand_in.rules.read_only = {"reader"}
    with pytest.raises(StoreRefusedError, match="PERMISSION_DENIED"):
        _asked(stand_in, tmp_path, OLD, key="reader")
    _asked(stand_in, tmp_path, OLD)
    assert collections(stand_in) == ([f"frames-{OLD}"] if is_there else [])


def test_a_disk_without_room_is_known_before_work(stand_in, connect, tmp_path):
    connect().ensure_collection(CollectionSpec("frames", 8, OLD))
    stand_in.rules.disk_is_full = True
    with pytest.raises(StoreRefusedError, match=r"No space left on device.*The server's disk is full: make room"):
        _asked(stand_in, tmp_path, OLD)


def test_a_server_in_recovery_mode_gets_no_new_collection(stand_in, wire_store, tmp_path):
    stand_in.engine.create_collection("theirs", VECTORS)
    stand_in.rules.in_recovery = True
    for use in (
        lambda: _asked(stand_in, tmp_path, OLD),
        lambda: wire_store.ensure_collection(CollectionSpec("frames", 8, OLD)),
    ):
        with pytest.raises(PointStoreError, match="recovery mode and reads nothing"):
            use()
    assert collections(stand_in) == ["theirs"]


def test_other_vectors_under_the_name_are_known_before_work(stand_in, connect, tmp_path):
    connect().ensure_collection(CollectionSpec("frames", 8, OLD))
    with pytest.raises(CollectionMismatchError, match=NEW):
        _asked(stand_in, tmp_path, NEW)
    connect().ensure_collection(CollectionSpec("frames", 8, NEW), staged=True)
    _asked(stand_in, tmp_path, NEW)
