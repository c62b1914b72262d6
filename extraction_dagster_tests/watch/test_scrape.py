"""A scrape: whatever hangs or fails, an answer comes; and the endpoint, asked over a real connection."""

import contextlib
import socket
import threading
import urllib.request
from dataclasses import replace
from http.client import HTTPConnection
from urllib.error import HTTPError

import pytest

from extraction_dagster.errors.runs import MetricsAddressError
from extraction_dagster.watch.exposition import Exposition
from extraction_dagster.watch.meter import Meter
from extraction_dagster.watch.scrape import Latest, MetricsServer, Scrape


@pytest.fixture
def scrape(monkeypatch, settings, figures, census):
    """A scrape whose figures and census come from `made`."""
    made = {"figures": lambda: figures, "census": lambda: census, "asked": []}
    monkeypatch.setattr(Meter, "measure", lambda _self: made["figures"]())

    def count(_self, after_id, floor_id):
        made["asked"].append((after_id, floor_id))
        return made["census"]()

    monkeypatch.setattr(Meter, "count", count)
    monkeypatch.setattr("extraction_dagster.watch.scrape._SCRAPE_SECONDS", 0.2)
    monkeypatch.setattr("extraction_dagster.watch.scrape._FIRST_CENSUS_SECONDS", 0.2)
    scrape = Scrape(settings(), lambda: None)
    scrape.made = made
    yield scrape
    scrape.close()


def test_figures_and_census_are_shown_together(scrape):
    text = scrape.now().openmetrics()
    assert "extraction_watermark_id 12345.0" in text
    assert "extraction_frames 5000.0" in text
    assert scrape.made["asked"] == [(12345, -1)]


def test_scrapes_within_seconds_share_one(scrape, figures):
    taken = []
    scrape.made["figures"] = lambda: taken.append(None) or figures
    for _ in range(5):
        scrape.soon()
    assert (len(taken), len(scrape.made["asked"])) == (1, 1)


def test_a_database_that_does_not_answer_makes_it_down_in_time(scrape):
    go_on = threading.Event()
    scrape.made["figures"] = lambda: go_on.wait(30)
    assert "extraction_up 0.0" in scrape.soon().openmetrics()
    go_on.set()


def test_a_first_census_that_takes_long_is_not_waited_for(scrape, census):
    go_on = threading.Event()

    def slow():
        go_on.wait(30)
        return census

    scrape.made["census"] = slow
    text = scrape.soon().openmetrics()
    assert "extraction_up 1.0" in text
    assert "extraction_frames 5000" not in text
    go_on.set()
    assert "extraction_frames 5000.0" in scrape.now().openmetrics()


def test_a_census_that_fails_costs_nothing_but_the_census(scrape):
    def fail():
        message = "the ledger is away"
        raise OSError(message)

    scrape.made["census"] = fail
    text = scrape.soon().openmetrics()
    assert "extraction_up 1.0" in text
    assert 'extraction_rows{state="done"}' not in text


def test_of_a_table_that_cannot_be_read_no_old_count_is_shown(scrape, figures):
    scrape.soon()
    parts = {"dagster": True, "table": False}
    scrape.made["figures"] = lambda: replace(figures, parts=parts, progress=None, mirror=None)
    scrape._figures._taken_at = float("-inf")
    text = scrape.soon().openmetrics()
    assert "extraction_up 0.0" in text
    assert "extraction_rows" not in text


# One thread takes a value, nobody waits too long


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("extraction_dagster.watch.scrape.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def counting():
    taken = []

    def take():
        taken.append(None)
        return len(taken)

    return taken, take


def test_a_value_is_taken_at_the_first_question_and_again_once_it_is_old(clock):
    taken, take = counting()
    latest = Latest(take, fresh_seconds=lambda _: 5)
    assert taken == []
    assert latest.get(wait_seconds=10) == (1, True)
    clock.now += 4.9
    assert latest.get(wait_seconds=10) == (1, True)
    clock.now += 0.1
    assert latest.get(wait_seconds=10) == (2, True)


def test_how_long_a_value_is_fresh_may_depend_on_the_value(clock):
    _, take = counting()
    latest = Latest(take, fresh_seconds=lambda value: 10 * value)
    assert latest.get(wait_seconds=10) == (1, True)
    clock.now += 10
    assert latest.get(wait_seconds=10) == (2, True)
    clock.now += 19
    assert latest.get(wait_seconds=10) == (2, True)


def test_many_who_ask_at_once_share_one_taking():
    begun, go_on, taken = threading.Event(), threading.Event(), []

    def take():
        taken.append(None)
        begun.set()
        go_on.wait(30)
        return "value"

    latest, answers = Latest(take, fresh_seconds=lambda _: 1e9), []
    asking = [threading.Thread(target=lambda: answers.append(latest.get(wait_seconds=30))) for _ in range(8)]
    for thread in asking:
        thread.start()
    begun.wait(30)
    go_on.set()
    for thread in asking:
        thread.join(30)
    assert answers == [("value", True)] * 8
    assert len(taken) == 1


def test_a_taking_that_hangs_holds_up_nobody_and_its_value_is_there_later():
    go_on, over = threading.Event(), threading.Event()

    def take():
        go_on.wait(30)
        over.set()
        return "late"

    latest = Latest(take, fresh_seconds=lambda _: 1e9)
    assert latest.get(wait_seconds=0.01) == (None, False)
    assert latest.get(wait_seconds=0.0) == (None, False)
    go_on.set()
    over.wait(30)
    assert latest.get(wait_seconds=30) == ("late", True)


def test_a_taking_that_fails_leaves_the_value_before_and_is_tried_again(clock, caplog):
    outcomes = iter(["first", ValueError("the database is down"), "third"])

    def take():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    latest = Latest(take, fresh_seconds=lambda _: 5)
    assert latest.get(wait_seconds=10) == ("first", True)
    clock.now += 6
    assert latest.get(wait_seconds=10) == ("first", False)
    assert "No figures could be taken: the database is down" in caplog.text
    assert latest.get(wait_seconds=10) == ("third", True)


# The endpoint


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
