"""Posting to a real server that is slow, silent, drips, resets, redirects, and to none at all."""

import json
import socket
import threading

import pytest

from extraction_dagster.errors.watch import NoticeError
from extraction_dagster.notify import post
from extraction_dagster.notify.post import post_json

SECRET = "T0B0canary"  # noqa: S105 - it must not be seen anywhere


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(post, "_WAIT_SECONDS", 0.01)


def send(server, seconds=20.0, **options):
    post_json(f"{server.address}?token={SECRET}", {"text": "päng"}, seconds=seconds, **options)


def refused(server, match, seconds=20.0, **options):
    with pytest.raises(NoticeError, match=match) as caught:
        send(server, seconds, **options)
    assert SECRET not in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)


def test_a_document_arrives_as_json(hook):
    hook.scripts["/hook"] = lambda handler, _: handler.answer(200, b"ok")
    send(hook)
    ((path, headers),) = hook.requests
    assert path == f"/hook?token={SECRET}"
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert [json.loads(body) for body in hook.posted] == [{"text": "päng"}]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_tried_again_until_it_does(hook, status):
    hook.scripts["/hook"] = lambda handler, nth: handler.answer(status if nth < 3 else 204)
    send(hook)
    assert len(hook.requests) == 3


def test_what_does_not_pass_is_given_up(hook):
    hook.scripts["/hook"] = lambda handler, _: handler.answer(500)
    refused(hook, r"the server answered 500 \(3 tries\)")
    assert len(hook.requests) == 3


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_a_refusal_is_not_tried_again(hook, status):
    hook.scripts["/hook"] = lambda handler, _: handler.answer(status, b"no_service")
    refused(hook, f"the server answered {status}")
    assert len(hook.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(hook, status):
    hook.scripts["/hook"] = lambda handler, _: handler.answer(status, Location=hook.url("/inner", host="127.0.0.1"))
    hook.scripts["/inner"] = lambda handler, _: handler.answer(200)
    refused(hook, f"the server answered {status}")
    assert hook.paths() == [f"/hook?token={SECRET}"]


def test_a_reset_is_tried_again(hook):
    def reset(handler, nth):
        if nth < 3:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            handler.connection.close()
        else:
            handler.answer(200)

    hook.scripts["/hook"] = reset
    send(hook)
    assert len(hook.requests) == 3


def test_a_server_that_says_nothing_is_given_up(hook, monkeypatch):
    monkeypatch.setattr(post, "_SILENT_SECONDS", 0.3)
    go_on = threading.Event()
    hook.scripts["/hook"] = lambda *_: go_on.wait(30)
    refused(hook, "the server did not answer in time")
    go_on.set()


def test_a_server_that_drips_is_cut_at_the_end_of_the_time(hook, monkeypatch):
    monkeypatch.setattr(post, "_SILENT_SECONDS", 30.0)  # nor is it ever silent
    go_on, to_the_end = threading.Event(), threading.Event()

    def drip(handler, _):
        for _drop in range(200):
            if go_on.wait(0.05):
                return
            handler.wfile.write(b"H")
            handler.wfile.flush()
        to_the_end.set()

    hook.scripts["/hook"] = drip
    refused(hook, "the connection failed|did not answer in time|no time left", seconds=0.5)
    assert not to_the_end.is_set()
    go_on.set()


def test_a_server_that_is_not_there_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(NoticeError, match=r"the connection failed \(Connection refused\) \(3 tries\)"):
        post_json(f"http://127.0.0.1:{port}/{SECRET}", {}, seconds=20)


def test_a_name_that_nobody_knows_is_said():
    with pytest.raises(NoticeError, match="the connection failed"):
        post_json("https://nowhere.invalid/x", {}, seconds=20)


def test_a_certificate_that_is_not_accepted_ends_it_at_once(secure_hook):
    secure_hook.scripts["/hook"] = lambda handler, _: handler.answer(200)
    refused(secure_hook, "the server's certificate is not accepted")
    assert secure_hook.posted == []


def test_a_certificate_that_is_accepted_is_enough(secure_hook):
    secure_hook.scripts["/hook"] = lambda handler, _: handler.answer(200)
    send(secure_hook, tls=secure_hook.trust)
    assert len(secure_hook.posted) == 1


def test_proxies_of_the_environment_are_not_used(hook, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    hook.scripts["/hook"] = lambda handler, _: handler.answer(200)
    send(hook)
    assert len(hook.posted) == 1
