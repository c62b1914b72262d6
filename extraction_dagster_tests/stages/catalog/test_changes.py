"""Rows in the order of their versions, whether that order can be used, and which have changed; over real databases."""

from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.changes import Growth, Page, Place, Versions, changed, growth_of
from extraction_dagster.stages.catalog.pending import snapshot

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TODAY = Fingerprints(frames="f1", embedding="e1")


@pytest.fixture
def opened(database):
    """A catalog that is closed at the end: `opened(source_version_column="code")`; updated_at unless it is told."""
    catalogs = []

    def make(**overrides):
        catalogs.append(database.catalog(**{"source_version_column": "updated_at", **overrides}))
        return catalogs[-1]

    yield make
    for catalog in catalogs:
        catalog.close()


def growth(catalog, setting="auto"):
    return growth_of(catalog.source, catalog.source_engine, setting)


@contextmanager
def order(catalog, now=NOW):
    with snapshot(catalog) as connection:
        yield Versions(catalog, connection, growth(catalog), now=now)


INDEXES = {
    "(updated_at)": True,
    "(updated_at, id)": True,
    "(updated_at DESC)": True,
    "(updated_at) WHERE size_bytes > 1": False,
    "(size_bytes, updated_at)": False,
}


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_over_all_rows_that_begins_with_the_version_shows_changes(database, opened, index):
    database.create()
    database.execute(f"CREATE INDEX by_time ON insta_content {index}")
    found = growth(opened())
    if INDEXES[index]:
        told = "a changed updated_at is found at once, through the index by_time"
        assert found == Growth("time", "by_time", is_sure=True, told=told)
        assert growth(opened(), "off").kind is None
    else:
        assert (found.kind, found.told.partition(":")[0]) == (None, "no index begins with updated_at")


@pytest.mark.parametrize(
    "index", ["USING hash (updated_at)", "USING brin (updated_at)", "((updated_at + interval '1 s'))"]
)
def test_indexes_that_have_no_order_or_another_do_not_count(make_database, postgres_url, settings, index):
    database = make_database(postgres_url, settings)
    database.create()
    database.execute(f"CREATE INDEX by_time ON insta_content {index}")
    catalog = database.catalog(source_version_column="updated_at")
    assert growth(catalog).kind is None
    catalog.close()
    database.engine.dispose()


def test_a_unique_column_and_a_leading_key_count(database, opened):
    database.create(
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("platform", sa.Text),
        sa.Column("code", sa.Text),
        sa.Column("path", sa.Text),
        sa.Column("is_extracted", sa.Boolean),
        sa.Column("is_embedded", sa.Boolean),
        sa.Column("row_version", sa.BigInteger, unique=True),
    )
    found = growth(opened(source_version_column="row_version"))
    assert (found.kind, found.is_sure) == ("number", False)
    assert "'extraction run' still compares every row" in found.told
    assert growth(opened(source_version_column="id")).kind == "number"
    assert growth(opened(source_version_column="row_version"), "on").is_sure


def test_the_index_that_helps_is_printed_for_the_dialect(database, opened):
    database.create()
    wanted = "INDEX CONCURRENTLY" if database.engine.dialect.name == "postgresql" else "INDEX"
    catalog = opened()
    sql = growth(catalog).sql
    assert sql == f"CREATE {wanted} extraction_versions_insta_content ON insta_content (updated_at, id)"
    if database.engine.dialect.name == "sqlite":
        database.execute(sql)
    else:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(sql)
    assert growth(opened()).kind == "time"


def test_a_text_does_not_grow_unless_somebody_says_so(database, opened):
    database.create()
    database.execute("CREATE INDEX by_code ON insta_content (code)")
    catalog = opened(source_version_column="code")
    assert growth(catalog) == Growth(
        None,
        None,
        is_sure=False,
        told="code is of type TEXT, which is not taken to grow: a changed row is found when its turn comes; "
        "if it grows, set EXTRACTION_SOURCE_VERSION_GROWS=on",
    )
    assert (growth(catalog, "on").kind, growth(catalog, "on").is_sure) == ("text", True)
    assert growth(opened(source_version_column=None)).kind is None


def test_an_index_that_is_still_being_built_is_not_there_yet(make_database, postgres_url, settings):
    database = make_database(postgres_url, settings)
    database.create()
    database.execute("CREATE INDEX by_time ON insta_content (updated_at)")
    catalog = database.catalog(source_version_column="updated_at")
    with order(catalog) as versions:
        assert versions.is_there()
    database.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'by_time'::regclass")
    with order(catalog) as versions:
        assert not versions.is_there()
    catalog.close()
    database.engine.dispose()


