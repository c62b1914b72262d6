"""The server store over real gRPC: faults of the wire, retries, what may be printed."""

import pickle
import random

import grpc
import numpy as np
import pytest
from qdrant_client import grpc as q  # noqa: TID253 - what a server answers
from qdrant_client import models  # noqa: TID253 - what another program makes

from extraction_dagster.errors.index import CollectionNameTakenError, StoreRefusedError, StoreUnavailableError
from extraction_dagster.records import VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.stages.index.points import PointFilter, build_points, point_id
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.server.retry import RetryPolicy, may_pass
from extraction_dagster.stages.index.server.store import ServerStore
from extraction_dagster.stages.index.stage import replace_records

# One of each kind that may pass, at each call that replacing makes over the wire.
KINDS = ["unavailable", "internal", "aborted", "deadline", "exhausted", "lost", "reset", "reset_after"]
METHODS = ["Upsert", "Count", "Delete", "Scroll"]


@pytest.fixture
def opened_wire(wire_store, spec):
    wire_store.ensure_collection(spec)
    return wire_store


@pytest.fixture
def replace(embeddings, rows):
    """`replace(store, "b")`: records 7 and 8 get 2 and 3 points of generation b."""

    def write(store, generation="b"):
        frames = {7: [0, 90], 8: [0, 30, 60]}
        batch = embeddings(frames, seed=ord(generation))
        return replace_records(store, batch, rows=rows(*frames), generations=dict.fromkeys(frames, generation))

    return write


@pytest.fixture
def fault(stand_in, wire):
    """`fault("Upsert", "lost", times=2)`: what happens to the next calls of a method."""

    def plan(method, kind, *, times=1, seconds=1.0):
        stand_in.faults += [wire.Fault(method, kind, seconds)] * times

    return plan


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_passes_is_overcome(  # noqa: PLR0913, PLR0917 - fixtures
    opened_wire, stand_in, fault, replace, kind, method
):
    replace(opened_wire, "a")
    stand_in.calls.clear()
    fault(method, kind, seconds=1, times=2)
    assert replace(opened_wire) == {7: 2, 8: 3}
    assert stand_in.faults == []
    assert stand_in.calls.count(method) >= 3
    assert opened_wire.count_by_record() == {7: 2, 8: 3}


@pytest.mark.parametrize("method", ["Upsert", "Delete", "CreateFieldIndex"])
def test_a_write_that_is_only_acknowledged_is_asked_for_again(  # noqa: PLR0913, PLR0917 - fixtures
    wire_store, stand_in, fault, spec, replace, method
):
    fault(method, "acknowledged", times=2)
    wire_store.ensure_collection(spec)
    assert replace(wire_store) == {7: 2, 8: 3}
    assert stand_in.faults == []


def test_points_of_older_servers_and_with_numbers_for_ids_are_read(wire_store, spec):
    wire_store.ensure_collection(spec)
    halves = [0.5, -0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 1.0]
    old, new = (q.RetrievedPoint(id=q.PointId(num=7), payload={}) for _ in range(2))
    old.vectors.vector.data.extend(halves)
    new.vectors.vector.dense.data.extend(halves)
    assert wire_store._vectors([old, new]).tolist() == [halves, halves]
    assert (wire_store._ids([old]), list(wire_store._payloads([old]))) == (["7"], [{}])


def test_a_reading_call_tells_the_server_its_time_limit(stand_in, spec, tmp_path, monkeypatch):
    settings = Settings(
        home=tmp_path, qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port, qdrant_timeout_seconds=90.5
    )
    with ServerStore.connect(settings) as store:
        store.ensure_collection(spec)
        seen = []
        for method in ("Scroll", "Count", "Query"):
            make = getattr(store._client.grpc_points, method)
            monkeypatch.setattr(
                store._client.grpc_points,
                method,
                lambda request, *, make=make, **options: seen.append(request.timeout) or make(request, **options),
            )
        store.count()
        store.count_by_record()
        store.search(np.eye(8)[0], limit=1)
    assert seen == [91, 91, 91]


def test_a_quantized_collection_gives_cosines_and_cuts_by_them(wire_store, spec, replace):
    wire_store.ensure_collection(CollectionSpec(spec.name, 8, "abc123", quantization="scalar"))
    replace(wire_store)
    (batch,) = wire_store.read(PointFilter(point_ids=(point_id(7, 0),)))
    hits = wire_store.search(batch.vectors[0], limit=1, score_threshold=0.999)
    assert [(hit.record_id, hit.score) for hit in hits] == [(7, pytest.approx(1, abs=1e-3))]


def test_without_metadata_only_a_whole_fingerprint_after_the_name_makes_a_collection_its_own(wire_store, stand_in):
    vectors = models.VectorParams(size=8, distance=models.Distance.COSINE)
    for suffix in ("0123456789abcdef", "staging", "staging-0123456789abcdef", "0123456789ABCDEF", "0123456789abcde"):
        stand_in.engine.create_collection(f"frames-{suffix}", vectors)
    assert wire_store.collections("frames") == {"0123456789abcdef": False}
    assert wire_store.collections("frames-staging") == {"0123456789abcdef": False}


