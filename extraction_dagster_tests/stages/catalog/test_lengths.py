"""The longest, deepest and oddest values that a column takes, between good rows: each fails its row alone."""

import functools
import json
import subprocess
import sys
import textwrap
import time

import pytest
import sqlalchemy as sa
from sqlalchemy.types import JSON

from extraction_dagster.records import Failure, IdRange
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.lengths import size_bytes

TODAY = Fingerprints(frames="f1", embedding="e1")
PAYLOAD = ("caption", "extra", "price")
MIB = 2**20
# By what is put where, in SQL; the row fails. `{long}` is a text of many bytes, which the database makes itself.
BAD = {
    "an address": ("path", "{long}"),
    "an address of a page": ("path", "'https://' || {page}"),
    "a platform": ("platform", "{long}"),
    "a platform of 1,025": ("platform", "{label} || 'x'"),
    "a code": ("code", "{long}"),
    "a version": ("version", "{long}"),
    "a caption": ("caption", "{long}"),
    "a caption of quotes": ("caption", "replace({page}, 'x', '\"')"),
    "JSON, long": ("extra", "'[\"' || {long} || '\"]'"),
    "JSON, deep": ("extra", f"'{'[' * 40}{']' * 40}'"),
    "JSON, very deep": ("extra", f"'{'[' * 8000}{']' * 8000}'"),
    "JSON, a number without end": ("extra", f"'[{'1' * 5000}]'"),
}
# The row is good: odd, and no longer than may be.
GOOD = {
    "nothing": ("path", "path"),
    "a platform of 1,024": ("platform", "{label}"),
    "a version that says it is too long": ("version", "'too long: 100000'"),
    "a caption with everything": ("caption", "'\x1b[31m, \t, \u202e, \x7f'"),
    "JSON, 30 levels": ("extra", f"'{'[' * 30}{']' * 30}'"),
    "JSON, beyond 64 bits": ("extra", "'[1e999, 18446744073709551616]'"),
}
GOOD_IN_SQLITE = {
    "JSON, NaN": ("extra", "'[NaN, Infinity, -Infinity]'"),
    "JSON, half a pair": ("extra", "'[\"\\ud800\"]'"),
    "a caption with NUL": ("caption", "'a' || char(0) || 'b'"),
}
IN_SQLITE = {
    "bytes that are no text": ("caption", "CAST(x'66ff2e' AS TEXT)"),
    "a text where a number should be": ("price", "{long}"),
    "a text where a mark should be": ("is_extracted", "{long}"),
    "a binary address": ("path", "x'00ff'"),
}


def make_table(database, number):
    database.create(
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        *(sa.Column(name, sa.Text) for name in ("platform", "code", "path", "version", "caption")),
        *(sa.Column(name, sa.Boolean, server_default=sa.false()) for name in ("is_extracted", "is_embedded")),
        sa.Column("extra", JSON),
        sa.Column("price", sa.Numeric),
    )
    database.insert(*range(1, number + 1), version="v1", caption="a", price=1)


def spoil(database, cases, *, first=2, number, long_bytes):
    """Every second row; returns the ids of those that must fail."""
    sqlite = database.engine.dialect.name == "sqlite"
    texts = {
        name: f"printf('%.{size}c', 'x')" if sqlite else f"repeat('x', {size})"
        for name, size in {"long": long_bytes, "page": 16_000, "label": 1024}.items()
    }
    bad, kinds = set(), list(cases.items())
    with database.engine.begin() as connection:
        for count, record_id in enumerate(range(first, number + 1, 2)):
            name, (column, value) = kinds[count % len(kinds)]
            value = functools.reduce(lambda text, item: text.replace(f"{{{item[0]}}}", item[1]), texts.items(), value)
            if column == "extra" and not sqlite:
                value = f"CAST({value} AS JSON)"
            connection.connection.driver_connection.cursor().execute(
                f"UPDATE insta_content SET {column} = {value} WHERE id = {record_id}"
            )
            if name not in {*GOOD, *GOOD_IN_SQLITE}:
                bad.add(record_id)
    return bad


def open_catalog(database):
    return database.catalog(
        source_payload_columns=PAYLOAD, source_version_column="version", retry_delay_seconds=0, max_attempts=1
    )


def do_all(database, number):
    """One run over the whole table, without decoding; returns the ids that failed, and the CPU seconds."""
    catalog, within = open_catalog(database), IdRange(1, number)
    began = time.process_time()
    plan = catalog.begin(within, TODAY)
    failures = [
        Failure(key, planned.content_version, "catalog", "UnreadableRowError", str(planned.row.problem))
        for key, planned in plan.items()
        if planned.row.problem
    ]
    catalog.record_failures(plan, failures, run_id="r")
    good = dict.fromkeys(plan.keys() - {failure.record_id for failure in failures}, 3)
    catalog.mark_extracted(plan, good, "f1")
    done = catalog.mark_done(plan, good, TODAY)
    seconds = time.process_time() - began
    assert done == good.keys()
    assert catalog.summary(within) == f"{len(good)} done, 0 pending, 0 failed, {len(failures)} parked"
    assert all(len(failure.message) < 1200 for failure in failures)
    catalog.close()
    return {failure.record_id for failure in failures}, seconds


def check(database, number, long_bytes, *, cases):
    make_table(database, number)
    bad = spoil(database, cases, number=number, long_bytes=long_bytes)
    assert len(bad) >= number // 4
    failed, seconds = do_all(database, number)
    assert failed == bad
    return seconds


