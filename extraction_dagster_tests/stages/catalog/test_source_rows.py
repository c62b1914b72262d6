"""A value that can't be read or used fails its row, and no other: not the page, the range, a scan or a summary."""

import re

import pytest
import sqlalchemy as sa
from sqlalchemy.types import JSON

from extraction_dagster.errors.catalog import SourceUnreachableError
from extraction_dagster.records import Failure, IdRange
from extraction_dagster.stages.catalog import source_rows
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.pending import scan

TODAY = Fingerprints(frames="f1", embedding="e1")
ALL = IdRange(1, 100)
BAD_TEXT = "CAST(x'66ff2e6d7034' AS TEXT)"
DEEP, LONG = f"'{'[' * 3000}{']' * 3000}'", f"'[{'1' * 5000}]'"
BAD, GOOD = (2, 3, 6, 12), (1, 4, 5, 7, 8, 9, 10, 11)

# What is in a row, and what is said of it.
IN_SQLITE = {
    "path": (BAD_TEXT, "it is no UTF-8; expected TEXT"),
    "platform": (BAD_TEXT, "it is no UTF-8; expected TEXT"),
    "code": (BAD_TEXT, "it is no UTF-8; expected TEXT"),
    "path, binary": ("x'00ff'", "it is binary; expected TEXT"),
    "extra, deep": (DEEP, "RecursionError: .*; expected JSON"),
    "extra, rather deep": (f"'{'[' * 40}{']' * 40}'", "it is nested deeper than 32 levels; expected JSON"),
    "extra, long": (LONG, "ValueError: Exceeds the limit .*; expected JSON"),
    "extra, no JSON": ("'{no json'", "JSONDecodeError: .*; expected JSON"),
    "at": ("'10000-01-01 00:00:00'", "ValueError: .*; expected DATETIME"),
    "at, in words": ("'a while ago'", "ValueError: .*; expected DATETIME"),
    "price": ("'dear'", ".*Error: .*; expected NUMERIC"),
}
IN_POSTGRESQL = {
    "extra, deep": (DEEP, "RecursionError: .*; expected JSON"),
    "extra, long": (LONG, "ValueError: Exceeds the limit .*; expected JSON"),
    "at": ("'10000-01-01'", "ValueError: year 10000 is out of range; expected TIMESTAMP"),
    "at, before": ("'0044-03-15 BC'", "ValueError: .*; expected TIMESTAMP"),
}


def make_table(database):
    """Rows 1 to 12."""
    database.create(
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        *(sa.Column(name, sa.Text) for name in ("platform", "code", "path", "version")),
        *(sa.Column(name, sa.Boolean, server_default=sa.false()) for name in ("is_extracted", "is_embedded")),
        sa.Column("extra", JSON),
        sa.Column("at", sa.DateTime),
        sa.Column("price", sa.Numeric),
    )
    database.insert(*range(1, 13), version="v1", at="2025-01-01 00:00:00", price=1)
    return database


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(source_rows, "_PAGE", 4)


def spoil(database, column, literal, *record_ids):
    with database.engine.begin() as connection:
        for record_id in record_ids:
            connection.exec_driver_sql(f"UPDATE insta_content SET {column} = {literal} WHERE id = {record_id}")


def open_catalog(database, **overrides):
    payload = ("extra", "at", "price")
    return database.catalog(source_payload_columns=payload, retry_delay_seconds=0, max_attempts=2, **overrides)


def unreadable(plan):
    """What a run writes down of the rows that it can't read."""
    return [
        Failure(key, planned.content_version, "catalog", "UnreadableRowError", str(planned.row.problem))
        for key, planned in plan.items()
        if planned.row.problem
    ]


def finish(catalog, plan, *ids):
    catalog.mark_extracted(plan, dict.fromkeys(ids, 3), "f1")
    catalog.mark_done(plan, dict.fromkeys(ids, 3), TODAY)


def due(catalog):
    return scan(catalog, after_id=None, up_to_id=None, budget=100).pending_ids