def test_a_collection_restored_under_another_name_is_not_taken_for_the_one_that_it_was(wire_store, stand_in):
    vectors = models.VectorParams(size=8, distance=models.Distance.COSINE)
    metadata = {"extraction": {"v": 1, "name": "frames", "fingerprint": "0123456789abcdef"}}
    for name in ("frames-0123456789abcdef", "frames-fedcba9876543210", "other-0123456789abcdef"):
        stand_in.engine.create_collection(name, vectors, metadata=metadata)
    assert wire_store.collections("frames") == {"0123456789abcdef": False}
    assert wire_store.collections("other") == {}


def test_a_key_that_may_not_look_at_a_neighbour_still_finds_its_own(wire_store, stand_in, fault):
    vectors = models.VectorParams(size=8, distance=models.Distance.COSINE)
    for name in ("frames-0123456789abcdef", "frames-staging"):
        stand_in.engine.create_collection(name, vectors)
    fault("Get", "unauthenticated", times=2)
    assert wire_store.collections("frames") == {"0123456789abcdef": False}


def test_a_server_that_never_completes_is_named_and_nothing_is_removed(opened_wire, stand_in, fault, replace):
    replace(opened_wire, "a")
    stand_in.calls.clear()
    fault("Upsert", "acknowledged", times=5)
    with pytest.raises(
        StoreUnavailableError, match=r"write points at http://127.0.0.1:1 in 5 tries; .* 'acknowledged', expected 'comp"
    ):
        replace(opened_wire)
    assert stand_in.calls == ["Upsert"] * 5


def test_a_slow_answer_is_given_up_and_asked_for_again(stand_in, fault, tmp_path, spec, replace):
    settings = Settings(
        home=tmp_path, qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port, qdrant_timeout_seconds=1
    )
    with ServerStore.connect(settings, retry=RetryPolicy(attempts=3, base_seconds=0.01)) as store:
        store.ensure_collection(spec)
        fault("Upsert", "slow", seconds=1.5)
        assert replace(store) == {7: 2, 8: 3}
    assert stand_in.calls.count("Upsert") == 2


@pytest.mark.parametrize(("kind", "code"), [("unauthenticated", "UNAUTHENTICATED"), ("invalid", "INVALID_ARGUMENT")])
def test_a_refusal_is_not_repeated(opened_wire, stand_in, fault, kind, code):
    stand_in.calls.clear()
    fault("Count", kind)
    with pytest.raises(
        StoreRefusedError, match=f"refused to count points: {code}: .*EXTRACTION_QDRANT_API_KEY"
    ) as caught:
        opened_wire.count()
    assert stand_in.calls == ["Count"]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 - our own error


def test_a_server_that_is_down_is_named(tmp_path, spec):
    waits = []
    settings = Settings(home=tmp_path, qdrant_url="http://127.0.0.1:1", qdrant_grpc_port=1)
    retry = RetryPolicy(attempts=3, sleep=waits.append)
    with (
        ServerStore.connect(settings, retry=retry) as store,
        pytest.raises(StoreUnavailableError, match=r"in 3 tries; the last one: UNAVAILABLE.*gRPC port"),
    ):
        store.ensure_collection(spec)
    assert len(waits) == 2


def test_the_server_is_asked_to_index_before_the_first_point(opened_wire, stand_in, spec):
    names = {"record_id": "integer", "generation": "keyword", "platform": "keyword", "created_at": "datetime"}
    schema = opened_wire._client.get_collection(spec.full_name).payload_schema
    assert {field: info.data_type.value for field, info in schema.items()} == names
    assert "Upsert" not in stand_in.calls


def test_a_creation_that_was_cut_off_is_finished(wire_store, stand_in, fault, spec):
    fault("CreateFieldIndex", "invalid")
    with pytest.raises(StoreRefusedError, match="create a payload index"):
        wire_store.ensure_collection(spec)
    wire_store.ensure_collection(spec)
    assert len(stand_in.indexes[spec.full_name]) == 4
    assert wire_store.collections(spec.name) == {"abc123": True}


@pytest.mark.parametrize("method", ["Create", "UpdateAliases", "CreateFieldIndex"])
@pytest.mark.parametrize("kind", ["lost", "reset_after", "unavailable"])
def test_a_lost_answer_while_creating_is_overcome(wire_store, fault, spec, method, kind):
    fault(method, kind)
    wire_store.ensure_collection(spec)
    assert wire_store.collections(spec.name) == {"abc123": True}


def test_a_collection_without_metadata_is_told_by_its_full_name(wire_store, stand_in, spec):
    # A server older than collection metadata drops it.
    wire_store.ensure_collection(spec)
    stand_in.engine._client.collections[spec.full_name].config.metadata = None
    assert wire_store.open_collection(spec.name).fingerprint == "abc123"


