"""The endpoint, asked over a real connection."""

import contextlib
import socket
import threading
import urllib.request
from http.client import HTTPConnection
from urllib.error import HTTPError

import pytest

from extraction_dagster.errors.watch import MetricsAddressError
from extraction_dagster.watch.exposition import Exposition
from extraction_dagster.watch.server import MetricsServer


@contextlib.contextmanager
def serving(expose, host="127.0.0.1"):
    with MetricsServer(host, 0, expose) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def port(figures, census):
    with serving(lambda: Exposition(figures, census)) as port:
        yield port


def get(port, path, **headers):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with opener.open(request, timeout=30) as response:
        return response.status, response.headers["Content-Type"], response.read().decode()


def test_prometheus_gets_openmetrics_and_a_person_the_plain_form(port):
    status, content_type, body = get(port, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert (status, content_type.split(";")[0]) == (200, "application/openmetrics-text")
    assert "extraction_watermark_id 12345.0\n" in body
    assert body.endswith("# EOF\n")
    status, content_type, body = get(port, "/metrics?debug=1")
    assert (status, content_type.split(";")[0]) == (200, "text/plain")
    assert 'extraction_errors_total{stage="decode",type="VideoOpenError"} 3.0\n' in body


def test_other_paths_say_where_the_metrics_are(port):
    assert get(port, "/")[0::2] == (200, "Metrics are at /metrics\n")
    with pytest.raises(HTTPError, match="404") as caught:
        get(port, "/secrets")
    caught.value.close()


def test_head_has_no_body_and_other_methods_are_refused(port):
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("HEAD", "/metrics")
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"")
    connection.close()
    connection.request("POST", "/metrics", body=b"x")
    assert connection.getresponse().status == 501
    connection.close()


def test_a_client_that_says_nothing_or_hangs_up_holds_up_nobody(port, capfd):
    silent = socket.create_connection(("127.0.0.1", port))
    rude = socket.create_connection(("127.0.0.1", port))
    rude.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    rude.close()
    assert get(port, "/metrics")[0] == 200
    silent.close()
    assert capfd.readouterr().err == ""


def test_what_is_down_is_said_and_never_an_error_of_the_endpoint():
    with serving(lambda: Exposition(None)) as port:
        status, _, body = get(port, "/metrics")
    assert status == 200
    assert "extraction_up 0.0\n" in body


def test_ipv6_is_listened_at_where_it_is_asked_for():
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with serving(lambda: Exposition(None), host="::1") as port, socket.create_connection(("::1", port)) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.makefile("rb").readline() == b"HTTP/1.0 200 OK\r\n"


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MetricsAddressError, match=rf"can't be served at 127.0.0.1:{port}: Address already in use"):
            MetricsServer("127.0.0.1", port, lambda: Exposition(None))
