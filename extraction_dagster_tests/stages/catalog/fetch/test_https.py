"""Downloads over TLS from a server that does what it should not."""

import re
import socket
import ssl
import time

import pytest

from extraction_dagster.errors.catalog import (
    AddressForbiddenError,
    DownloadTimeoutError,
    FileEncodedError,
    FileRefusedError,
    FileTooLargeError,
    FileUnavailableError,
    SchemeError,
)

BODY = bytes(range(256)) * 1000  # 256,000 bytes
LONG_AGO = {"Last_Modified": "Wed, 01 Jan 2020 00:00:00 GMT"}


def cut_after(length, **headers):
    """Promises all of BODY, and hangs up early."""

    def script(handler, _nth):
        handler.head(200, Content_Length=str(len(BODY)), **headers)
        handler.wfile.write(BODY[:length])

    return script


def rest(handler, **headers):
    """Goes on where the client asks."""
    start = int(re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"])[1])
    content_range = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
    handler.answer(206, BODY[start:], Content_Range=content_range, **headers)


def in_turn(*scripts):
    """Another script for each request to the path; the last one for all that follow."""
    return lambda handler, nth: scripts[min(nth, len(scripts)) - 1](handler, nth)


def whole(**headers):
    return lambda handler, _nth: handler.answer(200, BODY, **headers)


def cached(settings_home):
    folder = settings_home / "cache" / "videos"
    return sorted(path.suffix for path in folder.iterdir() if path.suffix in {".part", ".mp4"})


def test_a_file_arrives_whole(server, make_fetcher, row):
    server.scripts["/a/video.mp4"] = whole()
    path = make_fetcher().fetch(row(server.url("/a/video.mp4?signature=x%2Fy")))
    assert path.read_bytes() == BODY
    assert path.suffix == ".mp4"
    [(asked, headers)] = server.requests
    assert asked == "/a/video.mp4?signature=x%2Fy"
    assert headers["host"] == f"videos.example:{server.server_port}"
    assert (headers["accept-encoding"], headers.get("range")) == ("identity", None)


def test_nobody_else_may_read_what_arrived(server, make_fetcher, row):
    server.scripts["/v.mp4"] = whole()
    path = make_fetcher().fetch(row(server.url("/v.mp4")))
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def test_the_connection_goes_to_the_vetted_address_with_the_name_in_tls_and_host(server, make_fetcher, row):
    asked = []

    def resolve(host, port):
        asked.append((host, port))
        return ["127.0.0.1"]

    server.scripts["/v.mp4"] = whole()
    make_fetcher(resolve=resolve).fetch(row(server.url("/v.mp4")))
    assert asked == [("videos.example", server.server_port)]


def test_a_name_that_changes_its_mind_gains_nothing(server, make_fetcher, row, monkeypatch):
    def refuse(*_arguments, **_options):
        raise AssertionError("the name was looked up behind the guard's back")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    server.scripts["/v.mp4"] = whole()
    assert make_fetcher().fetch(row(server.url("/v.mp4"))).read_bytes() == BODY


def test_a_certificate_of_nobody_known_is_refused(server, make_fetcher, row):
    fetcher = make_fetcher(tls=ssl.create_default_context)
    with pytest.raises(FileUnavailableError, match="certificate is not accepted") as raised:
        fetcher.fetch(row(server.url("/v.mp4")))
    assert not raised.value.permanent
    assert server.requests == []


def test_a_certificate_for_another_name_is_refused(server, make_fetcher, row):
    port = server.server_port
    fetcher = make_fetcher(allowed_hosts=(f"evil.example:{port}",), resolve=lambda _host, _port: ["127.0.0.1"])
    with pytest.raises(FileUnavailableError, match=r"certificate is not accepted .*evil\.example"):
        fetcher.fetch(row(f"https://evil.example:{port}/v.mp4"))
    assert server.requests == []


def test_a_loopback_address_is_not_connected_to_unless_its_network_is_allowed(server, make_fetcher, row):
    server.scripts["/v.mp4"] = whole()
    with pytest.raises(AddressForbiddenError, match=r"has the address 127\.0\.0\.1, which is not public"):
        make_fetcher(allowed_networks=()).fetch(row(server.url("/v.mp4")))
    assert server.requests == []


def test_a_redirect_is_followed_to_an_allowed_host(server, make_fetcher, row):
    led_to = server.url("/b.mp4?sig=1", host="other.example")
    server.scripts |= {"/a.mp4": lambda handler, _nth: handler.answer(302, Location=led_to), "/b.mp4": whole()}
    assert make_fetcher().fetch(row(server.url("/a.mp4"))).read_bytes() == BODY
    assert server.paths() == ["/a.mp4", "/b.mp4?sig=1"]


def test_a_relative_redirect_stays_with_its_server(server, make_fetcher, row):
    server.scripts |= {"/x/a.mp4": lambda handler, _nth: handler.answer(307, Location="../b.mp4"), "/b.mp4": whole()}
    assert make_fetcher().fetch(row(server.url("/x/a.mp4"))).read_bytes() == BODY


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("https://169.254.169.254/latest/meta-data/", r"169\.254\.169\.254 is not an allowed host"),
        ("https://127.0.0.1/", r"127\.0\.0\.1 is not an allowed host"),
        ("//evil.example/v.mp4", r"evil\.example is not an allowed host"),
        ("https://inside.example/v.mp4", r"inside\.example has the address 10\.0\.0\.7, which is not public"),
        ("http://other.example/v.mp4", "that would give up encryption"),
        ("https://me:canary-4711@other.example/", "it holds a user or a password"),
    ],
)
def test_a_redirect_into_the_private_network_is_refused_for_good(location, why, server, make_fetcher, row):
    server.scripts["/a.mp4"] = lambda handler, _nth: handler.answer(302, Location=location)
    hosts = (f"videos.example:{server.server_port}", "inside.example", "other.example")
    addresses = {"videos.example": ["127.0.0.1"], "inside.example": ["93.184.215.14", "10.0.0.7"]}
    fetcher = make_fetcher(allowed_hosts=hosts, resolve=lambda host, _port: addresses[host])
    with pytest.raises(AddressForbiddenError, match=f"it redirects to .*{why}") as raised:
        fetcher.fetch(row(server.url("/a.mp4")))
    assert raised.value.permanent
    assert "canary" not in str(raised.value)
    assert server.paths() == ["/a.mp4"]