def test_a_collection_that_is_no_alias_is_not_taken_over(wire_store, stand_in, spec):
    from qdrant_client import models

    vectors = models.VectorParams(size=8, distance=models.Distance.COSINE)
    stand_in.engine.create_collection(spec.name, vectors)
    wire_store.ensure_collection(spec, staged=True)
    with pytest.raises(CollectionNameTakenError, match="can't be put in its place"):
        wire_store.publish()


def test_the_api_key_is_sent_and_never_shown(stand_in, fault, tmp_path, spec):
    canary = "canary-8d1f"
    settings = Settings(
        home=tmp_path,
        qdrant_url="http://127.0.0.1:1",
        qdrant_grpc_port=stand_in.port,
        qdrant_api_key=canary,
    )
    with pytest.warns(UserWarning, match="insecure connection"):
        store = ServerStore.connect(settings, retry=RetryPolicy(attempts=1))
    shown = [repr(store)]
    with store:
        for kind, error in (("unavailable", StoreUnavailableError), ("unauthenticated", StoreRefusedError)):
            fault("*", kind)
            with pytest.raises(error, match=r"127\.0\.0\.1") as caught:
                store.ensure_collection(spec)
            shown += [str(caught.value), repr(caught.value.__cause__)]
    assert stand_in.keys == {canary}
    assert canary not in " ".join(shown)


def test_many_points_go_in_calls_of_at_most_256(opened_wire, stand_in, embeddings, rows):
    batch = build_points(embeddings({7: range(600)}), rows=rows(7), generations={7: "a"})
    stand_in.calls.clear()
    opened_wire.upsert(batch)
    assert stand_in.calls == ["Upsert"] * 3
    assert opened_wire.count() == 600


class _Failure(grpc.RpcError):
    def __init__(self, name):
        super().__init__(name)
        self._code = getattr(grpc.StatusCode, name)

    def code(self):
        return self._code

    def details(self):
        return "as asked"


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("UNAVAILABLE", True),
        ("DEADLINE_EXCEEDED", True),
        ("RESOURCE_EXHAUSTED", True),
        ("INTERNAL", True),
        ("ABORTED", True),
        ("UNAUTHENTICATED", False),
        ("PERMISSION_DENIED", False),
        ("NOT_FOUND", False),
        ("INVALID_ARGUMENT", False),
        ("UNIMPLEMENTED", False),
    ],
)
def test_which_codes_may_pass(name, passes):
    assert may_pass(_Failure(name)) is passes


@pytest.mark.parametrize(
    ("status", "passes"), [(408, True), (429, True), (500, True), (503, True), (400, False), (403, False)]
)
def test_which_http_answers_may_pass(status, passes):
    assert may_pass(_answer(status)) is passes


def _answer(status, **headers):
    import httpx  # noqa: PLC0415 - qdrant-client's own
    from qdrant_client.http.exceptions import UnexpectedResponse

    return UnexpectedResponse(status, "why", b"{}", httpx.Headers({k.replace("_", "-"): v for k, v in headers.items()}))


def _waits(errors):
    """The waits between tries that end with these errors."""
    waits = []
    left = iter(errors)

    def fail():
        raise next(left)

    with pytest.raises(StoreUnavailableError, match=r"Could not count points"):
        RetryPolicy(attempts=len(errors), sleep=waits.append).call("count points", "url", fail)
    return waits


def test_waits_follow_the_server_up_to_a_cap_and_else_full_jitter(monkeypatch):
    assert _waits([_answer(429, retry_after="7")] * 2) == [7.0]
    assert _waits([_answer(429, retry_after="86400")] * 2) == [60.0]
    bounds = []
    monkeypatch.setattr(random, "uniform", lambda low, high: bounds.append((low, high)) or 0.25)
    assert _waits([_Failure("UNAVAILABLE")] * 9) == [0.25] * 8
    assert bounds[:8] == [(0, 0.5), (0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (0, 30), (0, 30)]


def test_a_bug_of_ours_is_neither_repeated_nor_renamed():
    calls = []

    def fail():
        calls.append(1)
        message = "ours"
        raise KeyError(message)

    with pytest.raises(KeyError, match="ours"):
        RetryPolicy().call("count points", "url", fail)
    assert calls == [1]


def test_equal_values_of_other_types_and_nested_ones_arrive_as_they_are(opened_wire, embeddings):
    values = {1: 1, 2: 1.0, 3: True, 4: 0, 5: 0.0, 6: False, 7: None, 8: "1", 9: [1, 1.0, True], 10: {"a": {"b": []}}}
    rows = {key: VideoRow(key, "v", payload={"value": value}) for key, value in values.items()}
    frames = {key: [0] for key in values}
    opened_wire.upsert(build_points(embeddings(frames), rows=rows, generations=dict.fromkeys(rows, "a")))
    (page,) = opened_wire.read()
    found = {payload["record_id"]: repr(payload["value"]) for payload in page.payloads}
    assert found == {key: repr(value) for key, value in values.items()}
