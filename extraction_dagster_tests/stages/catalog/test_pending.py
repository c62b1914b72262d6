"""Which rows are unfinished, in a window of ids; on both databases, and always through an index."""

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.records import Failure, IdRange
from extraction_dagster.stages.catalog import catalog as catalog_module
from extraction_dagster.stages.catalog import pending as pending_module
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.pending import Scan, Unfinished, pending_index, scan
from extraction_dagster.stages.catalog.state_tables import LEDGER_TABLE

TODAY = Fingerprints(frames="f1", embedding="e1")
ALL = IdRange(1, 100_000)


@pytest.fixture
def opened(database):
    """Catalogs of the database that are closed at the end: `opened(batch_size=2)`."""
    catalogs = []

    def make(**overrides):
        catalogs.append(database.catalog(**overrides))
        return catalogs[-1]

    yield make
    for catalog in catalogs:
        catalog.close()


def look(catalog, after_id=None, up_to_id=None, *, budget=100, every_row=False):
    return scan(catalog, after_id=after_id, up_to_id=up_to_id, budget=budget, every_row=every_row)


def finish(catalog, *ids):
    plan = catalog.plan(ALL, TODAY)
    catalog.mark_extracted(plan, dict.fromkeys(ids, 3), "f1")
    catalog.mark_done(plan, dict.fromkeys(ids, 3), TODAY)


def fail(catalog, record_id, *, permanent=False):
    failure = Failure(record_id, "", "decode", "VideoDecodeError", "broken", permanent=permanent)
    catalog.record_failures(catalog.plan(ALL, TODAY), [failure], run_id="r")


def pending(*ids):
    return tuple(Unfinished(record_id, pending=True) for record_id in ids)


def test_an_empty_table_has_nothing_unfinished_and_nothing_finished(database, opened):
    database.create()
    assert look(opened()) == Scan((), None, None)


def test_a_window_holds_the_rows_after_its_beginning_up_to_its_end(database, opened):
    database.create(ids=(-7, 1, 2, 5, 9))
    catalog = opened()
    assert look(catalog) == Scan(pending(-7, 1, 2, 5, 9), None, None)
    assert look(catalog, 1, 5) == Scan(pending(2, 5), None, None)
    assert look(catalog, None, 0) == Scan(pending(-7), None, None)
    assert look(catalog, 9, None) == Scan((), None, None)


@pytest.mark.parametrize(("after_id", "up_to_id"), [(5, 5), (6, 5), (2**63 - 1, None)])
def test_a_window_without_ids_holds_nothing(database, opened, after_id, up_to_id):
    database.create(ids=(5, 2**63 - 1))
    assert look(opened(), after_id, up_to_id) == Scan((), None, None)


def test_a_budget_ends_the_scan_and_says_where(database, opened):
    database.create(ids=range(1, 8))
    catalog = opened()
    finish(catalog, 1, 2, 4)
    assert look(catalog, budget=2) == Scan(pending(3, 5), 5, 2)
    assert look(catalog, 5, budget=2) == Scan(pending(6, 7), 7, None)
    assert look(catalog, 7, budget=2) == Scan((), None, None)


def test_everything_below_the_first_unfinished_row_is_finished(database, opened):
    database.create(ids=(1, 2, 4, 8, 9))
    catalog = opened()
    finish(catalog, 1, 2, 8)
    assert look(catalog) == Scan(pending(4, 9), None, 2)
    assert look(catalog, 2, 8) == Scan(pending(4), None, None)
    assert look(catalog, 4, 8) == Scan((), None, 8)
    assert look(catalog, 4) == Scan(pending(9), None, 8)
    finish(catalog, 4, 9)
    assert look(catalog) == Scan((), None, 9)
    assert look(catalog, None, 7) == Scan((), None, 4)


def test_rows_that_are_not_eligible_are_neither_finished_nor_unfinished(database, opened):
    database.create()
    database.insert(1, 2, 3, is_downloaded=True)
    database.insert(4, 5, is_downloaded=False)
    catalog = opened(source_predicate="is_downloaded")
    finish(catalog, 1, 2)
    assert look(catalog) == Scan(pending(3), None, 2)
    finish(catalog, 3)
    assert look(catalog) == Scan((), None, 3)


def test_a_parked_row_is_finished(database, opened):
    database.create(ids=(1, 2, 3))
    catalog = opened()
    fail(catalog, 1, permanent=True)
    assert look(catalog) == Scan(pending(2, 3), None, 1)


