"""The source table: what is read of it, what is refused, what is marked."""

import re
from datetime import datetime

import pytest
import sqlalchemy as sa

from extraction_dagster.errors.catalog import DatabaseUrlError, SourceTableError, SourceUnreachableError
from extraction_dagster.records import IdRange, VideoRow
from extraction_dagster.stages.catalog.database import describe, make_engine, parse_url
from extraction_dagster.stages.catalog.source_table import SourceRow, SourceTable


def open_table(database, **overrides):
    return SourceTable(database.engine, database.settings(**overrides))


def test_rows_of_a_range_come_in_ascending_order_with_both_ends_included(database):
    database.create(ids=(5, 1, 3, 9))
    rows = list(open_table(database, allowed_roots=("/videos",)).rows(IdRange(1, 5)))
    addresses = {1: "e7b8455fe38398ec", 3: "222eb2f71e281639", 5: "869bd7b12519ff8f"}
    assert rows == [
        SourceRow(
            VideoRow(key, f"{key}.mp4", "tube", f"c{key}", address=addresses[key]), extracted=False, embedded=False
        )
        for key in (1, 3, 5)
    ]


def test_a_predicate_leaves_out_rows_that_are_not_eligible(database):
    database.create()
    database.insert(1, is_downloaded=True)
    database.insert(2, is_downloaded=False)
    database.insert(3)  # NULL: not downloaded
    source = open_table(database, source_predicate="is_downloaded AND NOT platform = 'other'")
    assert [row.video.record_id for row in source.rows(IdRange(1, 9))] == [1]
    assert (source.count(), source.extent()) == (1, (1, 1))


def test_a_template_builds_the_uri_from_columns(database):
    database.create(ids=(7,))
    source = open_table(database, source_uri_template="s3://bucket/{platform}/{code}/video.mp4")
    assert next(source.rows(IdRange(7, 7))).video.uri == "s3://bucket/tube/c7/video.mp4"


def test_a_row_whose_path_is_null_has_an_empty_uri(database):
    database.create()
    database.insert(1, path=None)
    assert next(open_table(database).rows(IdRange(1, 1))).video.uri == ""


def test_payload_and_version_columns_are_carried(database):
    database.create()
    database.insert(1, size_bytes=12, updated_at=datetime(2025, 1, 31, 12, 0, 0, 250000))
    source = open_table(database, source_payload_columns=("size_bytes",), source_version_column="updated_at")
    row = next(source.rows(IdRange(1, 1)))
    assert (row.video.payload, row.video.content_version) in (
        ({"size_bytes": 12}, "2025-01-31 12:00:00.25"),
        ({"size_bytes": 12}, "2025-01-31 12:00:00.250000"),
    )


def test_a_batch_ends_at_the_id_of_its_last_record(database):
    database.create(ids=(1, 2, 50, 51, 99))
    source = open_table(database)
    assert source.batch_end(None, 3) == (1, 50, True)
    assert source.batch_end(50, 3) == (51, 99, False)
    assert source.batch_end(99, 3) is None


def test_marking_sets_one_column_of_the_named_rows_alone(database):
    database.create(ids=(1, 2, 3))
    source = open_table(database)
    with database.engine.begin() as connection:
        assert source.mark(connection, {1: "", 3: ""}, step="embedded") == {1: ("", ""), 3: ("", "")}
    marks = database.rows("SELECT id, is_extracted, is_embedded FROM insta_content ORDER BY id")
    assert [tuple(map(int, row)) for row in marks] == [(1, 0, 1), (2, 0, 0), (3, 0, 1)]


