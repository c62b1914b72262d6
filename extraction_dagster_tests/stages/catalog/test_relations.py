"""What stands behind a table's name: partitions, views, domains, other schemas, another server, a pooler."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from extraction_dagster.errors.catalog import PredicateError, SourceTableError
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.indexing import make_pending_index
from extraction_dagster.stages.catalog.pending import scan

TODAY, ALL = Fingerprints("f1", "e1"), IdRange(1, 99)
COLUMNS = "id bigint NOT NULL, path text, platform text, code text, is_extracted boolean, is_embedded boolean"


@pytest.fixture
def database(postgres_url, make_database, settings):
    database = make_database(postgres_url, settings)
    yield database
    database.engine.dispose()


def process(catalog, *ids):
    """Mark rows as done, and see that they are."""
    plan = catalog.begin(ALL, TODAY)
    assert set(plan) == set(ids)
    assert catalog.mark_extracted(plan, dict.fromkeys(ids, 2), "f1") == set(ids)
    assert catalog.mark_done(catalog.plan(ALL, TODAY), dict.fromkeys(ids, 2), TODAY) == set(ids)
    assert scan(catalog, after_id=None, up_to_id=None, budget=100).pending_ids == []


def test_a_table_partitioned_by_id_gets_its_index_part_by_part(database):
    database.execute(f"CREATE TABLE insta_content ({COLUMNS}, PRIMARY KEY (id)) PARTITION BY HASH (id)")
    for part in (0, 1):
        database.execute(
            f'CREATE TABLE "Part {part}" PARTITION OF insta_content FOR VALUES WITH (modulus 2, remainder {part})'
        )
    database.insert(1, 2, 3)
    catalog = database.catalog()
    made = make_pending_index(catalog.source, catalog.source_engine)
    assert made.state == "made"
    assert "CREATE INDEX CONCURRENTLY" in made.sql
    assert database.rows("SELECT count(*) FROM pg_index WHERE NOT indisvalid") == [(0,)]
    assert make_pending_index(catalog.source, catalog.source_engine).state == "there"
    process(catalog, 1, 2, 3)
    catalog.close()


def test_partitions_of_partitions_get_their_index_too(database):
    database.execute(f"CREATE TABLE insta_content ({COLUMNS}, PRIMARY KEY (id)) PARTITION BY RANGE (id)")
    database.execute("CREATE TABLE low PARTITION OF insta_content FOR VALUES FROM (0) TO (100) PARTITION BY RANGE (id)")
    database.execute("CREATE TABLE lowest PARTITION OF low FOR VALUES FROM (0) TO (50)")
    catalog = database.catalog()
    assert make_pending_index(catalog.source, catalog.source_engine).state == "made"
    assert make_pending_index(catalog.source, catalog.source_engine).state == "there"
    catalog.close()


def test_a_table_partitioned_by_date_is_read_through_the_view_that_is_proposed(database):
    database.execute(
        f"CREATE TABLE insta_content ({COLUMNS}, day date NOT NULL, PRIMARY KEY (id, day)) PARTITION BY RANGE (day)"
    )
    database.execute("CREATE TABLE d1 PARTITION OF insta_content FOR VALUES FROM ('2026-01-01') TO ('2027-01-01')")
    database.insert(1, 2, day="2026-05-01")
    with pytest.raises(SourceTableError, match="partitioned by another column") as told:
        database.catalog()
    statements = re.findall(r"(CREATE (?:VIEW|INDEX) [^;]+?)(?:;|\)\.)", str(told.value))
    for statement in (text if text.count("(") == text.count(")") else f"{text})" for text in statements):
        database.execute(statement)
    catalog = database.catalog(source_table="insta_content_by_id")
    process(catalog, 1, 2)
    assert database.rows("SELECT count(*) FROM insta_content WHERE is_embedded") == [(2,)]
    catalog.close()


@pytest.mark.parametrize("make", ["MATERIALIZED VIEW", "VIEW"])
def test_a_view_of_either_kind_is_read_only_where_its_rows_can_not_be_marked(make, database, tmp_path):
    database.create(name="stored")
    database.execute("INSERT INTO stored (id, path) VALUES (1, 'a.mp4')")
    database.execute(f"CREATE {make} insta_content AS SELECT * FROM stored")
    if make == "MATERIALIZED VIEW":
        with pytest.raises(SourceTableError, match=r"materialized view, whose rows can't be marked.*READ_ONLY=true"):
            database.catalog()
    elsewhere = {"source_read_only": True, "state_url": f"sqlite:///{tmp_path}/state.db"}
    catalog = database.catalog(**elsewhere)
    process(catalog, 1)
    catalog.close()


def test_a_foreign_table_is_read(database):
    database.create(name="stored")
    database.execute("INSERT INTO stored (id, path) VALUES (1, 'a.mp4')")
    try:
        database.execute("CREATE EXTENSION postgres_fdw")
    except sa.exc.DBAPIError:
        pytest.skip("this PostgreSQL comes without postgres_fdw")
    url = sa.make_url(database.url)
    database.execute(
        f"CREATE SERVER here FOREIGN DATA WRAPPER postgres_fdw OPTIONS"
        f" (host '{url.query['host']}', dbname '{url.database}')"
    )
    database.execute("CREATE USER MAPPING FOR CURRENT_USER SERVER here OPTIONS (user 'postgres')")
    database.execute(
        f"CREATE FOREIGN TABLE insta_content ({COLUMNS}) SERVER here"
        " OPTIONS (table_name 'stored', schema_name 'public')"
    )
    catalog = database.catalog()
    process(catalog, 1)
    assert database.rows("SELECT is_embedded FROM stored") == [(True,)]
    catalog.close()


def test_domains_count_as_what_they_are_made_of(database):
    database.execute("CREATE DOMAIN key AS bigint NOT NULL CHECK (VALUE > 0)")
    database.execute("CREATE DOMAIN video_key AS key")
    database.execute("CREATE DOMAIN flag AS boolean")
    database.execute(
        "CREATE TABLE insta_content (id video_key UNIQUE, path text, platform text, code text,"
        " is_extracted flag, is_embedded flag)"
    )
    database.insert(5)
    catalog = database.catalog()
    process(catalog, 5)
    catalog.close()


def test_a_table_that_is_not_there_is_looked_for_in_other_schemas(database):
    database.execute("CREATE SCHEMA media")
    database.execute(f"CREATE TABLE media.videos ({COLUMNS}, PRIMARY KEY (id))")
    for name, fix in (
        ("media.videos", "Set EXTRACTION_SOURCE_SCHEMA=media and EXTRACTION_SOURCE_TABLE=videos."),
        ("videos", "There is one in schema 'media': set EXTRACTION_SOURCE_SCHEMA=media."),
    ):
        with pytest.raises(SourceTableError, match=re.escape(fix)):
            database.catalog(source_table=name)
    database.catalog(source_schema="media", source_table="videos").close()


def test_our_own_tables_are_neither_offered_nor_taken(database):
    database.create()
    database.catalog().close()
    with pytest.raises(SourceTableError, match=r"\(there: insta_content\)"):
        database.catalog(source_table="extra_ledger")
    with pytest.raises(SourceTableError, match="this project's own"):
        database.catalog(source_table="extraction_ledger")


@pytest.mark.parametrize(
    ("predicate", "why"),
    [
        ("mood = 'redy'", 'invalid input value for enum mood: "redy"'),
        ("uploaded_at > '2026-13-45'", "2026-13-45"),
        ("size = 'abc'", 'invalid input syntax for type integer: "abc"'),
        ("document = 'x'", "operator does not exist|invalid input syntax"),
        ("token = 'no-uuid'", "does not fit its column"),
        ("is_extracted = 'perhaps'", "does not fit its column"),
    ],
)
def test_a_value_that_does_not_fit_its_column_is_the_predicates_fault(predicate, why, database):
    database.execute("CREATE TYPE mood AS ENUM ('ready', 'gone')")
    extra = "mood mood, uploaded_at timestamptz, size int, document json, token uuid"
    database.execute(f"CREATE TABLE insta_content ({COLUMNS}, {extra}, PRIMARY KEY (id))")
    with pytest.raises(PredicateError, match=why) as told:
        database.catalog(source_predicate=predicate)
    assert "\n" not in str(told.value)
    assert "EXTRACTION_SOURCE_PREDICATE" in str(told.value)


def test_sqlite_refuses_such_values_too(sqlite_database):
    sqlite_database.create(ids=(1,))
    with pytest.raises(PredicateError, match="does not fit its column"):
        sqlite_database.catalog(source_predicate="size_bytes > 99999999999999999999999")


@pytest.fixture
def pooled_url(postgres_url):
    """The same database through pgbouncer, which gives each transaction another connection."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    url = sa.make_url(postgres_url)
    folder = Path(tempfile.mkdtemp(prefix="pool"))  # another user must get there, and the path of a socket is short
    folder.chmod(0o777)
    users = folder / "users.txt"
    users.write_text('"postgres" ""\n')
    (folder / "pool.ini").write_text(
        f"[databases]\n* = host={url.query['host']}\n[pgbouncer]\nlisten_addr =\nunix_socket_dir = {folder}\n"
        f"listen_port = 6432\npool_mode = transaction\nauth_type = trust\nauth_file = {users}\ndefault_pool_size = 2\n"
        "ignore_startup_parameters = extra_float_digits\n"
    )
    as_user = ["-u", Path(url.query["host"]).owner()] if os.geteuid() == 0 else []
    with subprocess.Popen([program, *as_user, str(folder / "pool.ini")], stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 20
        while not (folder / ".s.PGSQL.6432").exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        yield f"postgresql://postgres@/{url.database}?host={folder}&port=6432"
        process.terminate()
    shutil.rmtree(folder)


@pytest.mark.servers
def test_rows_are_read_and_marked_through_a_pooler(pooled_url, database, make_database, settings):
    database.create()
    database.insert(*range(1, 40), updated_at="2026-01-02 03:04:05")
    pooled = make_database(pooled_url, settings)
    options = {"source_version_column": "updated_at", "source_predicate": "path LIKE '%.mp4'"}
    catalogs = [pooled.catalog(**options) for _ in range(4)]
    for catalog in catalogs:
        assert {row.video.content_version for row in catalog.source.rows(ALL)} == {"2026-01-02 03:04:05"}
    assert make_pending_index(catalogs[0].source, catalogs[0].source_engine).state == "made"
    process(catalogs[0], *range(1, 40))
    for catalog in catalogs:
        assert catalog.status()["done"] == 39
        catalog.close()
    pooled.engine.dispose()


@pytest.mark.filterwarnings("error")
def test_types_that_nobody_here_knows_are_passed_over_in_silence(database):
    database.execute("CREATE TYPE both_ends AS (a int, b int)")
    database.execute(f"CREATE TABLE insta_content ({COLUMNS}, place point, ends both_ends, PRIMARY KEY (id))")
    database.execute("CREATE INDEX lower_codes ON insta_content (lower(code))")
    database.insert(1, 2)
    catalog = database.catalog(source_payload_columns=("place", "ends"))
    database.execute("UPDATE insta_content SET place = '(1,2)', ends = ROW(3, 4)")
    plan = catalog.begin(ALL, TODAY)
    assert [planned.row.video.payload for planned in plan.values()] == [{"place": "(1,2)", "ends": "(3,4)"}] * 2
    catalog.close()
