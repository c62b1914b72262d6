"""Run a range in this process, against the real instance: what `extraction launch` and the demo do.

The run is an ordinary one: it is in the run history, registers its partition and logs its materializations. It needs
no daemon, and keeps the model resident from one range to the next.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import dagster as dg

from extraction_dagster.defs.partitions import register
from extraction_dagster.errors import InstanceError, RangeBusyError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings

_PROCESS_TAG = "extraction/process"
_ACTIVE = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING]
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run of one range.

    Attributes:
        run_id: In Dagster's run history.
        success: Whether all three assets materialized.
        error: Why not, in one line; empty on success.
    """

    run_id: str
    success: bool
    error: str


def template(name: str) -> str:
    """The text of a configuration file that this package carries."""
    return (resources.files("extraction_dagster") / "templates" / name).read_text()


@contextmanager
def open_instance(settings: Settings) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance: DAGSTER_HOME's when it is set, else one under home that is made when it is missing.

    Raises:
        InstanceError: DAGSTER_HOME is no folder, or its dagster.yaml can't be used.
    """
    if not os.environ.get("DAGSTER_HOME"):
        folder = settings.home / "dagster"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dagster.yaml").write_text(template("dagster.yaml"))
        os.environ["DAGSTER_HOME"] = str(folder)
    home = os.environ["DAGSTER_HOME"]
    if not Path(home).is_dir():
        raise InstanceError(home, "it is no folder")
    try:
        instance = dg.DagsterInstance.get()
    except dg.DagsterError as error:
        raise InstanceError(home, str(error)) from error
    with instance:
        yield instance


def launch(instance: dg.DagsterInstance, id_range: IdRange) -> FinishedRun:
    """Materialize the three assets of a range, in this process.

    Raises:
        RangeBusyError: The range has an active run already.
        KeyboardInterrupt: Ctrl+C; finished shards are kept, and the range can be launched again.
    """
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - definitions import this folder

    _bury_dead_runs(instance)
    register(instance, id_range.partition_key)
    active = instance.get_runs(
        dg.RunsFilter(
            tags={"dagster/partition": id_range.partition_key}, statuses=[*_ACTIVE, dg.DagsterRunStatus.QUEUED]
        )
    )
    if active:
        raise RangeBusyError(id_range.partition_key, active[0].run_id)
    result = defs.resolve_job_def("extraction_job").execute_in_process(
        instance=instance,
        partition_key=id_range.partition_key,
        tags={_PROCESS_TAG: f"{socket.gethostname()}:{os.getpid()}"},
        run_config=_QUIET,
        raise_on_error=False,
    )
    return FinishedRun(run_id=result.run_id, success=result.success, error="" if result.success else _why(result))


def _why(result: dg.ExecuteInProcessResult) -> str:
    """The failed step's own sentence."""
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            if data.user_failure_data and data.user_failure_data.description:
                return data.user_failure_data.description
            if data.error:
                return f"{event.step_key}: {(data.error.cause or data.error).message.strip()}"
    return "the run was stopped before it ended"


def _bury_dead_runs(instance: dg.DagsterInstance) -> None:
    """End the runs whose process was killed, and free the pool slots that they held.

    Without this, the next launch would wait for ever for a slot that nobody is going to give back.
    """
    for run in instance.get_runs(dg.RunsFilter(statuses=_ACTIVE)):
        host, _, process = run.tags.get(_PROCESS_TAG, "").rpartition(":")
        if host == socket.gethostname() and not _alive(int(process)):
            instance.report_run_failed(run, "Its process is gone. Launch the range again: it goes on where it was.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