def test_a_row_that_changed_since_it_was_read_is_not_marked(database):
    database.create()
    database.insert(1, 2, updated_at=datetime(2025, 1, 1))
    source = open_table(database, source_version_column="updated_at")
    versions = {row.video.record_id: row.video.content_version for row in source.rows(IdRange(1, 2))}
    database.execute("UPDATE insta_content SET updated_at = :at WHERE id = 2", at=datetime(2025, 1, 2))
    with database.engine.begin() as connection:
        assert source.mark(connection, versions, step="embedded") == {1: (versions[1], versions[1])}
    assert [bool(row[0]) for row in database.rows("SELECT is_embedded FROM insta_content ORDER BY id")] == [True, False]


def test_a_missing_table_names_the_one_that_may_be_meant(database):
    database.create()
    with pytest.raises(
        SourceTableError, match=r"'insta_contents' can't be used: there is no such table.*'insta_content'"
    ):
        open_table(database, source_table="insta_contents")


def test_a_missing_column_names_the_one_that_may_be_meant(database):
    database.create()
    with pytest.raises(
        SourceTableError, match=r"no column 'pathh'. Set EXTRACTION_SOURCE_URI_COLUMN to 'path', perhaps"
    ):
        open_table(database, source_uri_column="pathh")


@pytest.mark.parametrize(
    ("column", "refusal"),
    [
        (sa.Column("id", sa.Text, primary_key=True), r"is of type TEXT, expected an integer.*GENERATED ALWAYS"),
        (sa.Column("id", sa.Uuid, primary_key=True), r"expected an integer.*ADD COLUMN extraction_id BIGINT"),
        (sa.Column("id", sa.BigInteger, nullable=False), r"is not declared unique. CREATE UNIQUE INDEX .*ON"),
        (sa.Column("id", sa.BigInteger, unique=True), r"may be NULL. ALTER TABLE"),
    ],
)
def test_an_id_column_that_can_not_identify_records_is_refused(database, column, refusal):
    database.create(column, sa.Column("path", sa.Text))
    with pytest.raises(SourceTableError, match=refusal):
        open_table(database)


@pytest.mark.parametrize("name", ["insta_content", "Insta Content"])
def test_the_sql_that_a_table_of_uuids_gets_makes_it_usable(postgres_url, make_database, settings, name):
    database = make_database(postgres_url, settings)
    database.create(sa.Column("id", sa.Uuid, primary_key=True), *_columns(), name=name)
    database.execute(f"INSERT INTO \"{name}\" (id, path) VALUES (gen_random_uuid(), 'a'), (gen_random_uuid(), 'b')")
    with pytest.raises(SourceTableError, match="then set EXTRACTION_SOURCE_ID_COLUMN=extraction_id") as refused:
        open_table(database, source_table=name)
    for statement in re.findall(r"(?:ALTER TABLE|CREATE UNIQUE INDEX)[^;]*;", str(refused.value)):
        database.execute(statement)
    assert open_table(database, source_table=name, source_id_column="extraction_id").extent() == (1, 2)


@pytest.mark.parametrize("name", ["insta_content", "Insta Content"])
def test_the_sql_that_an_id_gets_which_is_not_unique_makes_it_usable(database, name):
    database.create(sa.Column("Id", sa.BigInteger, nullable=False), *_columns(), name=name)
    database.execute(f'INSERT INTO "{name}" ("Id", path) VALUES (7, \'a\')')
    with pytest.raises(SourceTableError, match="is not declared unique") as refused:
        open_table(database, source_table=name, source_id_column="Id")
    (statement,) = re.findall(r"CREATE UNIQUE INDEX .*?(?=, or set)", str(refused.value))
    database.execute(statement)
    assert open_table(database, source_table=name, source_id_column="Id").extent() == (7, 7)


def test_an_index_over_some_rows_only_does_not_make_an_id_unique(database):
    database.create(sa.Column("id", sa.BigInteger, nullable=False), sa.Column("path", sa.Text))
    database.execute("CREATE UNIQUE INDEX part ON insta_content (id) WHERE path IS NOT NULL")
    with pytest.raises(SourceTableError, match="not declared unique"):
        open_table(database)