def test_a_redirect_to_a_file_is_refused(server, make_fetcher, row):
    server.scripts["/a.mp4"] = lambda handler, _nth: handler.answer(302, Location="file:///etc/passwd")
    with pytest.raises((SchemeError, AddressForbiddenError), match=r"names no server|has scheme"):
        make_fetcher().fetch(row(server.url("/a.mp4")))


def test_redirects_in_a_circle_end(server, make_fetcher, row):
    server.scripts["/a.mp4"] = lambda handler, _nth: handler.answer(302, Location="/a.mp4")
    with pytest.raises(AddressForbiddenError, match="it redirects more than 5 times"):
        make_fetcher().fetch(row(server.url("/a.mp4")))
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("status", "answer"),
    [(404, "404 Not Found"), (410, "410 Gone"), (403, "403 Forbidden"), (401, "401 Unauthorized"), (299, "299")],
)
def test_an_answer_for_good_is_not_asked_for_again(status, answer, server, make_fetcher, row):
    server.scripts["/v.mp4"] = lambda handler, _nth: handler.answer(status, b"<html>canary-4711</html>")
    with pytest.raises(FileRefusedError, match=f"the answer was {answer}") as raised:
        make_fetcher().fetch(row(server.url("/v.mp4?sig=canary-4711")))
    assert raised.value.permanent
    assert "canary" not in str(raised.value)
    assert len(server.requests) == 1


def test_a_signature_is_in_no_log_line_however_much_is_logged(server, make_fetcher, row, caplog):
    caplog.set_level(1)
    led_to = server.url("/b.mp4?sig=canary-4712")
    server.scripts |= {
        "/a.mp4": in_turn(
            lambda handler, _nth: handler.answer(503), lambda handler, _nth: handler.answer(302, Location=led_to)
        ),
        "/b.mp4": in_turn(cut_after(1000), whole()),
    }
    make_fetcher().fetch(row(server.url("/a.mp4?sig=canary-4711")))
    assert len(server.requests) == 5
    assert "canary" not in caplog.text


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_an_answer_that_may_pass_is_asked_for_again(status, server, make_fetcher, row):
    server.scripts["/v.mp4"] = in_turn(lambda handler, _nth: handler.answer(status), whole())
    assert make_fetcher().fetch(row(server.url("/v.mp4"))).read_bytes() == BODY
    assert len(server.requests) == 2


