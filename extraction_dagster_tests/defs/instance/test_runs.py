"""Which runs are active, which are dead, and what became of those that ended; on a real instance."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime, timedelta

import dagster as dg
import psutil
import pytest
from dagster._core.test_utils import create_run_for_test

from extraction_dagster.defs.instance import runs as runs_module
from extraction_dagster.defs.instance.runs import InstanceRuns, active_runs, fail_dead_runs, range_of
from extraction_dagster.defs.partitions import add_ranges, is_dead, process_tags
from extraction_dagster.records import IdRange
from extraction_dagster.ticks.places import History, Outcomes

STARTED, SUCCESS = dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.SUCCESS
FAILURE, CANCELED = dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def make_run(instance, status=STARTED, run_id=None, **tags):
    tags = {name.replace("__", "/"): value for name, value in tags.items()}
    return create_run_for_test(instance, job_name="extraction_job", status=status, run_id=run_id, tags=tags)


@pytest.fixture
def killed():
    """The tag of a process that was killed, as the process itself would have written it."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = int(psutil.Process(process.pid).create_time())
        process.kill()
    return f"{socket.gethostname()}:{process.pid}:{started}"


def test_a_run_whose_process_was_killed_is_ended_and_its_range_is_free(instance, killed):
    run_id = str(uuid.uuid4())
    tags = {".dagster__extraction_process": killed, ".dagster__extraction_process_run": run_id}
    make_run(instance, run_id=run_id, dagster__partition="1-9", **tags)
    assert InstanceRuns(instance).active() == []
    assert instance.get_run_by_id(run_id).status == FAILURE
    assert InstanceRuns(instance).history(IdRange(1, 9)).failures_in_a_row == 1


def test_a_run_that_works_is_left_alone(instance):
    run_id = str(uuid.uuid4())
    tags = {name.replace("/", "__"): value for name, value in process_tags(run_id).items()}
    make_run(instance, run_id=run_id, dagster__partition="1-9", **tags)
    assert InstanceRuns(instance).active() == [IdRange(1, 9)]
    assert instance.get_run_by_id(run_id).status == STARTED


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, STARTED])
def test_a_retry_that_inherited_the_tags_of_its_dead_parent_is_left_alone(instance, killed, status):
    tags = {".dagster__extraction_process": killed, ".dagster__extraction_process_run": str(uuid.uuid4())}
    retry = make_run(instance, status=status, dagster__partition="1-9", **tags)
    fail_dead_runs(instance)
    assert instance.get_run_by_id(retry.run_id).status == status


def test_a_process_that_is_a_zombie_or_another_one_of_the_same_number_is_dead():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = int(psutil.Process(process.pid).create_time())
        tag = f"{socket.gethostname()}:{process.pid}:"
        assert not is_dead(f"{tag}{started}")
        assert is_dead(f"{tag}{started - 5}")
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # killed, and nobody has asked how it ended
        assert is_dead(f"{tag}{started}")
    assert is_dead(f"{tag}{started}")


@pytest.mark.parametrize("tag", ["", "elsewhere:1:1", f"{socket.gethostname()}:x:1", f"{socket.gethostname()}:1:"])
def test_a_tag_of_another_host_or_of_no_sense_proves_nothing(tag):
    assert not is_dead(tag)


@pytest.mark.parametrize(
    ("tags", "id_range"),
    [
        ({"dagster__partition": "1-9"}, IdRange(1, 9)),
        (
            {
                "dagster__asset_partition_range_start": "10-19",
                "dagster__asset_partition_range_end": "30-39",
            },
            IdRange(10, 39),
        ),
        ({"dagster__partition": "seven"}, None),
        ({}, None),
    ],
)
def test_the_range_of_a_run_follows_from_its_tags(instance, tags, id_range):
    assert range_of(make_run(instance, **tags)) == id_range


def test_every_run_that_has_not_ended_is_active_whoever_launched_it(instance):
    for number, status in enumerate(set(dg.DagsterRunStatus) - {dg.DagsterRunStatus.QUEUED}):  # needs a code location
        make_run(instance, status=status, dagster__partition=f"{number}-{number}")
    statuses = {run.status.value for run in active_runs(instance)}
    assert statuses == {"NOT_STARTED", "STARTING", "STARTED", "CANCELING"}