def test_a_unique_index_makes_an_id_column_good_enough(database):
    columns = [column for column in _columns() if column.name != "id"]
    database.create(sa.Column("id", sa.BigInteger, nullable=False), *columns)
    database.execute("CREATE UNIQUE INDEX whole ON insta_content (id)")
    database.insert(4)
    assert open_table(database).extent() == (4, 4)


def test_a_view_is_taken_at_its_word(database):
    database.create(ids=(1, 2))
    database.execute("CREATE VIEW good AS SELECT * FROM insta_content WHERE id > 1")
    assert open_table(database, source_table="good").extent() == (2, 2)


def test_a_mark_column_that_is_not_boolean_is_refused(database):
    database.create()
    with pytest.raises(SourceTableError, match="mark column 'size_bytes' is of type BIGINT, expected BOOLEAN"):
        open_table(database, source_embedded_column="size_bytes")


@pytest.mark.parametrize("template", ["s3://bucket/video.mp4", "{code!r}", "{code:>10}", "{code", "{}"])
def test_a_template_that_does_more_than_name_columns_is_refused(sqlite_database, template):
    sqlite_database.create()
    with pytest.raises(SourceTableError, match="URI_TEMPLATE"):
        open_table(sqlite_database, source_uri_template=template)


def test_a_template_can_not_reach_into_an_object(sqlite_database):
    sqlite_database.create()
    with pytest.raises(SourceTableError, match=r"it has no column 'code.__class__'"):
        open_table(sqlite_database, source_uri_template="{code.__class__}")


def test_a_database_that_can_not_be_reached_is_named_without_its_password(settings):
    engine = make_engine("postgresql://me:s3cret@127.0.0.1:1/db?sslmode=disable", setting="EXTRACTION_SOURCE_URL")
    with pytest.raises(SourceUnreachableError, match=r"at postgresql\+psycopg2://127.0.0.1:1/db: .*refused") as caught:
        SourceTable(engine, settings())
    assert "s3cret" not in str(caught.value)


def test_a_file_that_is_no_database_is_named(tmp_path, settings):
    (tmp_path / "notes.txt").write_text("Rows of videos are kept elsewhere.\n" * 100)
    engine = make_engine(f"sqlite:///{tmp_path}/notes.txt", setting="EXTRACTION_SOURCE_URL")
    with pytest.raises(SourceUnreachableError, match=r"at sqlite:///.*/notes.txt: file is not a database"):
        SourceTable(engine, settings())


@pytest.mark.parametrize("url", ["", "nonsense", "postgresql//me:s3cret@host"])
def test_a_malformed_url_is_refused_without_showing_it(url):
    with pytest.raises(
        DatabaseUrlError, match=r"EXTRACTION_SOURCE_URL is not a database URL.*value not shown"
    ) as caught:
        make_engine(url, setting="EXTRACTION_SOURCE_URL")
    assert "s3cret" not in str(caught.value)


def test_a_driver_that_is_not_installed_is_named():
    with pytest.raises(DatabaseUrlError, match="names the driver 'oracle"):
        make_engine("oracle+nothing://h/db", setting="EXTRACTION_SOURCE_URL")


def test_a_bare_postgresql_url_means_psycopg2():
    assert describe(parse_url("postgresql://me:pw@h/db", setting="X")) == "postgresql+psycopg2://h/db"


def test_two_tables_have_two_identities_and_a_password_changes_nothing(database):
    database.create()
    database.create(name="other")
    one, two = open_table(database), open_table(database, source_table="other")
    assert len(one.identity) == 16
    assert one.identity != two.identity
    assert one.identity == open_table(database).identity


def _columns():
    return [
        sa.Column("platform", sa.Text),
        sa.Column("code", sa.Text),
        sa.Column("path", sa.Text),
        sa.Column("is_extracted", sa.Boolean),
        sa.Column("is_embedded", sa.Boolean),
    ]