def check(database, case, literal, said):
    column = case.partition(",")[0]
    spoil(database, column, literal, *BAD)
    catalog = open_catalog(database)
    rows = {row.video.record_id: row for row in catalog.source.rows(ALL)}
    assert list(rows) == list(range(1, 13))
    assert {key for key, row in rows.items() if row.problem} == set(BAD)
    wanted = f"Column '{column}' of record 6 in 'insta_content' can't be used: {said}. Nothing was written for it"
    assert re.match(wanted.replace("(", r"\("), str(rows[6].problem))
    assert rows[6].video.uri in {"6.mp4", ""} or column == "path"
    assert rows[4].video.payload["price"] == 1
    assert [row.video.record_id for row in catalog.source.rows_of([12, 4, 6])] == [4, 6, 12]

    plan = catalog.begin(ALL, TODAY)
    for state in ("failed", "parked"):
        assert catalog.record_failures(plan, unreadable(plan), run_id="r") == dict.fromkeys(BAD, state)
    finish(catalog, plan, *GOOD)
    assert due(catalog) == []
    assert catalog.summary(ALL) == "8 done, 0 pending, 0 failed, 4 parked"
    status = catalog.status()
    assert (status["eligible"], status["done"], status["parked"], status["pending"]) == (12, 8, 4, 0)
    assert catalog.moved(after_id=None, budget=100).record_ids == ()

    spoil(database, column, "NULL" if column != "path" else "'better.mp4'", 6)
    assert due(catalog) == ([6] if column == "path" else [])  # a corrected address is seen; other values need a retry
    catalog.ledger.retry(record_ids=[6], error_type="UnreadableRowError")
    mended = catalog.begin(ALL, TODAY)
    assert (mended[6].status, mended[6].row.problem) == ("todo", None)
    catalog.close()


@pytest.mark.parametrize("case", IN_SQLITE)
def test_a_bad_value_in_sqlite_fails_its_row_alone(sqlite_database, case):
    check(make_table(sqlite_database), case, *IN_SQLITE[case])


@pytest.mark.parametrize("case", IN_POSTGRESQL)
def test_a_bad_value_in_postgresql_fails_its_row_alone(postgres_url, make_database, settings, case):
    database = make_table(make_database(postgres_url, settings))
    check(database, case, *IN_POSTGRESQL[case])
    database.engine.dispose()


def test_what_postgresql_takes_for_endless_can_be_read(postgres_url, make_database, settings):
    database = make_table(make_database(postgres_url, settings))
    for record_id, (column, literal) in enumerate(
        [("at", "'infinity'"), ("at", "'-infinity'"), ("price", "'NaN'"), ("price", "1e300")], 1
    ):
        spoil(database, column, literal, record_id)
    catalog = open_catalog(database)
    assert [row.problem for row in catalog.source.rows(ALL)] == [None] * 12
    catalog.close()
    database.engine.dispose()


def test_a_version_of_any_bytes_is_a_version(sqlite_database):
    database = make_table(sqlite_database)
    spoil(database, "version", BAD_TEXT, 2, 3)
    catalog = open_catalog(database, source_version_column="version")
    plan = catalog.begin(ALL, TODAY)
    assert {key: planned.row.problem for key, planned in plan.items()} == dict.fromkeys(range(1, 13))
    assert (plan[2].source_version, plan[4].source_version) == ("f\\udcff.mp4", "v1")
    finish(catalog, plan, *range(1, 13))
    assert due(catalog) == []
    assert scan(catalog, after_id=None, up_to_id=None, budget=100, every_row=True).pending_ids == []
    assert {planned.status for planned in catalog.plan(ALL, TODAY).values()} == {"done"}
    spoil(database, "version", BAD_TEXT.replace("ff", "fe"), 3)
    assert scan(catalog, after_id=None, up_to_id=None, budget=100, every_row=True).pending_ids == [3]
    catalog.close()


def test_a_template_that_fails_on_a_value_fails_its_row(database):
    make_table(database)
    spoil(database, "extra", "'[1]'", *range(1, 13))
    spoil(database, "extra", f"'{'[' * 3000}{']' * 3000}'", 2)
    catalog = database.catalog(source_uri_template="{code}/{extra}.mp4")
    rows = {row.video.record_id: row for row in catalog.source.rows(ALL)}
    assert {key for key, row in rows.items() if row.problem} == {2}
    assert (rows[2].video.uri, rows[2].video.address) == ("", "")
    assert rows[3].video.uri == "c3/[1].mp4"
    assert list(catalog.source.addresses_of([2, 3])) == [2, 3]
    catalog.close()


def test_a_database_that_fails_is_not_taken_for_bad_values(database):
    make_table(database)
    catalog = open_catalog(database)
    database.execute("DROP TABLE insta_content")
    with pytest.raises(SourceUnreachableError, match="Cannot read source table 'insta_content'"):
        list(catalog.source.rows(ALL))
    catalog.close()
