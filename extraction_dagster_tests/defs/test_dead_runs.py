"""A worker that was killed before its first step, hence before it could tag its run."""

import json
import os
import subprocess
import sys
import uuid

import dagster as dg
import pytest
from dagster._core.events import EngineEventData

from extraction_dagster.defs.runs import bury_dead_runs

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


def after_burial(instance, run):
    bury_dead_runs(instance)
    return instance.get_run_by_id(run.run_id).status


@pytest.mark.parametrize(("where", "expected"), [(LOCAL, FAILED), (REMOTE, STARTED), ({}, STARTED)])
def test_a_local_worker_that_died_before_its_first_step_is_told_by_its_process_id(instance, dead_id, where, expected):
    run = add(instance, where)
    instance.report_engine_event(f"Started process for run (pid: {dead_id}).", run, EngineEventData.in_process(dead_id))
    assert after_burial(instance, run) == expected


def test_a_local_worker_that_lives_and_has_not_come_to_its_first_step_goes_on(instance):
    run = add(instance, LOCAL)
    own = os.getpid()
    instance.report_engine_event(f"Started process for run (pid: {own}).", run, EngineEventData.in_process(own))
    assert after_burial(instance, run) == STARTED