def test_a_server_that_stays_down_fails_the_record_for_now(server, make_fetcher, row):
    server.scripts["/v.mp4"] = lambda handler, _nth: handler.answer(503)
    with pytest.raises(FileUnavailableError, match="the server answered 503 Service Unavailable, in 3 tries") as raised:
        make_fetcher(attempts=3).fetch(row(server.url("/v.mp4?sig=canary-4711")))
    assert not raised.value.permanent
    assert "canary" not in str(raised.value)
    assert len(server.requests) == 3


def test_a_server_that_says_when_to_come_back_is_obeyed_within_the_time(server, make_fetcher, row):
    server.scripts["/v.mp4"] = in_turn(lambda handler, _nth: handler.answer(429, Retry_After="3600"), whole())
    with pytest.raises(DownloadTimeoutError, match=r"did not arrive within 0\.7 s"):
        make_fetcher(fetch_timeout_seconds=0.7).fetch(row(server.url("/v.mp4")))
    assert len(server.requests) == 1


def test_a_cut_download_goes_on_where_it_ended(server, make_fetcher, row):
    tag = {"ETag": '"v1"'}
    server.scripts["/v.mp4"] = in_turn(cut_after(100_000, **tag), lambda handler, _nth: rest(handler, **tag))
    assert make_fetcher().fetch(row(server.url("/v.mp4"))).read_bytes() == BODY
    headers = server.requests[1][1]
    assert (headers["range"], headers["if-range"]) == ("bytes=100000-", '"v1"')


def test_a_download_goes_on_in_another_process(server, make_fetcher, row, tmp_path):
    tag = {"ETag": '"v1"'}
    server.scripts["/v.mp4"] = in_turn(cut_after(100_000, **tag), lambda handler, _nth: rest(handler, **tag))
    with pytest.raises(FileUnavailableError, match=r"the connection (ended|failed)"):
        make_fetcher(attempts=1).fetch(row(server.url("/v.mp4")))
    assert cached(tmp_path) == [".part"]
    assert make_fetcher().fetch(row(server.url("/v.mp4"))).read_bytes() == BODY
    assert cached(tmp_path) == [".mp4"]


def test_a_time_of_change_is_good_enough_to_go_on(server, make_fetcher, row):
    server.scripts["/v.mp4"] = in_turn(cut_after(100_000, **LONG_AGO), lambda handler, _nth: rest(handler))
    assert make_fetcher().fetch(row(server.url("/v.mp4"))).read_bytes() == BODY
    assert server.requests[1][1]["if-range"] == "Wed, 01 Jan 2020 00:00:00 GMT"


@pytest.mark.parametrize("names", [{}, {"ETag": 'W/"v1"'}, {"Last_Modified": "never"}])
def test_without_a_name_that_promises_equal_bytes_it_begins_anew(names, server, make_fetcher, row):
    server.scripts["/v.mp4"] = in_turn(cut_after(100_000, **names), whole(**names))
    assert make_fetcher().fetch(row(server.url("/v.mp4"))).read_bytes() == BODY
    assert "range" not in server.requests[1][1]


def test_a_file_that_was_changed_in_between_is_taken_anew(server, make_fetcher, row):
    new = b"new" * 50_000
    server.scripts["/v.mp4"] = in_turn(
        cut_after(100_000, ETag='"v1"'), lambda handler, _nth: handler.answer(200, new, ETag='"v2"')
    )
    assert make_fetcher().fetch(row(server.url("/v.mp4"))).read_bytes() == new


