"""How long a server is waited for, what is said meanwhile, and which failures are not waited for."""

import http.server
import logging
import re
import threading
import time

import pytest

from extraction_dagster.errors.index import StoreRefusedError, StoreUnavailableError
from extraction_dagster.settings import Settings
from extraction_dagster.stages.index.points import PointFilter
from extraction_dagster.stages.index.server.retry import RetryPolicy
from extraction_dagster.stages.index.server.store import ServerStore
from extraction_dagster.stages.index.stage import open_point_store, replace_records


@pytest.fixture
def at(stand_in, tmp_path):
    """`at(retry_seconds=…)`: a store on the stand-in as a run opens it."""
    stores = []

    def make(**changes):
        fields = {"qdrant_url": stand_in.url, "qdrant_grpc_port": stand_in.port, **changes}
        stores.append(open_point_store(Settings(home=tmp_path, **fields), wait_seconds=1))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.mark.slow
def test_an_outage_within_the_budget_fails_nothing_and_work_goes_on_at_once(  # noqa: PLR0913, PLR0917 - fixtures
    at, stand_in, spec, embeddings, rows, caplog
):
    store, frames = at(qdrant_retry_seconds=60), {7: [0, 90], 8: [0]}
    store.ensure_collection(spec)
    caplog.set_level(logging.INFO, logger="extraction_dagster")
    done, stop, errors = [], threading.Event(), []

    def work():
        number = 0
        while not stop.is_set():
            number += 1
            try:
                replace_records(
                    store, embeddings(frames), rows=rows(7, 8), generations=dict.fromkeys(frames, str(number))
                )
            except Exception as error:  # noqa: BLE001 - counted
                errors.append(error)
            done.append(time.monotonic())

    worker = threading.Thread(target=work)
    worker.start()
    time.sleep(0.5)
    with stand_in.outage():
        time.sleep(8)  # long enough for gRPC's own wait to have grown beyond what is allowed
    back = time.monotonic()
    time.sleep(3)
    stop.set()
    worker.join()
    assert errors == []
    assert next(moment for moment in done if moment > back) - back < 3
    assert re.search(r"\(gRPC\) can't \w+ points for \d s now \(UNAVAILABLE: .*asked again for \d+ s more", caplog.text)
    assert re.search(r"\(gRPC\) answers again, after \d+ s", caplog.text)


def test_the_wait_between_attempts_to_connect_is_capped_in_the_client(wire_store):
    options = wire_store._client._client._grpc_options
    assert options["grpc.max_reconnect_backoff_ms"] == 1000


def test_a_server_that_stays_away_is_given_up_after_the_set_time(at, stand_in, spec):
    store = at(qdrant_retry_seconds=2.5)
    store.ensure_collection(spec)
    begun = time.monotonic()
    with stand_in.outage(), pytest.raises(StoreUnavailableError, match=r"for [12] s \(EXTRACTION_QDRANT_RETRY_SECONDS"):
        store.count()
    assert time.monotonic() - begun < 5


def test_somebody_who_looks_on_is_not_kept_for_as_long_as_a_run(tmp_path):
    settings = Settings(home=tmp_path, qdrant_url="http://127.0.0.1:1")
    with open_point_store(settings) as looked_on, open_point_store(settings, wait_seconds=1) as of_a_run:
        assert (looked_on._retry.budget_seconds, of_a_run._retry.budget_seconds) == (20, 300)


@pytest.mark.parametrize("number", [0, 3, 99])
def test_a_status_that_has_no_name_is_not_completed_and_asked_for_again(  # noqa: PLR0913, PLR0917 - fixtures
    wire_store, stand_in, spec, embeddings, rows, number
):
    stand_in.rules.statuses = [number]  # of the first index
    wire_store.ensure_collection(spec)
    stand_in.rules.statuses = [number, 2, number]  # of the write and of the removal
    assert replace_records(wire_store, embeddings({7: [0]}), rows=rows(7), generations={7: "a"}) == {7: 1}
    assert stand_in.rules.statuses == []
    stand_in.rules.statuses = [number] * 5
    with pytest.raises(StoreUnavailableError, match=r"answered .*expected 'completed'"):
        wire_store.delete(PointFilter(record_ids=(7,)))


@pytest.mark.parametrize(
    ("rule", "said"),
    [("disk_is_full", "server's disk is full: make room there"), ("in_recovery", "is in recovery mode")],
)
def test_what_does_not_pass_is_not_waited_for_whatever_its_code(wire_store, stand_in, spec, rule, said):
    wire_store.ensure_collection(spec)
    setattr(stand_in.rules, rule, True)
    with pytest.raises(StoreRefusedError, match=f"remove points: INTERNAL: .*{said}"):
        wire_store.delete(PointFilter(record_ids=(7,)))


@pytest.fixture
def rest_port():
    """A port that speaks HTTP/1.1, as a server's REST port does."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_rest_port_given_as_grpc_port_is_told_at_once(tmp_path, rest_port, spec):
    settings = Settings(home=tmp_path, qdrant_url=f"http://127.0.0.1:{rest_port}", qdrant_grpc_port=rest_port)
    said = rf"at 127\.0\.0\.1:{rest_port} \(gRPC\) refused .*speaks HTTP, not gRPC: set EXTRACTION_QDRANT_GRPC_PORT"
    with ServerStore.connect(settings) as store, pytest.raises(StoreRefusedError, match=said):
        store.ensure_collection(spec)


def test_tls_to_a_port_without_it_is_told_at_once(tmp_path, rest_port, spec):
    settings = Settings(home=tmp_path, qdrant_url="https://127.0.0.1", qdrant_grpc_port=rest_port)
    with ServerStore.connect(settings) as store, pytest.raises(StoreRefusedError, match="speaks no TLS"):
        store.ensure_collection(spec)


def test_a_path_that_grpc_ignores_is_told(tmp_path, caplog):
    ServerStore.connect(Settings(home=tmp_path, qdrant_url="https://example.com/qdrant")).close()
    said = "gRPC ignores the path '/qdrant' of EXTRACTION_QDRANT_URL: example.com:6334 (gRPC) is asked"
    assert said in caplog.text
    caplog.clear()
    ServerStore.connect(Settings(home=tmp_path, qdrant_url="https://example.com/")).close()
    assert caplog.text == ""


def test_a_hiccup_leaves_no_line(caplog):
    tried = []

    def once():
        tried.append(1)
        if len(tried) == 1:
            from qdrant_client.common.client_exceptions import ResourceExhaustedResponse

            raise ResourceExhaustedResponse("too many requests", retry_after_s=1)

    RetryPolicy(sleep=lambda _: None).call("count points", "host:6334 (gRPC)", once)
    assert (len(tried), caplog.text) == (2, "")
