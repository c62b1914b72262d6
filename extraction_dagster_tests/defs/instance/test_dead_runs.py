"""Workers that were killed: before their first step, so before they could tag their run; or holding a pool's slot."""

import json
import os
import subprocess
import sys
import uuid

import dagster as dg
import pytest
from dagster._core.events import EngineEventData

from extraction_dagster.defs.instance.runs import fail_dead_runs
from extraction_dagster.defs.partitions import PROCESS_TAG, process_tags

STARTED, FAILED = dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.FAILURE
LOCAL = {".dagster/grpc_info": json.dumps({"host": "localhost", "socket": "s"})}
REMOTE = {".dagster/grpc_info": json.dumps({"host": "code", "port": 4000})}


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture(scope="module")
def dead_id():
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def add(instance, tags):
    run_id = str(uuid.uuid4())
    return instance.add_run(dg.DagsterRun(job_name="extraction_job", run_id=run_id, status=STARTED, tags=tags))


def status_after_the_check(instance, run):
    fail_dead_runs(instance)
    return instance.get_run_by_id(run.run_id).status


@pytest.mark.parametrize(("where", "expected"), [(LOCAL, FAILED), (REMOTE, STARTED), ({}, STARTED)])
def test_a_local_worker_that_died_before_its_first_step_is_told_by_its_process_id(instance, dead_id, where, expected):
    run = add(instance, where)
    instance.report_engine_event(f"Started process for run (pid: {dead_id}).", run, EngineEventData.in_process(dead_id))
    assert status_after_the_check(instance, run) == expected


def test_a_local_worker_that_lives_and_has_not_come_to_its_first_step_goes_on(instance):
    run = add(instance, LOCAL)
    own = os.getpid()
    instance.report_engine_event(f"Started process for run (pid: {own}).", run, EngineEventData.in_process(own))
    assert status_after_the_check(instance, run) == STARTED


@pytest.fixture
def on_disk(tmp_path):
    """An instance that has pools; one in memory says that it has none."""
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        instance.event_log_storage.set_concurrency_slots("decode", 1)
        yield instance


def takes_the_slot(instance, run):
    """Whether a run gets the only slot of the pool."""
    return instance.event_log_storage.claim_concurrency_slot("decode", run.run_id, "video_frames").is_claimed


@pytest.mark.parametrize("was_tagged", [True, False])
def test_a_slot_of_a_run_that_was_ended_with_its_killed_worker_goes_to_the_next_run(on_disk, dead_id, was_tagged):
    tags = {PROCESS_TAG: process_tags("")[PROCESS_TAG].replace(f":{os.getpid()}:", f":{dead_id}:")}
    killed, waiting = add(on_disk, {**LOCAL, **(tags if was_tagged else {})}), add(on_disk, LOCAL)
    on_disk.report_engine_event(f"Started process for run (pid: {dead_id}).", killed)
    assert takes_the_slot(on_disk, killed)
    assert not takes_the_slot(on_disk, waiting)
    on_disk.report_run_failed(killed, "The code server noticed.")
    fail_dead_runs(on_disk)
    assert takes_the_slot(on_disk, waiting)


def test_a_run_that_was_ended_while_its_process_works_on_keeps_its_slot(on_disk):
    ended = add(on_disk, LOCAL)
    on_disk.add_run_tags(ended.run_id, process_tags(ended.run_id))
    waiting = add(on_disk, LOCAL)
    assert takes_the_slot(on_disk, ended)
    assert not takes_the_slot(on_disk, waiting)
    on_disk.report_run_canceled(ended, "Marked as canceled by force.")
    fail_dead_runs(on_disk)
    assert not takes_the_slot(on_disk, waiting)
