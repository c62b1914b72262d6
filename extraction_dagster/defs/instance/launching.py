"""Run a range in this process, against the real instance: what `extraction launch` and the demo do.

The run is an ordinary one: it is in the run history, registers its partition and logs its materializations. It needs
no daemon, and keeps the model resident from one range to the next.
"""

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import sqlalchemy as sa

from extraction_dagster.defs.instance.glance import template
from extraction_dagster.defs.instance.runs import (
    PARTITION_TAG,
    attended_runs,
    fail_dead_runs,
    first_failure,
    silent_runs,
)
from extraction_dagster.defs.partitions import FLOOR_TAG, add_ranges, process_tags
from extraction_dagster.defs.storage import ExtractionComputeLogManager
from extraction_dagster.errors import one_line
from extraction_dagster.errors.runs import HomeError, InstanceError, RangeBusyError, StorageError
from extraction_dagster.permissions import make_private_folder
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.database import describe, make_engine, parse_url

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


@contextmanager
def open_instance(settings: Settings) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance: DAGSTER_HOME's when it is set, else one under home that is made when it is missing.

    Raises:
        HomeError: The folder under home can't be made.
        InstanceError: DAGSTER_HOME is no folder, or its dagster.yaml can't be used.
        StorageError: Its storage can't be reached, now or while it is used.
    """
    if not os.environ.get("DAGSTER_HOME"):
        folder = settings.home / "dagster"
        try:
            make_private_folder(folder)
            (folder / "dagster.yaml").write_text(template("dagster.yaml"))
        except OSError as error:
            raise HomeError(str(settings.home), error.strerror or type(error).__name__) from error
        os.environ["DAGSTER_HOME"] = str(folder)
    home = os.environ["DAGSTER_HOME"]
    if not Path(home).is_dir():
        raise InstanceError(home, "it is no folder")
    with translated_storage(settings):
        try:
            instance = dg.DagsterInstance.get()
        except dg.DagsterError as error:
            raise InstanceError(home, str(error)) from error
        with instance:
            yield instance


def is_made(settings: Settings) -> bool:
    """Whether Dagster's storage holds its tables; nothing is made by looking.

    Raises:
        StorageError: It can't be reached.
        DatabaseUrlError: EXTRACTION_POSTGRES_URL is malformed.
    """
    if settings.postgres_url is None:
        return (settings.home / "dagster" / "history").is_dir()
    engine = make_engine(settings.postgres_url.get_secret_value(), setting="EXTRACTION_POSTGRES_URL")
    with translated_storage(settings), engine.connect() as connection:
        return sa.inspect(connection).has_table("runs")


@contextmanager
def translated_storage(settings: Settings) -> Iterator[None]:
    """Say in one line that Dagster's storage can't be reached; its own words may hold an address with a password.

    Raises:
        StorageError: It can't.
    """
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        said = str(getattr(error, "orig", None) or type(error).__name__).strip().partition("\n")[0]
        raise StorageError(_storage_name(settings), one_line(said)) from None
    except Exception as error:
        if not type(error).__name__.startswith("DagsterPostgres"):
            raise
        said = str(error.__cause__ or error.__context__ or type(error).__name__).strip().partition("\n")[0]
        raise StorageError(_storage_name(settings), one_line(said)) from None


def _storage_name(settings: Settings) -> str:
    if settings.postgres_url is None:
        return f"SQLite in {str(settings.home / 'dagster')!r} (EXTRACTION_HOME)"
    url = parse_url(settings.postgres_url.get_secret_value(), setting="EXTRACTION_POSTGRES_URL")
    return f"{describe(url)} (EXTRACTION_POSTGRES_URL)"


def launch(
    instance: dg.DagsterInstance, id_range: IdRange, *, floor_id: int | None = None, assets: Sequence[str] = ()
) -> FinishedRun:
    """Materialize the assets of a range, in this process.

    Args:
        instance: The Dagster instance.
        id_range: The range.
        floor_id: Rows at or below are left alone.
        assets: Names of those that are materialized; all three when empty.

    Raises:
        RangeBusyError: The range has an active run already.
        KeyboardInterrupt: Ctrl+C; finished shards are kept, and the range can be launched again.
    """
    from extraction_dagster.definitions import defs

    ExtractionComputeLogManager.captures = False
    fail_dead_runs(instance)
    add_ranges(instance, [id_range])
    for run in attended_runs(instance):
        if run.tags.get(PARTITION_TAG) == id_range.partition_key:
            silent = {other.run_id: seconds for other, seconds in silent_runs(instance)}
            raise RangeBusyError(id_range.partition_key, run.run_id, silent_seconds=silent.get(run.run_id))
    run_id = str(uuid.uuid4())
    result = defs.resolve_job_def("extraction_job").execute_in_process(
        instance=instance,
        partition_key=id_range.partition_key,
        run_id=run_id,
        tags={**process_tags(run_id), **({} if floor_id is None else {FLOOR_TAG: str(floor_id)})},
        asset_selection=[dg.AssetKey(name) for name in assets] or None,
        run_config=_QUIET,
        raise_on_error=False,
    )
    failures = [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
    # Dagster makes a failed step of Ctrl+C and SIGTERM.
    if any(failed is not None and failed.cls_name == "DagsterExecutionInterruptedError" for failed in failures):
        raise KeyboardInterrupt
    error = "" if result.success else first_failure(result.all_events)[1]
    return FinishedRun(run_id=result.run_id, success=result.success, error=error)
