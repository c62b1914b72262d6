"""A place where a real daemon works on a real table, on SQLite and on PostgreSQL; decoding and the model are stubs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg  # noqa: TID251 - asks the instance about its runs
import psutil
import pytest
import sqlalchemy as sa

from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.launching import open_instance
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.catalog.database import make_engine
from extraction_dagster.stages.catalog.pending import pending_index
from extraction_dagster.ticks.cursor import CursorState

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WORKSPACE = """\
load_from:
  - python_file:
      relative_path: {file}
      location_name: extraction_dagster
"""
QUICK = {
    "EXTRACTION_SENSOR_INTERVAL_SECONDS": "1",
    "EXTRACTION_MAX_WAIT_SECONDS": "2",
    "EXTRACTION_BATCH_SIZE": "1000",
    "EXTRACTION_RETRY_DELAY_SECONDS": "1",
    "EXTRACTION_RUN_RETRY_DELAY_SECONDS": "3",
    "EXTRACTION_SWEEP_EVERY_TICKS": "3",
}
# What became of every row, and when, written by the database itself: nothing that a run does escapes it.
SQLITE_LOG = (
    "CREATE TABLE marks (record_id INTEGER, what TEXT, at REAL)",
    """CREATE TRIGGER source_marks AFTER UPDATE OF is_embedded ON insta_content WHEN NEW.is_embedded BEGIN
       INSERT INTO marks VALUES (NEW.id, 'embedded', (julianday('now') - 2440587.5) * 86400.0); END""",
    """CREATE TRIGGER ledger_marks AFTER UPDATE ON extraction_ledger
       WHEN NEW.state IN ('done', 'parked') AND OLD.state <> NEW.state BEGIN
       INSERT INTO marks VALUES (NEW.record_id, NEW.state, (julianday('now') - 2440587.5) * 86400.0); END""",
    """CREATE TRIGGER ledger_first_marks AFTER INSERT ON extraction_ledger WHEN NEW.state IN ('done', 'parked') BEGIN
       INSERT INTO marks VALUES (NEW.record_id, NEW.state, (julianday('now') - 2440587.5) * 86400.0); END""",
)
POSTGRESQL_LOG = (
    "CREATE TABLE marks (record_id BIGINT, what TEXT, at DOUBLE PRECISION)",
    """CREATE FUNCTION log_embedded() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
       INSERT INTO marks VALUES (NEW.id, 'embedded', extract(epoch FROM clock_timestamp())); RETURN NULL; END $$""",
    """CREATE FUNCTION log_state() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
       INSERT INTO marks VALUES (NEW.record_id, NEW.state, extract(epoch FROM clock_timestamp()));
       RETURN NULL; END $$""",
    """CREATE TRIGGER source_marks AFTER UPDATE OF is_embedded ON insta_content FOR EACH ROW WHEN (NEW.is_embedded)
       EXECUTE FUNCTION log_embedded()""",
    """CREATE TRIGGER ledger_marks AFTER UPDATE ON extraction_ledger FOR EACH ROW
       WHEN (NEW.state IN ('done', 'parked') AND OLD.state <> NEW.state) EXECUTE FUNCTION log_state()""",
    """CREATE TRIGGER ledger_first_marks AFTER INSERT ON extraction_ledger FOR EACH ROW
       WHEN (NEW.state IN ('done', 'parked')) EXECUTE FUNCTION log_state()""",
)


class Site:
    """A table, a data folder and daemons; every process that is started here is ended here."""

    def __init__(self, folder, url):
        self.folder = folder
        self.daemons, self._sessions = [], set()
        self.engine = make_engine(url, setting="EXTRACTION_SOURCE_URL")
        self.create_table()
        with open_catalog(load_settings()) as catalog, catalog.source_engine.begin() as connection:
            pending_index(catalog.source).create(connection)
        with open_instance(load_settings()):
            pass  # created once, before many processes open it
        for statement in POSTGRESQL_LOG if self.is_postgresql else SQLITE_LOG:
            self.execute(statement)

    @property
    def is_postgresql(self):
        return self.engine.dialect.name == "postgresql"

    def create_table(self):
        if not self.is_postgresql:
            with contextlib.closing(self.engine.raw_connection()) as connection:
                connection.driver_connection.execute("PRAGMA journal_mode = WAL")
        self.execute("""CREATE TABLE insta_content (
            id BIGINT PRIMARY KEY, platform TEXT, code TEXT, path TEXT NOT NULL,
            is_extracted BOOLEAN NOT NULL DEFAULT FALSE, is_embedded BOOLEAN NOT NULL DEFAULT FALSE)""")

    def execute(self, sql, parameters=None):
        with self.engine.connect().execution_options(writes=True) as connection, connection.begin():
            return connection.execute(sa.text(sql), parameters or {})

    def rows(self, sql):
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(sql))]

    def insert(self, connection, ids):
        rows = [{"id": record_id} for record_id in ids]
        statement = "INSERT INTO insta_content (id, platform, code, path) VALUES (:id, 'tube', 'c', 'v.mp4')"
        connection.execute(sa.text(statement), rows)

    def add_rows(self, *ids):
        with self.engine.connect().execution_options(writes=True) as connection, connection.begin():
            self.insert(connection, ids)

    def poison(self, *ids):
        (self.folder / "poison").write_text("\n".join(map(str, ids)))

    def start_daemon(self):
        with (self.folder / f"daemon-{len(self._sessions)}.log").open("w") as log:
            daemon = subprocess.Popen(
                [BIN / "dagster-daemon", "run", "-w", self.folder / "workspace.yaml"],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.daemons.append(daemon)
        self._sessions.add(daemon.pid)
        return daemon

    def processes(self):
        """Every living process that a daemon of this site started, directly or not."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(process.pid) in self._sessions and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def run_workers(self):
        """The processes that work on a run."""
        workers = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("spawn_main" in part for part in process.cmdline()):
                    workers.append(process)
        return workers

    def kill_daemon(self, daemon):
        """SIGKILL the daemon alone: its code server and its run workers live on for a while."""
        daemon.kill()
        daemon.wait(timeout=60)
        self.daemons.remove(daemon)

    def kill_everything(self):
        """SIGKILL the daemons, their code servers and their run workers, as a machine that goes down does."""
        end = time.monotonic() + 60
        while (alive := self.processes()) and time.monotonic() < end:
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=5)
        assert not alive, f"processes that SIGKILL does not end: {alive}"
        for daemon in self.daemons:
            daemon.wait(timeout=60)
        self.daemons.clear()

    def stop(self):
        for daemon in self.daemons:
            daemon.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for daemon in self.daemons:
                daemon.wait(timeout=10)
        self.kill_everything()

    @contextlib.contextmanager
    def cursors(self):
        """A function that reads the sensor's cursor as Dagster keeps it; None before the first tick."""
        with open_catalog(load_settings()) as catalog:
            identity = catalog.source.identity
        with open_instance(load_settings()) as instance:
            store = CursorStore(instance)

            def read():
                stored = store.read()
                return CursorState.from_json(stored, source=identity) if stored else None

            yield read

    def cursor(self):
        with self.cursors() as read:
            return read()

    def num_runs(self, *statuses):
        """Runs in any of these states; in any state at all when none is given."""
        wanted = dg.RunsFilter(statuses=[dg.DagsterRunStatus[status] for status in statuses])
        with open_instance(load_settings()) as instance:
            return instance.get_runs_count(wanted)

    def num_ticks(self, sensor, status=None):
        """Ticks of a sensor, of one status or of any."""
        with open_instance(load_settings()) as instance:
            states = [state for state in instance.all_instigator_state() if state.instigator_name == sensor]
            ticks = [
                tick for state in states for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id)
            ]
        return sum(status is None or tick.status.value == status for tick in ticks)

    def num_active_runs(self):
        return self.num_runs("NOT_STARTED", "QUEUED", "STARTING", "STARTED", "CANCELING")

    def partitions(self):
        with open_instance(load_settings()) as instance:
            return set(instance.get_dynamic_partitions("id_ranges"))

    def states(self):
        return dict(self.rows("SELECT state, count(*) FROM extraction_ledger GROUP BY state"))

    def wait(self, condition, *, seconds, what, progress=None):
        """Wait until something holds; fails with the daemons' last words when it does not.

        Given a function that says how far things are, the wait is over only when that has stood still for so long: how
        many rows a busy machine gets through in a minute says nothing.
        """
        reached, end = progress and progress(), time.monotonic() + seconds
        while not condition():
            if progress and (now_at := progress()) != reached:
                reached, end = now_at, time.monotonic() + seconds
            if time.monotonic() > end:
                logs = sorted(self.folder.glob("daemon-*.log"), key=lambda path: path.stat().st_mtime)
                words = "\n".join(logs[-1].read_text().splitlines()[-40:]) if logs else ""
                pytest.fail(f"waited {seconds} s in vain until {what}; {self.states()}, {self.cursor()}\n{words}")
            time.sleep(0.3)

    def extraction(self, *arguments):
        """Run an `extraction` command as a person would."""
        return self._run("extraction", *arguments)

    def dagster(self, *arguments):
        """Run a `dagster` command on this site's workspace."""
        return self._run("dagster", *arguments, "-w", self.folder / "workspace.yaml")

    def command(self, name):
        """How a command of this environment is started."""
        return [BIN / name]

    def _run(self, command, *arguments):
        done = subprocess.run(
            [*self.command(command), *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def points_by_record(self):
        """Points in the engine, read with the engine's own package."""
        import qdrant_edge as edge

        (config,) = (self.folder / ".extraction" / "qdrant").rglob("edge_config.json")
        shard = edge.EdgeShard.load(str(config.parent))
        try:
            records, _ = shard.scroll(edge.ScrollRequest(limit=1_000_000, with_payload=["record_id"]))
        finally:
            shard.close()
        counts = {}
        for record in records:
            counts[record.payload["record_id"]] = counts.get(record.payload["record_id"], 0) + 1
        return counts


@pytest.fixture(params=["sqlite", "postgresql"])
def site(request, tmp_path, monkeypatch):
    dagster_yaml = (REPOSITORY / "dagster.yaml").read_text()
    quick = "run_monitoring:\n  start_timeout_seconds: 45\n  poll_interval_seconds: 5\n"
    (tmp_path / "dagster.yaml").write_text(dagster_yaml.replace("run_monitoring:\n", quick))
    (tmp_path / "workspace.yaml").write_text(WORKSPACE.format(file=Path(__file__).with_name("stub_definitions.py")))
    environment = {
        **QUICK,
        "DAGSTER_HOME": str(tmp_path),
        "EXTRACTION_HOME": str(tmp_path / ".extraction"),
        "EXTRACTION_TEST_STUBS": str(tmp_path),
        "NO_COLOR": "1",
    }
    (tmp_path / ".extraction").mkdir()
    url = f"sqlite:///{tmp_path}/source.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
        environment["EXTRACTION_POSTGRES_URL"] = url
    environment["EXTRACTION_SOURCE_URL"] = url
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a session that is ended leaves no daemon
    site = Site(tmp_path, url)
    yield site
    site.stop()
    site.engine.dispose()
    signal.signal(signal.SIGTERM, before)