def walk(catalog, size, after=None, **options):
    """The ids of each page, and the places behind them."""
    pages, places = [], []
    with snapshot(catalog) as connection:
        versions = Versions(catalog, connection, growth(catalog), now=NOW)
        while (page := versions.page(after, size, **options)) is not None:
            assert isinstance(page, Page)
            query = sa.select(catalog.source.id).where(page.condition).order_by(catalog.source.id)
            pages.append(list(connection.execute(query).scalars()))
            places.append(page.place)
            after = page.place
            if page.is_last:
                break
    return pages, places


@pytest.fixture
def times(database, opened):
    """Rows with these times of a day, by id: `times({1: "10:00:00"})`."""

    def make(values, **options):
        database.create()
        database.execute("CREATE INDEX by_time ON insta_content (updated_at)")
        for record_id, value in values.items():
            database.insert(record_id, updated_at=None if value is None else f"2026-03-01 {value}")
        return opened(**options)

    return make


def test_rows_of_one_version_are_not_torn_apart(times):
    catalog = times({1: "10:00:07", 2: "10:00:12", 3: "10:00:09", 4: "10:00:12", 5: "10:00:09", 6: "10:00:12", 7: None})
    pages, places = walk(catalog, 4)
    assert pages == [[1, 3, 5], [2, 4, 6]]
    assert [place.version for place in places] == ["2026-03-01 10:00:09", "2026-03-01 10:00:12"]
    assert walk(catalog, 4, Place("2026-03-01 10:00:12"))[0] == []
    assert walk(catalog, 4, up_to="2026-03-01 10:00:09")[0] == [[1, 3, 5]]


def test_rows_of_one_version_that_fill_pages_go_on_after_an_id(times):
    stamped = dict.fromkeys(range(2, 9), "11:00:00")
    catalog = times({1: "10:00:00", **stamped, 9: "12:00:00"})
    pages, places = walk(catalog, 3)
    assert pages == [[1], [2, 3, 4], [5, 6, 7], [8], [9]]
    assert [place.record_id for place in places] == [None, 4, 7, None, None]
    assert walk(catalog, 7)[0] == [[1], [2, 3, 4, 5, 6, 7, 8], [9]]


def test_parts_of_a_second_are_kept(times):
    catalog = times({1: "10:00:00.000001", 2: "10:00:00.000002", 3: "10:00:00"})
    found, places = walk(catalog, 2)
    assert found == [[3], [1, 2]]
    assert [place.version for place in places] == ["2026-03-01 10:00:00", "2026-03-01 10:00:00.000002"]
    assert walk(catalog, 5, Place("2026-03-01 10:00:00.000001"))[0] == [[2]]


def test_the_newest_and_what_is_of_the_future(times):
    catalog = times({1: "10:00:00", 2: "11:00:00", 3: "12:00:01", 4: None})
    with order(catalog) as versions:
        assert versions.newest() == "2026-03-01 12:00:01"
        assert versions.newest(of_the_past=True) == "2026-03-01 11:00:00"
        assert versions.below_newest(1) == "2026-03-01 10:00:00"
        assert versions.below_newest(2) is None
        assert versions.has_nulls()
        assert not versions.is_past(Place("2026-03-01 12:00:01"))
        assert versions.is_past(Place("2026-03-01 12:00:00"))
        assert versions.once_more_from(Place("2026-03-01 11:00:00"), 600) == Place("2026-03-01 10:50:00", -(2**63))
        page = versions.page(Place("2026-03-01 10:00:00"), 10)
    assert (page.place, page.is_last, page.is_past) == (Place("2026-03-01 12:00:01"), True, False)