def test_parked_rows_that_fill_a_budget_do_not_end_the_look(database, opened):
    database.create(ids=range(1, 6))
    catalog = opened()
    for record_id in (1, 2, 3):
        fail(catalog, record_id, permanent=True)
    assert look(catalog, budget=2) == Scan((), 2, 2)
    assert look(catalog, 2, budget=2) == Scan(pending(4), 4, 3)


def test_a_failed_row_waits_and_holds_what_is_finished_back(database, opened):
    database.create(ids=(1, 2, 3))
    catalog = opened(retry_delay_seconds=3600)
    finish(catalog, 1, 3)
    fail(catalog, 2)
    assert look(catalog) == Scan((Unfinished(2, pending=False),), None, 1)
    with catalog.state_engine.begin() as connection:
        connection.execute(sa.update(LEDGER_TABLE).values(not_before=datetime.now(UTC) - timedelta(seconds=1)))
    assert look(catalog) == Scan(pending(2), None, 1)


def test_a_row_that_is_extracted_or_embedded_is_not_done(database, opened):
    database.create(ids=(1, 2, 3))
    catalog = opened()
    plan = catalog.plan(ALL, TODAY)
    catalog.mark_extracted(plan, {1: 3, 2: 3}, "f1")
    catalog.mark_embedded([2], "e1")
    assert look(catalog) == Scan(pending(1, 2, 3), None, None)


@pytest.mark.parametrize("column", ["is_extracted", "is_embedded"])
def test_a_row_whose_mark_was_cleared_is_pending(database, opened, column):
    database.create(ids=(1, 2, 3))
    catalog = opened()
    finish(catalog, 1, 2, 3)
    database.execute(f"UPDATE insta_content SET {column} = false WHERE id = 2")
    assert look(catalog) == Scan(pending(2), None, 1)


def test_a_row_that_was_marked_before_this_project_came_is_finished(database, opened):
    database.create()
    database.insert(1, 2, is_extracted=True, is_embedded=True)
    database.insert(3)
    assert look(opened()) == Scan(pending(3), None, 2)


def test_a_marked_row_whose_embedding_was_interrupted_is_pending(database, opened):
    database.create(ids=range(1, 6))
    catalog = opened()
    finish(catalog, 1, 2, 3, 4)
    catalog.mark_embedded([2, 4], "e2")
    assert look(catalog) == Scan(pending(2, 4, 5), None, 1)
    assert look(catalog, budget=2) == Scan(pending(2, 4), 4, 1)


def test_a_changed_version_is_seen_by_a_look_at_every_row_alone(database, opened):
    database.create()
    database.insert(1, 2, 3, updated_at="2025-01-01 00:00:00")
    catalog = opened(source_version_column="updated_at")
    finish(catalog, 1, 2, 3)
    database.execute("UPDATE insta_content SET updated_at = '2025-02-02 00:00:00' WHERE id = 2")
    assert look(catalog) == Scan((), None, 3)
    assert look(catalog, every_row=True) == Scan(pending(2), None, 1)
    assert look(catalog, every_row=True, budget=1) == Scan((), 1, 1)


def test_without_marks_the_ledger_alone_says_what_is_finished(database, opened):
    database.create(ids=(1, 2, 3))
    catalog = opened(source_extracted_column="", source_embedded_column="")
    finish(catalog, 1, 3)
    assert look(catalog) == Scan(pending(2), None, 1)
    assert look(catalog, budget=2) == Scan(pending(2), 2, 1)


def test_a_read_only_source_is_compared_with_the_ledger_elsewhere(database, opened, tmp_path):
    database.create(ids=range(1, 6))
    state_url = SecretStr(f"sqlite:///{tmp_path}/state.db")
    catalog = opened(source_read_only=True, state_url=state_url)
    finish(catalog, 1, 2, 4)
    fail(catalog, 3, permanent=True)
    assert not catalog.one_database
    assert look(catalog) == Scan(pending(5), None, 4)
    assert database.rows("SELECT count(*) FROM insta_content WHERE is_extracted OR is_embedded") == [(0,)]


def test_marks_and_a_ledger_in_two_databases_are_both_looked_at(database, opened, tmp_path):
    database.create(ids=range(1, 6))
    catalog = opened(state_url=SecretStr(f"sqlite:///{tmp_path}/state.db"))
    finish(catalog, 1, 2, 3, 4)
    catalog.mark_embedded([3], "e2")
    database.execute("UPDATE insta_content SET is_embedded = false WHERE id = 2")
    assert look(catalog) == Scan(pending(2, 3, 5), None, 1)