@pytest.mark.parametrize(
    "wrong",
    [
        {"Content_Range": f"bytes 100000-{len(BODY) - 1}/{len(BODY)}", "ETag": '"v2"'},
        {"Content_Range": f"bytes 100000-{len(BODY) - 1}/{len(BODY)}"},
        {"Content_Range": f"bytes 99999-{len(BODY) - 1}/{len(BODY)}", "ETag": '"v1"'},
        {"Content_Range": f"bytes 100000-{len(BODY)}/{len(BODY) + 1}", "ETag": '"v1"'},
        {"Content_Range": "bytes 100000-/", "ETag": '"v1"'},
        {"Content_Type": "multipart/byteranges; boundary=x", "ETag": '"v1"'},
    ],
)
def test_parts_that_do_not_fit_are_never_put_together(wrong, server, make_fetcher, row):
    server.scripts["/v.mp4"] = in_turn(
        cut_after(100_000, ETag='"v1"'), lambda handler, _nth: handler.answer(206, b"x" * 156_000, **wrong), whole()
    )
    assert make_fetcher().fetch(row(server.url("/v.mp4"))).read_bytes() == BODY
    assert "range" not in server.requests[2][1]


def test_a_range_that_is_refused_is_given_up(server, make_fetcher, row):
    server.scripts["/v.mp4"] = in_turn(
        cut_after(100_000, ETag='"v1"'), lambda handler, _nth: handler.answer(416), whole()
    )
    assert make_fetcher().fetch(row(server.url("/v.mp4"))).read_bytes() == BODY
    assert "range" not in server.requests[2][1]


def test_a_part_that_nobody_asked_for_is_refused(server, make_fetcher, row):
    server.scripts["/v.mp4"] = lambda handler, _nth: handler.answer(206, BODY, Content_Range="bytes 0-255999/256000")
    with pytest.raises(FileRefusedError, match="the answer was 206 Partial Content"):
        make_fetcher().fetch(row(server.url("/v.mp4")))


def test_a_file_that_is_there_already_is_only_asked_about(server, make_fetcher, row):
    def script(handler, _nth):
        unchanged = handler.headers["If-None-Match"] == '"v1"'
        handler.answer(304, ETag='"v1"') if unchanged else handler.answer(200, BODY, ETag='"v1"')

    server.scripts["/v.mp4"] = script
    fetcher = make_fetcher()
    for _ in range(2):
        assert fetcher.fetch(row(server.url("/v.mp4"))).read_bytes() == BODY
        fetcher.release(1, keep=True)
    assert [headers.get("if-none-match") for _, headers in server.requests] == [None, '"v1"']


def test_a_file_that_changed_replaces_the_one_that_is_there(server, make_fetcher, row):
    server.scripts["/v.mp4"] = in_turn(whole(ETag='"v1"'), lambda handler, _nth: handler.answer(200, b"new"))
    fetcher = make_fetcher()
    fetcher.fetch(row(server.url("/v.mp4")))
    fetcher.release(1, keep=True)
    assert fetcher.fetch(row(server.url("/v.mp4"))).read_bytes() == b"new"


def test_a_file_that_says_it_is_too_large_is_not_begun(server, make_fetcher, row, tmp_path):
    server.scripts["/v.mp4"] = whole()
    with pytest.raises(FileTooLargeError, match="has 256000 bytes or more, expected at most 255999") as raised:
        make_fetcher(max_file_bytes=255_999).fetch(row(server.url("/v.mp4")))
    assert raised.value.permanent
    assert cached(tmp_path) == []
    assert make_fetcher(max_file_bytes=256_000).fetch(row(server.url("/v.mp4"))).read_bytes() == BODY


def test_a_body_without_end_is_given_up_at_the_limit(server, make_fetcher, row, tmp_path):
    sent = []

    def script(handler, _nth):
        handler.head(200, Transfer_Encoding="chunked")
        while True:
            handler.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            sent.append(0x10000)

    server.scripts["/v.mp4"] = script
    with pytest.raises(FileTooLargeError, match="has 1000001 bytes or more, expected at most 1000000"):
        make_fetcher(max_file_bytes=1_000_000).fetch(row(server.url("/v.mp4")))
    assert cached(tmp_path) == []
    assert sum(sent) < 50_000_000


