"""Which source it is: equal addresses, moved databases, empty trials, several tables in one database."""

import os

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.errors.catalog import DatabaseUrlError, StateError
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.catalog import Catalog, Fingerprints
from extraction_dagster.stages.catalog.database import make_engine
from extraction_dagster.stages.catalog.identity import SourceMark, is_same_database, source_identity
from extraction_dagster.stages.catalog.state_tables import state_version

TODAY, ALL = Fingerprints("f1", "e1"), IdRange(1, 9)


def mark(settings, url, **others):
    return source_identity(settings(source_url=SecretStr(url), **others))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("postgresql://db/v", "postgresql://db:5432/v"),
        ("postgresql://DB.Example/v", "postgresql://db.example/v"),
        ("postgresql://a:b@db/v?sslmode=require", "postgresql+psycopg2://c@db/v"),
        ("sqlite:///source.db", "sqlite:///{here}/source.db"),
        ("sqlite:///./a/../source.db", "sqlite:///{here}/source.db"),
    ],
)
def test_one_address_written_in_two_ways_is_one_source(one, other, settings, tmp_path):
    other = other.format(here=tmp_path)
    assert mark(settings, one) == mark(settings, other)
    assert str(mark(settings, one)) == str(mark(settings, other))
    assert mark(settings, one) != mark(settings, other, source_table="more")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("postgresql://db/v", "postgresql://db:5433/v"),
        ("postgresql://db/v", "postgresql://db2/v"),
        ("postgresql://db/v", "postgresql://db/V"),
        ("sqlite:///a.db", "sqlite:///b.db"),
    ],
)
def test_other_addresses_are_other_sources(one, other, settings):
    assert mark(settings, one) != mark(settings, other)


def test_marks_that_an_earlier_release_made_of_the_address_as_it_was_written_still_count(settings):
    assert mark(settings, "postgresql://DB:5432/v") == "2ee5341e86531be3"  # of postgresql+psycopg2://DB:5432/v
    assert str(mark(settings, "postgresql://DB:5432/v")) != "2ee5341e86531be3"
    former = SourceMark("a" * 16, ["b" * 16])
    assert former == "b" * 16
    assert "b" * 16 == former  # noqa: SIM300 - the other way round is the point
    assert former != "c" * 16
    assert not former != "b" * 16  # noqa: SIM202 - as above


def test_two_urls_of_one_database_are_one_and_those_of_two_users_are_two(tmp_path):
    os.chdir(tmp_path)
    assert is_same_database("sqlite:///a.db", f"sqlite:///{tmp_path}/a.db")
    assert is_same_database("postgresql://u:x@DB/v", "postgresql://u:x@db:5432/v")
    assert not is_same_database("postgresql://u:x@db/v", "postgresql://w:x@db/v")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@ss:canary@host/db",
        "postgresql://u:p@canary@host/db",
        "postgresql://u:p@canary/x@host/db",
        "postgresql://u:canary@host:port/db",
        "postgresql://u:canary@host:99999/db",
        "canary",
    ],
)
def test_a_url_in_which_part_of_a_password_could_be_taken_for_another_part_is_never_shown(url, settings):
    with pytest.raises(DatabaseUrlError, match="Setting EXTRACTION_SOURCE_URL") as told:
        Catalog(settings(source_url=SecretStr(url)))
    assert "canary" not in str(told.value)
    assert "ss" not in str(told.value).replace("PASSWORD", "").replace("password", "").replace("psycopg", "")


def moved(database, tmp_path):
    """The same SQLite database in another folder: its settings there."""
    database.engine.dispose()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "source.db").rename(tmp_path / "elsewhere" / "moved.db")
    return database.settings(source_url=SecretStr(f"sqlite:///{tmp_path}/elsewhere/moved.db"))