def test_a_row_that_commits_within_a_scan_is_not_taken_for_finished(postgres_url, make_database, settings):
    database = make_database(postgres_url, settings)  # on SQLite its writer would have to wait
    database.create(ids=(1, 2, 5))
    catalog = database.catalog()
    finish(catalog, 1, 2, 5)

    def commit_a_row(_connection, _cursor, statement, *_):
        if statement.startswith("SELECT max(") and not committed:
            committed.append(9)
            database.insert(9)

    committed = []
    sa.event.listen(catalog.source_engine, "before_cursor_execute", commit_a_row)
    assert (look(catalog), committed) == (Scan((), None, 5), [9])
    assert look(catalog) == Scan(pending(9), None, 5)
    catalog.close()


def test_a_crash_between_the_marks_of_two_databases_leaves_the_row_pending(database, opened, tmp_path, monkeypatch):
    database.create(ids=(1, 2))
    catalog = opened(state_url=SecretStr(f"sqlite:///{tmp_path}/state.db"), source_embedded_column=None)
    plan, writing, written = catalog.plan(ALL, TODAY), catalog_module.writing, []

    @contextmanager
    def crash_before_the_marks(engine, *, what):
        written.append(what)
        if len(written) == 3:
            raise KeyboardInterrupt
        with writing(engine, what=what) as connection:
            yield connection

    monkeypatch.setattr(catalog_module, "writing", crash_before_the_marks)
    with pytest.raises(KeyboardInterrupt):
        catalog.mark_extracted(plan, {1: 3}, "f1")
    assert written == ["write the ledger", "write the ledger", "mark rows of 'insta_content'"]
    assert look(catalog) == Scan(pending(1, 2), None, None)


def test_entries_of_rows_that_are_gone_hide_nothing(database, opened):
    database.create(ids=range(1, 21))
    catalog = opened()
    finish(catalog, *range(1, 20))
    catalog.mark_embedded(range(1, 20), "e2")
    database.execute("DELETE FROM insta_content WHERE id < 18")
    assert look(catalog) == Scan(pending(18, 19, 20), None, None)
    places = [None]
    while not (found := look(catalog, places[-1], budget=4)).unfinished:
        places.append(found.reached_id)
    assert (places, found) == ([None, 4, 8, 12, 16], Scan(pending(18, 19, 20), None, None))
    assert look(catalog, 16, budget=2) == Scan(pending(18), 18, None)


def queries(catalog, do):
    """The statements of a call."""
    kept = []

    def keep(_connection, _cursor, statement, *_):
        kept.append(statement)

    engines = {catalog.source_engine, catalog.state_engine}
    for engine in engines:
        sa.event.listen(engine, "before_cursor_execute", keep)
    do()
    for engine in engines:
        sa.event.remove(engine, "before_cursor_execute", keep)
    return [statement for statement in kept if statement.startswith("SELECT")]


def fill_with_entries_of_rows_that_are_not_eligible(database, catalog, number):
    with catalog.state_engine.begin() as connection:
        entry = {"state": "failed", "updated_at": datetime.now(UTC)}
        connection.execute(sa.insert(LEDGER_TABLE), [{**entry, "record_id": key} for key in range(1, number + 1)])
    database.insert(*range(1, number + 1, 7), is_downloaded=False)


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_entries_of_rows_that_are_not_eligible_any_more_are_looked_at_in_parts(
    database, opened, tmp_path, is_elsewhere
):
    database.create()
    elsewhere = {"state_url": SecretStr(f"sqlite:///{tmp_path}/state.db")} if is_elsewhere else {}
    catalog = opened(source_predicate="is_downloaded", **elsewhere)
    fill_with_entries_of_rows_that_are_not_eligible(database, catalog, 50)
    database.insert(51, 52, is_downloaded=True)
    assert look(catalog, budget=20) == Scan((), 20, 20)  # the watermark may pass what is not eligible
    assert look(catalog, 20, budget=20) == Scan((), 40, 40)
    finish(catalog, 52)
    catalog.mark_embedded([52], "e2")
    assert look(catalog, 40, budget=20) == Scan(pending(51, 52), None, None)
    assert len(queries(catalog, lambda: look(catalog, budget=20))) <= 3


def test_entries_of_rows_that_are_not_eligible_any_more_cost_no_query_for_each(database, opened):
    database.create()
    catalog = opened(source_predicate="is_downloaded")
    fill_with_entries_of_rows_that_are_not_eligible(database, catalog, 1900)
    database.insert(1901, is_downloaded=True)
    assert look(catalog, budget=2000) == Scan(pending(1901), None, None)
    assert len(queries(catalog, lambda: look(catalog, budget=2000))) == 5


