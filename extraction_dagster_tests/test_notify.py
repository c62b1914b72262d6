"""What a notice says and what it never does, who is told, and that the caller goes on whatever happens."""

import json
import socket
import sys
import threading

import pytest

from extraction_dagster import notify as notices
from extraction_dagster.errors import SettingsError
from extraction_dagster.errors.runs import NoticeError, NotifierError
from extraction_dagster.notify import RunFailure, deliver, make_notifier, post_json, redact
from extraction_dagster.settings import load_settings

SECRET = "T0B0canary"  # noqa: S105 - it must not be seen anywhere
FAILURE = RunFailure("r-1", "extraction_job", "1-9", "video_frames", "a < b & c > d", failed_records=0)
TOLD = RunFailure("r-1", "extraction_job", "1-1000", "video_frames", "The store is down", failed_records=3)


@pytest.fixture
def secure_hook(hook_servers):
    with hook_servers(tls=True) as server:
        server.address = server.url("/hook", host="localhost")
        yield server


def test_a_function_of_ones_own_may_import_the_record_from_where_it_was():
    from extraction_dagster.notify.notice import RunFailure as Earlier  # noqa: PLC0415

    assert Earlier is RunFailure


def test_a_notice_names_range_step_run_error_records_and_the_command():
    assert TOLD.text == (
        "Range 1-1000 failed at video_frames (run r-1): The store is down. 3 of its records failed. Nothing is lost: "
        "the sensor asks for the range again, and it goes on where it was. Once the cause is mended, 'extraction "
        "launch 1-1000' does so at once; 'extraction errors' lists records that failed."
    )


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (RunFailure("r", "j", "1-9", "", "gone.", 0), "Range 1-9 failed (run r): gone. Nothing is lost"),
        (
            RunFailure("r", "j", "1-9", "", "", None),
            "no reason was given. How many of its records failed is not known.",
        ),
        (RunFailure("r", "j", "1-9", "s", "x", 0, 4), "(run r), for the 4th time in a row: x."),
        (RunFailure("r", "j", "1-9", "s", "x", 0, 12), "for the 12th time in a row"),
        (RunFailure("r", "j", "1-9", "s", "x", 0, 22), "for the 22nd time in a row"),
        (RunFailure("r", "reconcile_job", None, "s", "x", 0), "Job reconcile_job failed at s (run r): x. Look at the"),
        (RunFailure("r", "j", "1-9", "s", "x", 0, is_test=True), "This is a test, nothing has failed. Range 1-9"),
    ],
)
def test_a_notice_says_what_there_is_to_say_and_no_more(failure, said):
    assert said in failure.text


def test_a_program_gets_every_part():
    document = TOLD.document()
    assert document.pop("text") == TOLD.text
    assert document.pop("fix").startswith("Nothing is lost")
    assert document == {
        "event": "run_failed",
        "run_id": "r-1",
        "job": "extraction_job",
        "key": "1-1000",
        "step": "video_frames",
        "error": "The store is down",
        "failed_records": 3,
        "failures_in_a_row": 1,
        "is_test": False,
    }


@pytest.fixture
def secretive(settings):
    return settings(
        source_url="postgresql://operator:hunter2@db/videos",
        qdrant_api_key="key-of-the-kingdom",
        notify="webhook",
        notify_url="https://hooks.example.com/services/T0/B0/abcdef",
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no route to postgresql://operator:hunter2@db/videos", "no route to (hidden)"),
        ("password 'hunter2' is wrong", "password '(hidden)' is wrong"),
        ("401 for key-of-the-kingdom", "401 for (hidden)"),
        ("posting to https://hooks.example.com/services/T0/B0/abcdef", "posting to (hidden)"),
        ("GET https://me:pw@host/a.mp4?sig=abc&x=1 failed", "GET https://host/a.mp4?… failed"),
        ("s3://bucket/a.mp4?versionId=7", "s3://bucket/a.mp4?versionId=7"),
        ("two\n  lines\tand more", "two lines and more"),
        ("is it up? yes", "is it up? yes"),
    ],
)
def test_secrets_credentials_and_signatures_are_left_out(secretive, text, shown):
    assert redact(text, secretive) == shown


def test_a_very_long_error_is_cut(settings):
    shown = redact("x" * 5000, settings())
    assert (len(shown), shown[-2:]) == (600, "x…")


def test_no_cut_leaves_half_of_a_secret(secretive, monkeypatch):
    monkeypatch.setattr("extraction_dagster.notify._LONGEST_LOOKED_AT", 60)
    monkeypatch.setattr("extraction_dagster.notify._LONGEST_ERROR", 60)
    for secret in ("key-of-the-kingdom", "hunter2", "https://me:hunter2-hunter2@host/a?sig=hunter2"):
        for before in range(110):
            shown = redact(f"{'.' * before}{secret} and {'more ' * 50}", secretive)
            assert "key-" not in shown
            assert "hunt" not in shown
    for cut in range(4, 18):  # by whoever said it
        assert "key-" not in redact(f"wrong: {'key-of-the-kingdom'[:cut]}…", secretive)
    assert redact("it says post", secretive) == "it says post"


def test_the_cost_of_a_text_grows_no_faster_than_its_length(secretive, least_seconds):
    for shape in ("a", "://", "a:", "@", " ", "'", "key-"):
        assert least_seconds(redact, shape * 1_000_000, secretive) < 1


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
    monkeypatch.setattr(notices, "_WAIT_SECONDS", 0.01)


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
    monkeypatch.setattr(notices, "_SILENT_SECONDS", 0.3)
    go_on = threading.Event()
    hook.scripts["/hook"] = lambda *_: go_on.wait(30)
    refused(hook, "the server did not answer in time")
    go_on.set()


def test_a_server_that_drips_is_cut_at_the_end_of_the_time(hook, monkeypatch):
    monkeypatch.setattr(notices, "_SILENT_SECONDS", 30.0)  # nor is it ever silent
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
