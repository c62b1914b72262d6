"""Who is told, and that whoever tells goes on whatever happens."""

import json
import sys
import threading

import pytest

from extraction_dagster.errors.base import SettingsError
from extraction_dagster.errors.watch import NoticeError, NotifierError
from extraction_dagster.notify.notice import RunFailure
from extraction_dagster.notify.notifiers import deliver, make_notifier
from extraction_dagster.settings import load_settings

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
