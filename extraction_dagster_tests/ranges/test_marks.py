"""State in another database than the source: what a process leaves that dies between the two, and how it goes on."""

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.ranges.decode import decode_range
from extraction_dagster.ranges.embed import embed_range
from extraction_dagster.ranges.index import index_range
from extraction_dagster.ranges.work import open_range
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.catalog import Catalog
from extraction_dagster.stages.catalog.pending import scan

RANGE = IdRange(1, 100)


class KilledError(BaseException):
    """The process ends here; what was not committed is gone."""


class Kill:
    """Kills a process as soon as it has written to one of a catalog's two databases and begins with the other."""

    def __init__(self, monkeypatch):
        self._monkeypatch, self._is_armed, self.written = monkeypatch, False, []
        honest = Catalog.__init__

        def watched(catalog, settings, **options):
            honest(catalog, settings, **options)
            for name, engine in (("source", catalog.source_engine), ("state", catalog.state_engine)):
                sa.event.listen(engine, "before_cursor_execute", self._watcher(name))

        monkeypatch.setattr(Catalog, "__init__", watched)

    def _watcher(self, name):
        def before(_connection, _cursor, statement, *_):
            if not self._is_armed or not statement.startswith(("INSERT", "UPDATE")):
                return
            if self.written and self.written[-1] != name:
                self._is_armed = False
                raise KilledError
            self.written.append(name)

        return before

    def in_first(self, method):
        """Kill in the first call of a method of the catalog; later ones are honest."""
        honest = getattr(Catalog, method)

        def armed(*arguments, **options):
            self._is_armed = not self.written
            return honest(*arguments, **options)

        self._monkeypatch.setattr(Catalog, method, armed)


@pytest.fixture
def kill(monkeypatch):
    return Kill(monkeypatch)


@pytest.fixture
def state(tmp_path):
    return {"state_url": SecretStr(f"sqlite:///{tmp_path}/state.db")}


def marks(database):
    return database.rows("SELECT id, is_extracted, is_embedded FROM insta_content ORDER BY id")


def ledger(settings):
    with open_range(settings, RANGE) as work:
        return {record_id: entry.state for record_id, entry in work.entries().items()}


def due(settings):
    with open_range(settings, RANGE) as work:
        return scan(work.catalog, after_id=None, up_to_id=None, budget=100).pending_ids


def mark(settings, method, record_id):
    with open_range(settings, RANGE) as work:
        made_with = work.fingerprints.frames if method == "mark_extracted" else work.fingerprints
        getattr(work.catalog, method)(work.plan, {record_id: 3}, made_with)


def run(settings):
    """A whole run of the range. Returns how many frames it decoded."""
    with open_range(settings, RANGE, begins=True) as work:
        decoded = decode_range(work)
    for step in (embed_range, index_range):
        with open_range(settings, RANGE) as work:
            step(work)
    return decoded.numbers["frames"]


@pytest.mark.parametrize(
    ("columns", "method"),
    [
        ({}, "mark_extracted"),
        ({}, "mark_done"),
        ({"source_embedded_column": ""}, "mark_extracted"),
        ({"source_extracted_column": ""}, "mark_done"),
    ],
    ids=["extracted", "done", "extracted, the only mark", "done, the only mark"],
)
def test_a_row_is_marked_only_once_the_ledger_knows_it(sqlite_database, kill, state, columns, method):
    sqlite_database.create(ids=(1, 2))
    settings = sqlite_database.settings(**state, **columns)
    for record_id, calls in ((2, ("mark_extracted", "mark_done")), (1, ("mark_extracted",))):
        for call in calls if (record_id, method) != (1, "mark_extracted") else ():
            mark(settings, call, record_id)
    before = marks(sqlite_database)

    kill.in_first(method)
    with pytest.raises(KilledError, match=r"^$"):
        mark(settings, method, 1)

    assert ledger(settings) == {1: "extracted" if method == "mark_extracted" else "done", 2: "done"}
    assert marks(sqlite_database) == before
    assert due(settings) == [1]
    assert set(kill.written) == {"state"}


@pytest.mark.parametrize("method", ["mark_extracted", "mark_done"])
def test_a_range_is_done_once_more_when_its_process_died_between_the_two(
    sqlite_database, make_settings, kill, state, method
):
    settings = make_settings(**state)
    kill.in_first(method)
    with pytest.raises(KilledError, match=r"^$"):
        run(settings)
    assert marks(sqlite_database) == [(1, method == "mark_done", 0), (2, method == "mark_done", 0), (3, 0, 0)]
    assert {1, 2} <= set(due(settings)) <= {1, 2, 3}  # row 3 fails before or after the first shard lands

    decoded = []
    while due(settings) and len(decoded) < 3:
        decoded.append(run(settings))
    # Frames that are stored are used, although the source does not say so; a mark that is missing at the end is taken
    # for one that somebody cleared, and the row is decoded again.
    assert decoded == ([0, 6] if method == "mark_extracted" else [6])
    assert ledger(settings) == {1: "done", 2: "done", 3: "failed"}
    assert marks(sqlite_database) == [(1, 1, 1), (2, 1, 1), (3, 0, 0)]
