"""Who is told, and that whoever tells goes on whatever happens."""

import json
import socket
import sys
import threading

import pytest

from extraction_dagster.errors import SettingsError
from extraction_dagster.errors.runs import NoticeError, NotifierError
from extraction_dagster.notify import notifiers
from extraction_dagster.notify.notice import RunFailure
from extraction_dagster.notify.notifiers import deliver, make_notifier, post_json
from extraction_dagster.settings import load_settings

SECRET = "T0B0canary"  # noqa: S105 - it must not be seen anywhere
FAILURE = RunFailure("r-1", "extraction_job", "1-9", "video_frames", "a < b & c > d", failed_records=0)


def test_by_default_nobody_is_told(settings):
    assert make_notifier(settings()) is None


def test_the_log_gets_the_text(settings, caplog):
    deliver(make_notifier(settings(notify="log")), FAILURE)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("ERROR", FAILURE.text)]


def test_a_webhook_gets_the_document(settings, hook):
    hook.scripts["/hook"] = lambda handler, _: handler.answer(200)
    deliver(make_notifier(settings(notify="webhook", notify_url=hook.address)), FAILURE)
    assert [json.loads(body) for body in hook.posted] == [FAILURE.document()]


def test_a_chat_gets_a_text_without_the_characters_that_it_takes_for_its_own(settings, hook):
    hook.scripts["/hook"] = lambda handler, _: handler.answer(200, b"ok")
    deliver(make_notifier(settings(notify="slack", notify_url=hook.address)), FAILURE)
    (body,) = hook.posted
    document = json.loads(body)
    assert set(document) == {"text"}
    assert "a &lt; b &amp; c &gt; d" in document["text"]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A module of a user's own."""
    (tmp_path / "my_alerts.py").write_text(
        "told = []\nclass Chat:\n    @staticmethod\n    def say(failure):\n        told.append(failure)\nnumber = 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_alerts", None)


@pytest.mark.usefixtures("plugin")
def test_a_function_of_ones_own_gets_the_failure(settings):
    deliver(make_notifier(settings(notify="my_alerts:Chat.say")), FAILURE)
    assert sys.modules["my_alerts"].told == [FAILURE]


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("no_such_module:say", "ModuleNotFoundError"),
        ("my_alerts:nothing", "AttributeError"),
        ("my_alerts:number", "it is a int, expected a function"),
    ],
)
def test_a_function_that_is_none_is_named(settings, path, why):
    with pytest.raises(NotifierError, match=why):
        make_notifier(settings(notify=path))


def raises(error):
    def notifier(_failure):
        raise error

    return notifier


@pytest.mark.parametrize("error", [ValueError("secret-in-here"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_a_notifier_raises_becomes_one_line_without_its_words(error):
    with pytest.raises(NoticeError, match=f"{type(error).__name__} was raised") as caught:
        deliver(raises(error), FAILURE)
    assert "secret-in-here" not in str(caught.value)


def test_a_notifier_that_hangs_is_left_behind():
    go_on = threading.Event()
    with pytest.raises(NoticeError, match=r"it did not end within 0\.05 s"):
        deliver(lambda _: go_on.wait(30), FAILURE, seconds=0.05)
    go_on.set()


@pytest.mark.parametrize(
    ("notify", "url", "said"),
    [
        ("webhook", None, "notify=webhook needs notify_url"),
        ("slack", "http://10.0.0.1/SECRET", "notify_url must be https"),
        ("slack", "http://hooks.example.com/SECRET", "notify_url must be https"),
        ("webhook", "http://127.0.0.1.example.com/SECRET", "notify_url must be https"),
        ("webhook", "ftp://example.com/SECRET", "an address such as https://"),
        ("webhook", "https://me:SECRET@example.com/", "an address such as https://"),
        ("webhook", "https://example.com/SECRET\r\nHost: x", "an address such as https://"),
        ("webhook", "https://[SECRET", "an address such as https://"),
        ("nobody", None, "none, log, webhook, slack, or module:function"),
        ("a b:c", None, "none, log, webhook, slack, or module:function"),
    ],
)
def test_an_address_that_will_not_do_is_refused_at_the_start_and_not_shown(monkeypatch, notify, url, said):
    monkeypatch.setenv("EXTRACTION_NOTIFY", notify)
    if url is not None:
        monkeypatch.setenv("EXTRACTION_NOTIFY_URL", url)
    with pytest.raises(SettingsError, match=said) as caught:
        load_settings()
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "allow"),
    [
        ("https://hooks.slack.com/services/x", "false"),
        ("http://localhost:8080/x", "false"),
        ("http://127.0.0.2/x", "false"),
        ("http://[::1]:8080/x", "false"),
        ("http://chat.internal/x", "true"),
    ],
)
def test_addresses_that_will_do(monkeypatch, url, allow):
    monkeypatch.setenv("EXTRACTION_NOTIFY", "slack")
    monkeypatch.setenv("EXTRACTION_NOTIFY_URL", url)
    monkeypatch.setenv("EXTRACTION_NOTIFY_ALLOW_HTTP", allow)
    assert load_settings().notify_url.get_secret_value() == url
    assert url not in repr(load_settings())


# Posting to a real server that is slow, silent, drips, resets, redirects, and to none at all


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(notifiers, "_WAIT_SECONDS", 0.01)


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
    monkeypatch.setattr(notifiers, "_SILENT_SECONDS", 0.3)
    go_on = threading.Event()
    hook.scripts["/hook"] = lambda *_: go_on.wait(30)
    refused(hook, "the server did not answer in time")
    go_on.set()


def test_a_server_that_drips_is_cut_at_the_end_of_the_time(hook, monkeypatch):
    monkeypatch.setattr(notifiers, "_SILENT_SECONDS", 30.0)  # nor is it ever silent
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