def test_a_database_that_moved_goes_on_where_it_was_once_it_is_taken_over(sqlite_database, tmp_path):
    sqlite_database.create(ids=(1, 2))
    catalog = sqlite_database.catalog()
    before = catalog.source.identity
    catalog.mark_done(catalog.begin(ALL, TODAY), {1: 3}, TODAY)
    catalog.close()
    there = moved(sqlite_database, tmp_path)
    with pytest.raises(StateError, match=r"belong to table 'insta_content' in sqlite:.*source\.db.*init --take-over"):
        Catalog(there)
    for _ in range(2):
        catalog = Catalog(there, takes_over=True)
        assert catalog.source.identity == before
        assert catalog.ledger.counts() == {"done": 1, "todo": 1}
        catalog.close()
    Catalog(there).close()


def test_another_table_is_not_taken_over(sqlite_database, tmp_path):
    sqlite_database.create(ids=(1, 2))
    catalog = sqlite_database.catalog()
    catalog.begin(ALL, TODAY)
    catalog.close()
    sqlite_database.execute("UPDATE insta_content SET id = id + 100")
    with pytest.raises(StateError, match=r"has none of the first 2.*It is another table: nothing was changed"):
        Catalog(moved(sqlite_database, tmp_path), takes_over=True)


def test_an_empty_trial_is_let_go_of(sqlite_database, caplog):
    sqlite_database.create(ids=(1,))
    sqlite_database.create(name="videos")
    sqlite_database.catalog(source_table="videos").close()
    catalog = sqlite_database.catalog()
    assert "The state tables of a trial, in which no record was begun, are now those of table 'insta_" in caplog.text
    catalog.begin(ALL, TODAY)
    catalog.close()
    with pytest.raises(StateError, match=r"belong to table 'insta_content' in sqlite.*, not to table 'videos' in"):
        sqlite_database.catalog(source_table="videos")


def test_two_tables_of_one_database_keep_their_state_in_a_schema_each(postgres_url, make_database, settings):
    database = make_database(postgres_url, settings)
    database.create(ids=(1, 2))
    database.create(name="more")
    database.execute("INSERT INTO more (id, path) VALUES (1, 'a.mp4')")
    first, second = database.catalog(state_schema="first"), database.catalog(source_table="more", state_schema="second")
    first.mark_done(first.begin(ALL, TODAY), {1: 3}, TODAY)
    second.begin(ALL, TODAY)
    assert (first.ledger.counts(), second.ledger.counts()) == ({"done": 1, "todo": 1}, {"todo": 1})
    assert first.one_database
    assert sa.inspect(database.engine).get_table_names() == ["insta_content", "more"]
    assert "extraction_ledger" in sa.inspect(database.engine).get_table_names("second")
    first.close()
    second.close()
    with pytest.raises(StateError, match=r"schema first belong to table 'insta_content' in .*EXTRACTION_STATE_SCHEMA"):
        database.catalog(source_table="more", state_schema="first")
    database.engine.dispose()


def test_state_tables_in_a_schema_are_migrated_there(postgres_url, make_database, settings):
    database = make_database(postgres_url, settings)
    database.create(ids=(1,))
    database.catalog(state_schema="mine").close()
    database.execute("UPDATE mine.extraction_meta SET value = '2' WHERE key = 'state_version'")
    database.execute("DROP TABLE mine.extraction_gone")
    for column in ("claim", "claimed_by", "address", "generation"):
        database.execute(f"ALTER TABLE mine.extraction_ledger DROP COLUMN {column}")
    catalog = database.catalog(state_schema="mine")
    assert state_version(catalog.state_engine) == 3
    catalog.begin(ALL, TODAY)
    catalog.close()
    database.engine.dispose()


def test_what_only_looks_makes_no_file_and_no_table(sqlite_database, tmp_path):
    sqlite_database.create(ids=(1,))
    elsewhere = {"state_url": f"sqlite:///{tmp_path}/state.db"}
    Catalog(sqlite_database.settings(**elsewhere), creates=False).close()
    Catalog(sqlite_database.settings(), creates=False).close()
    assert not (tmp_path / "state.db").exists()
    assert sa.inspect(sqlite_database.engine).get_table_names() == ["insta_content"]
    engine = make_engine(f"sqlite:///{tmp_path}/none.db", setting="EXTRACTION_STATE_URL")
    assert state_version(engine) is None
    assert not (tmp_path / "none.db").exists()
