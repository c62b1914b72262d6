"""Writers that are really stopped (SIGSTOP), overtaken, and thawed, or killed; rows change and operators intervene.

Six processes work on six ranges. A range has one that is awake, and any number that are frozen, as when a run is given
up by whoever watches it and launched once more. What a late one does after it was thawed must not show in the end: each
row is done once for each claim, with the points of its newest version and no others.
"""

import collections
import contextlib
import importlib.util
import random
import selectors
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from extraction_dagster.ranges.work import fingerprints_of
from extraction_dagster.records import IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.catalog.database import make_engine
from extraction_dagster.stages.index.points import point_id
from extraction_dagster.stages.index.reconcile import reconcile
from extraction_dagster.stages.index.stage import open_point_store

ROWS, PER_RANGE = range(1, 61), 10
RANGES = [IdRange(first, first + PER_RANGE - 1) for first in ROWS[::PER_RANGE]]
SCRIPT = Path(__file__).with_name("late_writer.py")
# Each time the ledger says that a row is done, and under which claim, written by the database itself.
LOG = {
    "sqlite": [
        "CREATE TABLE marks (record_id INTEGER, claim INTEGER, version TEXT)",
        """CREATE TRIGGER done AFTER UPDATE ON extraction_ledger WHEN NEW.state = 'done' AND OLD.state <> 'done' BEGIN
        INSERT INTO marks VALUES (NEW.record_id, NEW.claim, NEW.source_version); END""",
    ],
    "postgresql": [
        "CREATE TABLE marks (record_id BIGINT, claim BIGINT, version TEXT)",
        """CREATE FUNCTION log_done() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO marks VALUES (NEW.record_id, NEW.claim, NEW.source_version); RETURN NULL; END $$""",
        """CREATE TRIGGER done AFTER UPDATE ON extraction_ledger FOR EACH ROW
        WHEN (NEW.state = 'done' AND OLD.state <> 'done') EXECUTE FUNCTION log_done()""",
    ],
}


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Scale:
    """How long it lasts, and how many runs end, writers are stopped and killed meanwhile at least."""

    seconds: float
    runs: int
    stops: int
    kills: int


