"""A run that really failed, on a real instance, told by the real sensor to a real server that behaves or does not."""

import json
import os
import sys
import threading

import dagster as dg
import pytest
from dagster._core.test_utils import create_run_for_test

from extraction_dagster.defs.notify import run_failure_notices
from extraction_dagster.defs.partitions import add_ranges, id_ranges
from extraction_dagster.defs.resources import Extraction, plain_failures
from extraction_dagster.errors.catalog import SourceUnreachableError
from extraction_dagster.records import Failure, IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import Fingerprints, open_catalog

# Dagster looks at a resource's fields as it did with an older pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")
RANGE = IdRange(1, 6)


@dg.asset(partitions_def=id_ranges)
def video_frames(context: dg.AssetExecutionContext, extraction: Extraction):
    """Fail as the real one does, after two of its records failed."""
    with plain_failures(), extraction.catalog() as catalog:
        plan = catalog.plan(RANGE, Fingerprints("f", "e"))
        broken = [Failure(n, "", "decode", "VideoDecodeError", "broken") for n in (2, 3)]
        catalog.record_failures(plan, broken, run_id=context.run.run_id)
        raise SourceUnreachableError("mark rows", "postgresql://operator:hunter2@db/videos", "it\nwent away")


@dg.asset
def reconciled():
    """Fail with an error of somebody else's."""
    message = "GET https://store/x?token=abc says no"
    raise ValueError(message)


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        add_ranges(instance, [RANGE])
        yield instance


@pytest.fixture
def hook(hook):
    hook.scripts["/hook"] = lambda handler, _: handler.answer(200)
    return hook


@pytest.fixture(autouse=True)
def _told(sqlite_database, hook, monkeypatch, tmp_path):
    """A table of six rows, and a webhook that is told of failures."""
    sqlite_database.create(ids=range(1, 7))
    monkeypatch.setenv("EXTRACTION_HOME", str(tmp_path))
    monkeypatch.setenv("EXTRACTION_NOTIFY", "webhook")
    monkeypatch.setenv("EXTRACTION_NOTIFY_URL", hook.url("/hook", host="127.0.0.1"))
    with open_catalog(load_settings()):
        pass


class Daemon:
    """Ticks the sensor as the daemon does, with its cursor."""

    def __init__(self, instance):
        self.instance, self.cursor, self.logged = instance, None, []
        assert self.tick().skip_message.startswith("Initiating run_failure_notices")

    def tick(self):
        with dg.build_sensor_context(
            self.instance, cursor=self.cursor, resources={"extraction": Extraction()}
        ) as context:
            result = run_failure_notices.evaluate_tick(context)
        self.cursor = result.cursor
        assert [reaction.error for reaction in result.dagster_run_reactions] == [None] * len(
            result.dagster_run_reactions
        ), "the tick must not fail"
        return result


@pytest.fixture
def daemon(instance):
    return Daemon(instance)


def fail(instance, asset=video_frames, **tags):
    key = RANGE.partition_key if asset is video_frames else None
    done = dg.materialize(
        [asset],
        instance=instance,
        partition_key=key,
        resources={"extraction": Extraction()},
        raise_on_error=False,
        tags=tags,
    )
    assert not done.success
    return done.run_id


def test_a_failed_run_is_told_once_with_range_run_error_records_and_command(daemon, instance, hook):
    run_id = fail(instance)
    daemon.tick()
    daemon.tick()
    (document,) = [json.loads(body) for body in hook.posted]
    assert document["key"] == "1-6"
    assert document["run_id"] == run_id
    assert document["step"] == "video_frames"
    assert document["failed_records"] == 2
    assert document["failures_in_a_row"] == 1
    assert document["error"].startswith(
        "Cannot mark rows at postgresql://db/videos: it went away. Nothing was changed."
    )
    assert "'extraction launch 1-6'" in document["fix"]
    assert "hunter2" not in json.dumps(document)


def test_a_run_of_no_range_is_told_with_what_it_said_and_no_signature(daemon, instance, hook):
    fail(instance, reconciled)
    daemon.tick()
    (document,) = [json.loads(body) for body in hook.posted]
    assert (document["key"], document["failed_records"]) == (None, 0)
    assert document["error"] == "reconciled: ValueError: GET https://store/x?… says no"