def test_the_history_counts_failures_since_the_last_success(instance):
    runs, id_range = InstanceRuns(instance), IdRange(1, 9)
    assert runs.history(id_range) == History()
    for status in (FAILURE, SUCCESS, FAILURE, FAILURE):
        make_run(instance, status=status, dagster__partition="1-9")
    make_run(instance, status=STARTED, dagster__partition="1-9")
    make_run(instance, status=SUCCESS, dagster__partition="10-19")
    history = runs.history(id_range)
    assert history.failures_in_a_row == 2
    assert abs(datetime.now(UTC) - history.ended_at) < timedelta(minutes=10)
    make_run(instance, status=CANCELED, dagster__partition="1-9")
    assert runs.history(id_range).failures_in_a_row == 0


def test_the_outcomes_are_those_of_the_newest_runs_of_ranges_alone(instance):
    runs = InstanceRuns(instance)
    assert runs.outcomes() == Outcomes()
    for status, key in ((SUCCESS, "1-9"), (FAILURE, "10-19"), (FAILURE, "20-29")):
        make_run(instance, status=status, dagster__partition=key)
    make_run(instance, status=SUCCESS)  # a reconciliation, say
    make_run(instance, status=CANCELED, dagster__partition="30-39")
    ended = {key: runs.history(IdRange.parse(key)).ended_at for key in ("1-9", "10-19", "20-29")}
    assert runs.outcomes() == Outcomes(ended["1-9"], max(ended["10-19"], ended["20-29"]))


@pytest.mark.parametrize(
    "tags",
    [
        {".dagster__grpc_info": "{"},
        {".dagster__grpc_info": "[]"},
        {".dagster__grpc_info": '{"host": "localhost"}', ".dagster__extraction_process": "x"},
        {".dagster__extraction_process": f"{socket.gethostname()}:{'9' * 5000}:1"},
        {".dagster__extraction_process": f"{socket.gethostname()}:{'9' * 50}:1"},
        {"dagster__max_runtime_seconds": "soon"},
    ],
)
def test_a_run_with_odd_tags_stops_no_tick(instance, killed, tags):
    odd = make_run(instance, dagster__partition="1-9", **tags)
    run_id = str(uuid.uuid4())
    tags = {".dagster__extraction_process": killed, ".dagster__extraction_process_run": run_id}
    make_run(instance, run_id=run_id, dagster__partition="10-19", **tags)
    with a_week_later():
        fail_dead_runs(instance)
    assert instance.get_run_by_id(run_id).status == FAILURE
    assert range_of(instance.get_run_by_id(odd.run_id)) == IdRange(1, 9)


@contextlib.contextmanager
def a_week_later():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module.time, "time", lambda now=time.time(): now + 7 * 86_400)  # noqa: B008 - now
        yield


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"dagster__partition": "1-9"}, FAILURE),
        ({"dagster__partition": "1-9", "dagster__max_runtime_seconds": "300000"}, FAILURE),
        ({"dagster__partition": "1-9", "dagster__max_runtime_seconds": "400000"}, STARTED),
        ({}, STARTED),
    ],
)
def test_a_run_that_never_ends_keeps_its_range_for_some_days_only(instance, tags, expected):
    run = make_run(instance, **tags)
    fail_dead_runs(instance)
    assert instance.get_run_by_id(run.run_id).status == STARTED
    with a_week_later():
        fail_dead_runs(instance)
    assert instance.get_run_by_id(run.run_id).status == expected


def test_the_partitions_looked_up_are_ranges_that_hold_an_id(instance):
    known = ["-5--1", "0-0", "1-9", "5-60", "50-59", "61-70"]
    add_ranges(instance, [IdRange.parse(key) for key in known])
    instance.add_dynamic_partitions("id_ranges", ["by hand", "1-", "9" * 5000 + "-1", "5-1"])
    runs = InstanceRuns(instance)
    assert set(runs.partitions([-7, -3])) == {IdRange(-5, -1)}
    found = {str(id_range) for id_range in runs.partitions([0, 9, 61]) if id_range.last_id >= 0}
    assert found == {"0-0", "1-9", "5-60", "61-70"}
    assert {str(id_range) for id_range in runs.partitions([71]) if id_range.last_id >= 0} == set()