class Writer:
    """A process that works on what it is told."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen([sys.executable, SCRIPT], **pipes)
        self.id_range, self.frozen_until = "none yet: it starts", None

    @property
    def is_idle(self):
        return self.id_range is None

    def begin(self, id_range, *, force):
        self.id_range = id_range
        self.process.stdin.write(f"{id_range}{' force' if force else ''}\n")
        self.process.stdin.flush()

    def stop(self, seconds):
        self.process.send_signal(signal.SIGSTOP)
        self.frozen_until = time.monotonic() + seconds

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)
        self.frozen_until = None

    def kill(self):
        self.process.kill()
        self.process.wait(timeout=60)
        self.process.stdin.close()
        self.process.stdout.close()


class Site:
    """A table, files, a server of points, and the writers."""

    def __init__(self, folder, seed):
        self.folder, self.chance = folder, random.Random(seed)
        self.engine = make_engine(load_settings().resolved_source_url, setting="EXTRACTION_SOURCE_URL")
        self.counts, self.versions = collections.Counter(), dict.fromkeys(ROWS, 0)
        self._create()
        self._waiting = selectors.DefaultSelector()
        self.writers, self._is_over = [], threading.Event()
        # A writer that is stopped within a transaction holds up everybody who writes to SQLite, this process too.
        self._thawing = threading.Thread(target=self._thaw, daemon=True)
        self._thawing.start()

    def _thaw(self):
        while not self._is_over.wait(0.05):
            for writer in list(self.writers):
                until = writer.frozen_until
                if until is not None and time.monotonic() > until:
                    writer.thaw()

    def _create(self):
        if self.engine.dialect.name == "sqlite":
            with contextlib.closing(self.engine.raw_connection()) as connection:
                connection.driver_connection.execute("PRAGMA journal_mode = WAL")
        self.execute("""CREATE TABLE insta_content (
            id BIGINT PRIMARY KEY, platform TEXT, code TEXT, path TEXT NOT NULL, version BIGINT NOT NULL,
            is_extracted BOOLEAN NOT NULL DEFAULT FALSE, is_embedded BOOLEAN NOT NULL DEFAULT FALSE)""")
        for record_id in ROWS:
            (self.folder / f"{record_id}.txt").write_text("0")
            row = {"id": record_id, "path": f"{record_id}.txt"}
            self.execute(
                "INSERT INTO insta_content (id, platform, code, path, version) VALUES (:id, 't', 'c', :path, 0)", row
            )
        with open_catalog(load_settings()):
            pass
        for statement in LOG[self.engine.dialect.name]:
            self.execute(statement)

    def execute(self, sql, parameters=None):
        with self.engine.connect().execution_options(writes=True) as connection, connection.begin():
            connection.execute(sa.text(sql), parameters or {})

    def rows(self, sql):
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(sql))]

    def start(self, number):
        for _ in range(number):
            writer = Writer()
            self._waiting.register(writer.process.stdout, selectors.EVENT_READ, writer)
            self.writers.append(writer)

    def close(self):
        self._is_over.set()
        self._thawing.join()
        for writer in self.writers:
            with contextlib.suppress(ProcessLookupError):
                writer.thaw()
            writer.kill()
        self._waiting.close()
        self.engine.dispose()

    def turn(self):
        """Hand out work, and let something happen."""
        self.hear(0.03)
        awake = {writer.id_range for writer in self.writers if writer.frozen_until is None}
        free = [id_range for id_range in RANGES if id_range not in awake]
        for writer in [writer for writer in self.writers if writer.is_idle]:
            if free:
                id_range = free.pop(self.chance.randrange(len(free)))
                writer.begin(id_range, force=self.chance.random() < 0.05)
                self.counts["runs"] += 1
        self.chance.choices(
            [self._change_a_file, self._stop_a_writer, self._kill_a_writer, self._reprocess, lambda: None],
            [6, 3, 0.15, 0.2, 90],
        )[0]()

    def hear(self, seconds):
        """What writers have said."""
        for key, _ in self._waiting.select(seconds):
            writer, said = key.data, key.fileobj.readline()
            assert said, "a writer died by itself"
            writer.id_range = None
            if said.strip() != "ready":
                self.counts[said.split(":")[0].strip()] += 1
                self.counts["ended"] += 1

    def _change_a_file(self):
        record_id = self.chance.choice(ROWS)
        self.versions[record_id] += 1
        beside = self.folder / "beside"
        beside.write_text(str(self.versions[record_id]))
        beside.replace(self.folder / f"{record_id}.txt")
        values = {"version": self.versions[record_id], "id": record_id}
        self.execute("UPDATE insta_content SET version = :version WHERE id = :id", values)
        self.counts["changed files"] += 1

    def _stop_a_writer(self):
        busy = [writer for writer in self.writers if not writer.is_idle and writer.frozen_until is None]
        if busy and sum(writer.frozen_until is None for writer in self.writers) > 2:
            self.chance.choice(busy).stop(self.chance.uniform(0.5, 5))
            self.counts["stopped"] += 1

    def _kill_a_writer(self):
        busy = [writer for writer in self.writers if not writer.is_idle]
        if busy:
            writer = self.chance.choice(busy)
            self.writers.remove(writer)
            self._waiting.unregister(writer.process.stdout)
            writer.kill()
            self.start(1)
            self.counts["killed"] += 1

    def _reprocess(self):
        with open_catalog(load_settings()) as catalog:
            catalog.reprocess_after(self.chance.choice(ROWS))
        self.counts["reprocessed"] += 1

    def come_to_rest(self):
        """Let everybody end."""
        end = time.monotonic() + 120
        while any(not writer.is_idle for writer in self.writers):
            assert time.monotonic() < end, "a writer hangs"
            self.hear(0.5)

    def finish(self):
        """Runs until every row is done, as ticks would ask for them."""
        for _ in range(20):
            with open_catalog(load_settings()) as catalog:
                pending = [id_range for id_range in RANGES if catalog.num_pending(id_range)]
            if not pending:
                return
            for id_range in pending:
                self.writers[0].begin(id_range, force=False)
                while not self.writers[0].is_idle:
                    self.hear(1)
        pytest.fail(f"rows stay pending: {pending}")

    def reconcile(self, *, repair):
        settings = load_settings()
        with open_catalog(settings) as catalog:
            return reconcile(
                catalog,
                lambda: open_point_store(settings),
                collection_name=settings.collection_name,
                embedding=fingerprints_of(settings).embedding,
                repair=repair,
            )

    def wrong_records(self, writing):
        """Records whose points are not those of the newest version."""
        settings, held = load_settings(), collections.defaultdict(dict)
        with open_point_store(settings) as store:
            store.open_collection(settings.collection_name)
            for page in store.read():
                for key, vector, payload in zip(page.ids, page.vectors, page.payloads, strict=True):
                    held[payload["record_id"]][key] = vector
        wrong = set(held) - set(ROWS)
        for record_id, version in self.versions.items():
            numbers = range(writing.num_frames(version))
            wanted = {point_id(record_id, number): writing.vector_of(record_id, version, number) for number in numbers}
            found = held.get(record_id, {})
            if found.keys() != wanted.keys() or any(np.abs(found[key] - wanted[key]).max() > 0.01 for key in wanted):
                wrong.add(record_id)
        return wrong


@pytest.fixture(params=["sqlite", "postgresql"])
def environment(request, tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/source.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    wire = _load(Path(__file__).parents[1] / "stages/index/wire_stand_in.py")
    (tmp_path / "videos").mkdir()
    with wire.StandIn() as server:
        for name, value in {
            "HOME": str(tmp_path / "home"),
            "SOURCE_URL": url,
            "SOURCE_VERSION_COLUMN": "version",
            "ALLOWED_ROOTS": str(tmp_path / "videos"),
            "SHARD_RECORDS": "3",
            "QDRANT_URL": server.url,
            "QDRANT_GRPC_PORT": str(server.port),
        }.items():
            monkeypatch.setenv(f"EXTRACTION_{name}", value)
        yield tmp_path / "videos"


@pytest.mark.soak
def test_late_writers_leave_no_trace(environment, capsys):
    _run(environment, Scale(seconds=240, runs=200, stops=80, kills=8), capsys)


def _run(folder, scale, capsys):
    seed = random.randrange(10**6)
    writing = _load(SCRIPT)
    site = Site(folder, seed)
    try:
        site.start(6)
        site.come_to_rest()
        least = {"ended": scale.runs, "stopped": scale.stops, "killed": scale.kills}
        end = time.monotonic() + scale.seconds
        while time.monotonic() < end or any(site.counts[name] < number for name, number in least.items()):
            assert time.monotonic() < end + 4 * scale.seconds + 120, f"too slow: {dict(site.counts)}"
            site.turn()
        site.come_to_rest()
        site.finish()
        before_repair = site.wrong_records(writing)
        site.reconcile(repair=True)
        site.finish()
        wrong, found = site.wrong_records(writing), site.reconcile(repair=False)
        marks = collections.Counter(site.rows("SELECT record_id, claim FROM marks"))
        ledger = site.rows("SELECT record_id, state, source_version FROM extraction_ledger ORDER BY 1")
        unmarked = site.rows("SELECT id FROM insta_content WHERE NOT (is_extracted AND is_embedded)")
        figures = {
            "seed": seed,
            **site.counts,
            "marked": sum(marks.values()),
            "twice": sum(number > 1 for number in marks.values()),
            "wrong until reconciled": len(before_repair),
            "lost or stale": len(wrong),
        }
        with capsys.disabled():
            said = ", ".join(f"{name} {value}" for name, value in figures.items())
            print(f"\nlate writers, {site.engine.dialect.name}: {said}")
    finally:
        site.close()
    assert wrong == set()
    assert found.remaining == 0, found.summary
    assert [number for number in marks.values() if number > 1] == []
    assert ledger == [(record_id, "done", str(version)) for record_id, version in site.versions.items()]
    assert unmarked == []