def test_a_run_whose_process_died_says_what_the_instance_says(daemon, instance, hook):
    run = create_run_for_test(
        instance, job_name="extraction_job", status=dg.DagsterRunStatus.STARTED, tags={"dagster/partition": "1-6"}
    )
    instance.report_run_failed(run, "Its process is gone. Its range is asked for again and goes on where it was.")
    daemon.tick()
    (document,) = [json.loads(body) for body in hook.posted]
    assert (document["step"], document["key"]) == ("", "1-6")
    assert document["error"].startswith("Its process is gone.")


def test_a_run_that_dagster_tries_again_is_not_told(daemon, instance, hook):
    fail(instance, **{"dagster/will_retry": "true"})
    daemon.tick()
    assert hook.posted == []


def test_a_range_that_fails_again_and_again_is_told_of_less_and_less_and_then_each_hour(daemon, instance, hook):
    for _ in range(14):
        fail(instance)
        daemon.tick()
    assert [json.loads(body)["failures_in_a_row"] for body in hook.posted] == [1, 2, 4, 8, 12, 12, 12]


def test_while_the_database_is_down_the_notice_says_that_records_are_not_known(daemon, instance, hook, sqlite_database):
    fail(instance)
    sqlite_database.execute("ALTER TABLE insta_content RENAME TO away")
    daemon.tick()
    (document,) = [json.loads(body) for body in hook.posted]
    assert document["failed_records"] is None
    assert "How many of its records failed is not known." in document["text"]


def reset(handler, _):
    handler.connection.close()


@pytest.mark.parametrize("script", [lambda handler, _: handler.answer(500), reset], ids=["500", "reset"])
def test_a_server_that_misbehaves_costs_nothing_but_the_notice(daemon, instance, hook, script):
    hook.scripts["/hook"] = script
    fail(instance)
    daemon.tick()  # asserts that the tick did not fail
    assert len(hook.posted) == 3
    hook.scripts["/hook"] = lambda handler, _: handler.answer(200)
    fail(instance)
    daemon.tick()
    assert len(hook.posted) == 4  # the next one arrives, and the first is not sent again


def test_a_server_that_is_slow_does_not_hold_up_the_tick(daemon, instance, hook, monkeypatch):
    go_on = threading.Event()
    hook.scripts["/hook"] = lambda *_: go_on.wait(60)
    monkeypatch.setattr("extraction_dagster.notify._POST_SECONDS", 0.3)
    fail(instance)
    daemon.tick()
    go_on.set()


@pytest.mark.parametrize(
    ("name", "value"),
    [("EXTRACTION_NOTIFY", "no_such_module:say"), ("EXTRACTION_NOTIFY_URL", "http://10.0.0.1/x")],
    ids=["a notifier that can't be had", "an address that is refused"],
)
def test_settings_that_are_wrong_fail_no_tick(daemon, instance, hook, monkeypatch, name, value):  # noqa: PLR0913, PLR0917
    monkeypatch.setenv(name, value)
    fail(instance)
    daemon.tick()
    assert hook.posted == []


def test_what_nobody_thought_of_fails_no_tick(daemon, instance, hook, monkeypatch):
    def explode(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("extraction_dagster.defs.instance.runs.first_failure", explode)
    fail(instance)
    daemon.tick()
    assert hook.posted == []


def test_by_default_nobody_is_told_and_the_sensor_is_off(daemon, instance, hook, monkeypatch):
    monkeypatch.setenv("EXTRACTION_NOTIFY", "none")
    fail(instance)
    daemon.tick()
    assert hook.posted == []
    assert run_failure_notices.default_status == dg.DefaultSensorStatus.STOPPED


@pytest.mark.parametrize(("notify", "status"), [("", "STOPPED"), ("log", "RUNNING")])
def test_the_sensor_is_on_where_somebody_is_to_be_told(notify, status, tmp_path, commands):
    code = "from extraction_dagster.defs.notify import run_failure_notices as s; print(s.default_status.value)"
    environment = {**os.environ, "EXTRACTION_NOTIFY": notify, "EXTRACTION_NOTIFY_URL": ""}
    done = commands.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert done.stdout.split() == [status]