@pytest.mark.parametrize(
    ("kind", "values", "past"),
    [
        (sa.BigInteger, [1, 2, 3], 3),  # a counter has no future
        (sa.BigInteger, [1_772_366_399, 1_772_366_401], 1_772_366_399),  # seconds
        (sa.BigInteger, [1_772_366_399_999, 1_772_366_400_001], 1_772_366_399_999),  # milliseconds
        (sa.Date, ["2026-02-28", "2026-03-01", "2026-03-02"], "2026-03-01"),
        (sa.DateTime(timezone=True), ["2026-03-01 12:30:00+02:00", "2026-03-01 12:30:00+00:00"], None),
    ],
)
def test_the_present_is_told_in_the_form_of_the_column(database, opened, kind, values, past):
    if past is None and database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no zones")  # its texts are compared as they are
    database.create(
        *(
            sa.Column(name, type_, primary_key=name == "id")
            for name, type_ in {
                "id": sa.BigInteger().with_variant(sa.Integer, "sqlite"),
                "platform": sa.Text,
                "code": sa.Text,
                "path": sa.Text,
                "is_extracted": sa.Boolean,
                "is_embedded": sa.Boolean,
                "version": kind,
            }.items()
        )
    )
    database.execute("CREATE INDEX by_version ON insta_content (version)")
    for number, value in enumerate(values, 1):
        database.insert(number, version=value)
    catalog = opened(source_version_column="version")
    with order(catalog) as versions:
        found = versions.newest(of_the_past=True)
    assert str(found) == (str(past) if past is not None else "2026-03-01 10:30:00+00")


def done(catalog, *ids):
    plan = catalog.plan(IdRange(1, 1000), TODAY)
    catalog.mark_extracted(plan, dict.fromkeys(ids, 3), "f1")
    catalog.mark_done(plan, dict.fromkeys(ids, 3), TODAY)


@pytest.fixture(params=["one database", "two databases"])
def apart(request, tmp_path):
    """Settings for a ledger beside the table, and in a database of its own."""
    return {} if request.param == "one database" else {"state_url": SecretStr(f"sqlite:///{tmp_path}/ledger.db")}


def test_rows_that_are_marked_in_another_version_have_changed(database, times, apart):
    catalog = times(dict.fromkeys(range(1, 8), "10:00:00"), source_predicate="NOT is_downloaded", **apart)
    done(catalog, 1, 2, 3, 4, 5, 6)
    with catalog.source_engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE insta_content SET updated_at = '2026-03-01 11:00:00' WHERE id IN (2, 3, 4, 7)")
        )
        connection.execute(
            sa.text("UPDATE insta_content SET is_downloaded = true WHERE id = 3")
        )  # not eligible any more
        connection.execute(sa.text("UPDATE insta_content SET is_embedded = false WHERE id = 4"))  # found by its mark
        connection.execute(sa.text("UPDATE insta_content SET updated_at = NULL WHERE id = 6"))
    with snapshot(catalog) as connection:
        ids = catalog.source.id
        assert changed(catalog, connection, ids.between(1, 9), above_id=None) == [2, 3, 6]
        assert changed(catalog, connection, ids.between(1, 9), above_id=2) == [3, 6]
    assert catalog.make_changed_pending([1, 2, 3, 6]) == {2, 3, 6}
    marks = database.rows("SELECT id FROM insta_content WHERE is_embedded ORDER BY id")
    assert marks == [(1,), (5,)]
    with snapshot(catalog) as connection:
        assert changed(catalog, connection, ids.between(1, 9), above_id=None) == []


def test_a_run_that_has_the_present_version_keeps_its_claim(times, apart, database):
    catalog = times({1: "10:00:00", 2: "10:00:00"}, **apart)
    done(catalog, 1, 2)
    database.execute("UPDATE insta_content SET updated_at = '2026-03-01 11:00:00'")
    plan = catalog.begin(IdRange(1, 2), TODAY, run_id="a")
    database.execute("UPDATE insta_content SET updated_at = '2026-03-01 11:00:01' WHERE id = 2")
    assert catalog.make_changed_pending([1, 2]) == {1, 2}
    catalog.mark_extracted(plan, {1: 3, 2: 3}, "f1")
    assert catalog.mark_done(plan, {1: 3, 2: 3}, TODAY) == {1, 2}
    # The second row has changed once more since the run read it: its mark stays cleared, so that every look finds it.
    assert database.rows("SELECT id FROM insta_content WHERE is_embedded") == [(1,)]


@pytest.mark.parametrize("text", ["caf\\xe9", "\\xff"])
def test_a_version_that_is_no_text_is_refused_to_be_remembered(sqlite_database, text):
    sqlite_database.create()
    sqlite_database.execute("CREATE INDEX by_time ON insta_content (updated_at)")
    sqlite_database.insert(1)
    raw = text.encode().decode("unicode_escape").encode("latin-1")
    sqlite_database.execute("UPDATE insta_content SET updated_at = CAST(:raw AS TEXT)", raw=raw)
    catalog = sqlite_database.catalog(source_version_column="updated_at")
    with pytest.raises(UnicodeError, match="decode"), order(catalog) as versions:
        versions.newest()
    catalog.close()