def test_a_thousand_rows_of_the_worst_in_sqlite_fail_alone(sqlite_database):
    check(sqlite_database, 2000, 100_000, cases={**BAD, **IN_SQLITE, **GOOD, **GOOD_IN_SQLITE})


def test_a_thousand_rows_of_the_worst_in_postgresql_fail_alone(postgres_url, make_database, settings):
    database = make_database(postgres_url, settings)
    check(database, 2000, 100_000, cases={**BAD, **GOOD})
    database.engine.dispose()


def test_the_time_grows_with_the_number_of_rows_and_not_with_their_lengths(make_database, settings, tmp_path):
    def seconds(name, number, long_bytes):
        database = make_database(f"sqlite:///{tmp_path / name}.db", settings)
        return check(database, number, long_bytes, cases={**BAD, **IN_SQLITE})

    few, many = seconds("few", 150, 20_000), seconds("many", 600, 20_000)
    assert many < 10 * few
    assert seconds("long", 150, MIB) < 10 * few


MEMORY = """
import resource, sys
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.catalog import Catalog
from extraction_dagster.records import IdRange
settings = Settings(
    home=sys.argv[1], source_url=sys.argv[2], state_url="sqlite:///" + sys.argv[1] + "/state.db",
    source_payload_columns="caption,extra", source_version_column="version",
)
catalog = Catalog(settings)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
problems = 0
for row in catalog.source.rows(IdRange(1, 1000)):
    problems += row.problem is not None
catalog.source.addresses_of(range(1, 1000))
found = list(catalog.source.rows_of(range(1, 1000)))
print(problems, len(found), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
LONG = {name: BAD[name] for name in ("an address", "a code", "a version", "a caption", "JSON, long")}


def memory_mib(database, url, home, *, rows, long_bytes):
    """The memory that a process needs more, in MiB, to read a table of rows that are far too long."""
    make_table(database, rows)
    bad = spoil(database, LONG, first=1, number=rows, long_bytes=long_bytes)
    run = [sys.executable, "-c", textwrap.dedent(MEMORY), str(home), url]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    told = done.stdout.split()
    assert [int(text) for text in told[:2]] == [len(bad), rows]
    return int(told[2])


def test_what_is_far_too_long_is_not_held_in_memory(sqlite_database, tmp_path):
    url = str(sqlite_database.engine.url)
    # 40 texts of 4 MiB: SQLite itself holds one or two of them at a time.
    assert memory_mib(sqlite_database, url, tmp_path, rows=80, long_bytes=4 * MIB) < 60


def test_postgresql_sends_no_text_that_is_far_too_long(postgres_url, make_database, settings, tmp_path):
    database = make_database(postgres_url, settings)
    url = database.engine.url.render_as_string(hide_password=False)
    assert memory_mib(database, url, tmp_path, rows=80, long_bytes=4 * MIB) < 30
    database.engine.dispose()


@pytest.mark.soak
def test_texts_of_a_hundred_megabytes_are_not_held_in_memory(sqlite_database, tmp_path):
    url = str(sqlite_database.engine.url)
    assert memory_mib(sqlite_database, url, tmp_path, rows=40, long_bytes=100 * MIB) < 600


def test_each_length_and_its_setting_are_named(sqlite_database):
    make_table(sqlite_database, 8)
    for record_id, column in enumerate(("platform", "code", "version"), 1):
        sqlite_database.execute(f"UPDATE insta_content SET {column} = :text WHERE id = {record_id}", text="é" * 513)
    sqlite_database.execute("UPDATE insta_content SET path = :text WHERE id = 4", text="a" * 8193)
    sqlite_database.execute(
        "UPDATE insta_content SET caption = :text, extra = :json WHERE id = 5",
        text="a" * 9000,
        json=json.dumps("b" * 9000),
    )
    sqlite_database.execute("UPDATE insta_content SET code = :text WHERE id = 6", text="a" * 100_000)
    sqlite_database.execute("UPDATE insta_content SET version = :text WHERE id = 7", text="a" * 100_000)
    catalog = open_catalog(sqlite_database)
    said = {
        row.video.record_id: str(row.problem or "").partition(". ")[0] for row in catalog.source.rows(IdRange(1, 8))
    }
    label = "bytes; expected at most 1024 bytes (EXTRACTION_MAX_LABEL_BYTES)"
    assert said == {
        1: f"Column 'platform' of record 1 in 'insta_content' can't be used: it has 1026 {label}",
        2: f"Column 'code' of record 2 in 'insta_content' can't be used: it has 1026 {label}",
        3: f"Column 'version' of record 3 in 'insta_content' can't be used: it has 1026 {label}",
        4: "Column 'path' of record 4 in 'insta_content' can't be used: it has 8193 bytes; expected at most 8192 bytes "
        "(EXTRACTION_MAX_ADDRESS_BYTES)",
        5: "Column 'caption, extra, price' of record 5 in 'insta_content' can't be used: it has 18053 bytes; expected "
        "at most 16384 bytes (EXTRACTION_MAX_PAYLOAD_BYTES)",
        6: f"Column 'code' of record 6 in 'insta_content' can't be used: it has 100000 {label}",
        7: f"Column 'version' of record 7 in 'insta_content' can't be used: it has 100000 {label}",
        8: "",
    }
    catalog.close()


@pytest.mark.parametrize(
    ("value", "size"), [("abc", 3), ("é", 2), ("\ud800", 3), (b"abc", 3), ({"a": "é"}, 11), ([1, None], 9), (1.5, 3)]
)
def test_sizes_are_in_bytes_of_utf8(value, size):
    assert size_bytes(value) == size