def test_a_version_that_can_not_be_read_makes_its_row_alone_pending(database, opened, monkeypatch):
    database.create()
    database.insert(*range(1, 10), updated_at="2025-01-01 00:00:00")
    catalog, storable = opened(source_version_column="updated_at"), pending_module.storable

    def fail_at_some(text):
        if text.startswith("2030"):
            raise ValueError(text)
        return storable(text)

    finish(catalog, *range(1, 10))
    database.execute("UPDATE insta_content SET updated_at = '2030-01-01 00:00:00' WHERE id IN (3, 8)")
    monkeypatch.setattr(pending_module, "storable", fail_at_some)
    assert look(catalog, every_row=True) == Scan(pending(3, 8), None, 2)
    assert look(catalog, every_row=True, budget=3) == Scan(pending(3), 3, 2)
    with catalog.state_engine.begin() as connection:  # its range has recorded the failure
        entry = sa.update(LEDGER_TABLE).where(LEDGER_TABLE.c.record_id == 3)
        connection.execute(entry.values(state="parked", source_version=""))
    assert look(catalog, every_row=True) == Scan(pending(8), None, 7)


@pytest.mark.parametrize("text", [b"caf\xe9", b"\xff\xfe"])
def test_a_version_of_bytes_that_are_no_text_stops_no_look(sqlite_database, text):
    sqlite_database.create()
    sqlite_database.insert(1, 2, 3)
    with sqlite_database.engine.begin() as connection:
        connection.execute(sa.text("UPDATE insta_content SET code = CAST(:text AS TEXT) WHERE id = 2"), {"text": text})
    catalog = sqlite_database.catalog(source_version_column="code")
    assert look(catalog, every_row=True) == Scan(pending(1, 2, 3), None, None)
    catalog.close()


def test_what_is_brought_back_is_due_at_once(database, opened):
    database.create(ids=(1, 2, 3, 4))
    catalog = opened(retry_delay_seconds=3600)
    finish(catalog, 1, 4)
    fail(catalog, 2)
    fail(catalog, 3, permanent=True)
    assert catalog.ledger.retry(record_ids=[3, 4, 5], error_type=None) == [3]
    assert look(catalog).pending_ids == [3]
    assert catalog.ledger.retry(record_ids=None, error_type="OtherError") == []
    assert catalog.ledger.retry(record_ids=None, error_type="VideoDecodeError") == [2]
    assert look(catalog).pending_ids == [2, 3]
    assert catalog.ledger.entries(IdRange(2, 3))[3].attempts == 0


def test_what_is_to_be_reprocessed_is_due_and_decoded_afresh(database, opened):
    database.create(ids=(1, 2, 3))
    catalog = opened()
    finish(catalog, 1, 2, 3)
    catalog.reprocess_after(1)
    assert look(catalog) == Scan(pending(2, 3), None, 1)
    versions = {key: planned.video.content_version for key, planned in catalog.begin(ALL, TODAY).items()}
    assert versions == {1: "", 2: "~1", 3: "~1"}
    finish(catalog, 2, 3)
    assert look(catalog) == Scan((), None, 3)


# Every query of a scan goes through an index, however large the tables are.


@pytest.fixture
def large(database, opened):
    """20,000 rows, a few of them unfinished in every way, and the index that an operator is offered."""
    database.create()
    catalog = opened()
    series = (
        "SELECT i FROM generate_series(1, 20000) AS series(i)"
        if catalog.source_engine.dialect.name == "postgresql"
        else "WITH RECURSIVE series(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM series WHERE i < 20000) "
        "SELECT i FROM series"
    )
    database.execute(
        f"INSERT INTO insta_content (id, path, is_extracted, is_embedded) SELECT i, 'x', true, true FROM ({series}) s"
    )
    database.execute("UPDATE insta_content SET is_embedded = false WHERE id % 2000 = 0")
    database.execute(
        "INSERT INTO extraction_ledger (record_id, state, updated_at) "
        "SELECT id, CASE WHEN id % 2000 = 0 THEN 'failed' WHEN id % 300 = 0 THEN 'parked' "
        "WHEN id % 5000 = 1 THEN 'embedded' ELSE 'done' END, '2025-01-01' FROM insta_content"
    )
    with database.engine.begin() as connection:
        pending_index(catalog.source).create(connection)
    return catalog


def plans_of(catalog, engine, do, *arguments, **options):
    """What EXPLAIN says to each query of a call, in order."""
    queries = []

    def keep(_connection, _cursor, statement, parameters, _context, _many):
        queries.append((statement, parameters))

    sa.event.listen(catalog.source_engine, "before_cursor_execute", keep)
    do(*arguments, **options)
    sa.event.remove(catalog.source_engine, "before_cursor_execute", keep)
    explain = "EXPLAIN " if engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
    with engine.connect() as connection:
        return [
            "\n".join(str(row[-1]) for row in connection.exec_driver_sql(explain + statement, parameters))
            for statement, parameters in queries
            if statement.startswith("SELECT")
        ]


