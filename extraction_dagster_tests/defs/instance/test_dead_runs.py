"""Workers that were killed: before their first step, so before they could tag their run; or holding a pool's slot."""

import json
import os
import subprocess
import sys
import uuid

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.events import EngineEventData

from extraction_dagster.defs.instance.runs import fail_dead_runs, silent_runs
from extraction_dagster.defs.partitions import PROCESS_TAG, process_tags
from extraction_dagster.stages.catalog.database import make_engine
from extraction_dagster.stages.catalog.signs import give_sign
from extraction_dagster.stages.catalog.state_tables import prepare

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


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The tag of a process on another machine, and the state database that holds its signs of life."""
    monkeypatch.setenv("EXTRACTION_STATE_URL", f"sqlite:///{tmp_path}/state.db")
    engine = make_engine(f"sqlite:///{tmp_path}/state.db", setting="EXTRACTION_STATE_URL")
    prepare(engine, "a" * 16)
    yield engine, {PROCESS_TAG: "first/other-boot.4026531836:17:1700000000", "dagster/partition": "1-9"}
    engine.dispose()


def let_time_pass(engine, run, seconds):
    with engine.begin() as connection:
        moment = f"CAST(CAST(value AS INTEGER) - {seconds} AS TEXT)"
        statement = f"UPDATE extraction_meta SET value = {moment} WHERE key = 'alive:{run.run_id}'"
        connection.execute(sa.text(statement))


def test_a_run_whose_machine_is_gone_is_ended_once_it_gave_no_sign_of_life_for_long(instance, elsewhere):
    engine, tags = elsewhere
    run = add(instance, tags)
    give_sign(engine, run.run_id)
    assert status_after_the_check(instance, run) == STARTED
    let_time_pass(engine, run, 250)
    assert status_after_the_check(instance, run) == STARTED
    ((silent, seconds),) = silent_runs(instance)
    assert (silent.run_id, 250 <= seconds < 290) == (run.run_id, True)
    give_sign(engine, run.run_id)
    assert silent_runs(instance)[0][1] < 60
    let_time_pass(engine, run, 301)
    assert status_after_the_check(instance, run) == FAILED
    assert silent_runs(instance) == []


def test_a_run_that_never_gave_a_sign_is_not_judged_at_once(instance, elsewhere):
    assert status_after_the_check(instance, add(instance, elsewhere[1])) == STARTED


@pytest.mark.parametrize("name", ["another-name", "first"])
def test_a_process_of_this_kernel_and_container_is_seen_whatever_the_hosts_name_is_now(
    name, instance, dead_id, elsewhere
):
    own = process_tags("")[PROCESS_TAG]
    place, number, started = own.rsplit(":", 2)
    facts = place.partition("/")[2]
    if not facts:
        pytest.skip("this system does not tell its kernel and container")
    alive = add(instance, {PROCESS_TAG: f"{name}/{facts}:{number}:{started}"})
    dead = add(instance, {PROCESS_TAG: f"{name}/{facts}:{dead_id}:{started}"})
    assert status_after_the_check(instance, alive) == STARTED
    assert instance.get_run_by_id(dead.run_id).status == FAILED
    assert silent_runs(instance) == []
    assert elsewhere