def test_a_body_of_unknown_length_ends_with_its_last_chunk(server, make_fetcher, row):
    def script(handler, _nth):
        handler.head(200, Transfer_Encoding="chunked")
        handler.wfile.write(b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n")

    server.scripts["/v.mp4"] = script
    assert make_fetcher(max_file_bytes=7).fetch(row(server.url("/v.mp4"))).read_bytes() == b"abcdefg"


@pytest.mark.parametrize("headers", [{"Transfer_Encoding": "chunked"}, {"Connection": "close"}])
def test_a_body_of_unknown_length_that_is_cut_is_never_taken_for_whole(headers, server, make_fetcher, row):
    def script(handler, _nth):
        handler.head(200, **headers)
        handler.wfile.write(b"3\r\nabc\r\n")  # then it hangs up without TLS's own farewell

    server.scripts["/v.mp4"] = script
    with pytest.raises(FileUnavailableError, match="the connection failed"):
        make_fetcher(attempts=2).fetch(row(server.url("/v.mp4")))
    assert len(server.requests) == 2


def test_a_length_that_is_wrong_is_never_taken_for_whole(server, make_fetcher, row):
    server.scripts["/v.mp4"] = cut_after(255_999)
    with pytest.raises(FileUnavailableError, match=r"the connection (ended after 255999 of 256000 bytes|failed)"):
        make_fetcher(attempts=2).fetch(row(server.url("/v.mp4")))


def test_a_slow_drip_ends_with_the_time(server, make_fetcher, row, tmp_path):
    def script(handler, _nth):
        handler.head(200, Content_Length="1000000", ETag='"v1"')
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.02)

    server.scripts["/v.mp4"] = script
    with pytest.raises(DownloadTimeoutError, match=r"did not arrive within 1 s") as raised:
        make_fetcher(fetch_timeout_seconds=1).fetch(row(server.url("/v.mp4")))
    assert not raised.value.permanent
    assert cached(tmp_path) == [".part"]


def test_headers_that_drip_end_with_the_time(server, make_fetcher, row):
    def script(handler, _nth):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.02)

    server.scripts["/v.mp4"] = script
    with pytest.raises(DownloadTimeoutError, match=r"did not arrive within 1 s"):
        make_fetcher(fetch_timeout_seconds=1).fetch(row(server.url("/v.mp4")))


def test_a_silent_server_is_given_up_and_asked_again(server, make_fetcher, row):
    server.scripts["/v.mp4"] = in_turn(lambda handler, _nth: handler.rfile.read(1), whole())
    fetcher = make_fetcher(stall_seconds=1)
    assert fetcher.fetch(row(server.url("/v.mp4"))).read_bytes() == BODY
    assert len(server.requests) == 2


def test_a_packed_answer_is_refused_before_it_is_read(server, make_fetcher, row, tmp_path):
    server.scripts["/v.mp4"] = whole(Content_Encoding="gzip")
    with pytest.raises(FileEncodedError, match="comes with Content-Encoding 'gzip'") as raised:
        make_fetcher().fetch(row(server.url("/v.mp4")))
    assert raised.value.permanent
    assert cached(tmp_path) == []


def test_an_empty_file_may_still_be_filled(server, make_fetcher, row, tmp_path):
    server.scripts["/v.mp4"] = lambda handler, _nth: handler.answer(200)
    with pytest.raises(FileUnavailableError, match="it is empty"):
        make_fetcher().fetch(row(server.url("/v.mp4")))
    assert cached(tmp_path) == []


def test_what_is_no_http_at_all_is_a_fault_that_does_not_repeat_it(server, make_fetcher, row):
    server.scripts["/v.mp4"] = lambda handler, _nth: handler.wfile.write(b"canary-4711\r\n\r\n")
    with pytest.raises(FileUnavailableError, match=r"the connection failed \(BadStatusLine\)") as raised:
        make_fetcher(attempts=1).fetch(row(server.url("/v.mp4")))
    assert "canary" not in str(raised.value)
    assert "canary" not in repr(raised.value.__cause__)


def test_http_is_read_where_that_was_decided(plain_server, make_fetcher, row):
    plain_server.scripts["/v.mp4"] = whole()
    hosts = (f"videos.example:{plain_server.server_port}",)
    with pytest.raises(AddressForbiddenError, match="it is not encrypted"):
        make_fetcher(allowed_hosts=hosts).fetch(row(plain_server.url("/v.mp4")))
    fetched = make_fetcher(allowed_hosts=hosts, allow_http=True).fetch(row(plain_server.url("/v.mp4")))
    assert fetched.read_bytes() == BODY