LEDGER_KEY = {"sqlite": "sqlite_autoindex_extraction_ledger_1", "postgresql": "extraction_ledger_pkey"}
SOURCE_KEY = {"sqlite": "INTEGER PRIMARY KEY", "postgresql": "insta_content_pkey"}
WINDOWS = [{"budget": 5000}, {"after_id": 100, "up_to_id": 19_000, "budget": 20_000}]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("is_analyzed", [False, True])
def test_unfinished_rows_are_found_through_the_partial_indexes(database, large, window, is_analyzed):
    dialect = database.engine.dialect.name
    if is_analyzed:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")
    wanted = ["extraction_pending_insta_content", "extraction_ledger_unfinished", SOURCE_KEY[dialect]]
    plans = plans_of(large, database.engine, look, large, **window)
    found = [next((name for name in (*wanted, LEDGER_KEY[dialect]) if name in plan), plan) for plan in plans]
    # Unmarked rows; entries that are not done, and which of them have a row; the heads of those; all their entries;
    # the greatest finished id.
    assert found == [wanted[0], wanted[1], wanted[1], wanted[2], LEDGER_KEY[dialect], wanted[2]]
    assert SOURCE_KEY[dialect] in plans[2]
    plans[1] = plans[1].replace("SCAN anon_1", "")  # the page that was just read, which is counted
    assert not any("Seq Scan" in plan or "SCAN " in plan for plan in plans)


def test_a_look_at_every_row_goes_along_the_keys(database, large):
    dialect = database.engine.dialect.name
    plans = plans_of(large, database.engine, look, large, up_to_id=19_000, budget=500, every_row=True)
    found = [
        next((name for name in (LEDGER_KEY[dialect], SOURCE_KEY[dialect]) if name in plan), plan) for plan in plans
    ]
    # The end of the part; its rows beside their entries; the entries of those that are not done; the greatest finished.
    assert found == [SOURCE_KEY[dialect], LEDGER_KEY[dialect], LEDGER_KEY[dialect], SOURCE_KEY[dialect]]
    assert SOURCE_KEY[dialect] in plans[1]
    plans[0] = plans[0].replace("SCAN anon_1", "")  # the part, which is counted
    assert not any("Seq Scan" in plan or "SCAN " in plan for plan in plans)


def test_records_that_failed_are_found_through_their_index(database, large):
    (plan,) = plans_of(large, database.engine, large.ledger.retry, record_ids=None, error_type="SomeError")
    assert "extraction_ledger_stopped" in plan
    assert "Seq Scan" not in plan


def test_the_figures_of_progress_are_counted_through_indexes(database, large):
    dialect, engine = database.engine.dialect.name, database.engine
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    (stopped,) = plans_of(large, engine, large.ledger.count_failed_and_parked)
    assert "extraction_ledger_stopped" in stopped
    (changed,) = plans_of(large, engine, large.ledger.last_change, IdRange(19_000, 19_500), 1000)
    assert LEDGER_KEY[dialect] in changed
    (newest,) = plans_of(large, engine, large.source.newest_id)
    (ahead,) = plans_of(large, engine, large.source.count_next, 19_000, 1000)
    assert "extraction_pending_insta_content" in ahead  # the rows that no mark calls done
    if dialect == "postgresql":  # SQLite walks the table itself backwards, and says SCAN to that
        assert SOURCE_KEY[dialect] in newest
        assert "Backward" in newest


def test_the_reach_of_a_range_is_counted_along_the_key(database, large):
    assert large.source.reach(11, 19_000, 1000) == 1010
    assert large.source.reach(11, 500, 1000) == 500
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    (plan,) = plans_of(large, database.engine, large.source.reach, 11, 19_000, 1000)
    assert SOURCE_KEY[database.engine.dialect.name] in plan
    assert not any(word in plan for word in ("Sort", "Seq Scan", "TEMP B-TREE"))


def test_the_density_of_ids_is_taken_from_the_end_of_the_key(database, large):
    (plan,) = plans_of(large, database.engine, large.source.recent_density, 1000)
    if database.engine.dialect.name == "postgresql":
        assert "Backward" in plan
        assert "insta_content_pkey" in plan
    assert not any(word in plan for word in ("Sort", "Seq Scan", "TEMP B-TREE"))
