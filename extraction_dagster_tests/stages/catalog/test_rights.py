"""Rights, policies, rules and triggers of a real PostgreSQL: what a user may not do is told before any work."""

import re
import uuid

import pytest
import sqlalchemy as sa

from extraction_dagster.errors.catalog import MarksRefusedError, RightsError
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.catalog import Catalog, Fingerprints
from extraction_dagster.stages.catalog.indexing import make_pending_index
from extraction_dagster.stages.catalog.rights import require_rights

TODAY, ALL = Fingerprints("f1", "e1"), IdRange(1, 9)


@pytest.fixture
def owner(postgres_url, make_database, settings):
    """The videos table with the rows 1 and 2, for its owner."""
    database = make_database(postgres_url, settings)
    database.create(ids=(1, 2))
    database.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    yield database
    database.engine.dispose()


@pytest.fixture
def role(owner):
    """A role that may log in and nothing else."""
    name = f"worker_{uuid.uuid4().hex[:8]}"
    owner.execute(f"CREATE ROLE {name} LOGIN")
    yield name
    owner.execute(f"DROP OWNED BY {name}")
    owner.execute(f"DROP ROLE {name}")


@pytest.fixture
def worker(owner, role, make_database, settings):
    """The same database for the role."""
    url = sa.make_url(owner.url).set(username=role).render_as_string(hide_password=False)
    database = make_database(url, settings)
    yield database
    database.engine.dispose()


def run_grants(owner, message):
    """Run the statements that a message proposes; returns them."""
    grants = re.findall(r"GRANT [^;]+;", message)
    for grant in grants:
        owner.execute(grant)
    return grants


def test_each_missing_right_is_told_as_the_grant_that_gives_it(owner, worker, role):
    told = []
    for _ in range(2):  # who may not read is not asked for more
        with pytest.raises(RightsError, match=r"EXTRACTION_STATE_URL.*EXTRACTION_SOURCE_READ_ONLY=true") as refused:
            require_rights(worker.settings())
        assert "\n" not in str(refused.value)
        told += run_grants(owner, str(refused.value))
    assert told == [
        f"GRANT SELECT ON insta_content TO {role};",
        f"GRANT UPDATE (is_extracted) ON insta_content TO {role};",
        f"GRANT UPDATE (is_embedded) ON insta_content TO {role};",
        f"GRANT CREATE, USAGE ON SCHEMA public TO {role};",
    ]
    require_rights(worker.settings())
    catalog = worker.catalog()
    plan = catalog.begin(ALL, TODAY)
    assert catalog.mark_done(plan, {1: 3, 2: 3}, TODAY) == {1, 2}
    catalog.close()


def test_who_writes_the_state_tables_elsewhere_and_never_the_source_only_reads(owner, worker, role, tmp_path):
    elsewhere = {"state_url": f"sqlite:///{tmp_path}/state.db", "source_read_only": True}
    with pytest.raises(RightsError, match="SELECT from insta_content") as told:
        require_rights(worker.settings(**elsewhere))
    assert run_grants(owner, str(told.value)) == [f"GRANT SELECT ON insta_content TO {role};"]
    require_rights(worker.settings(**elsewhere))


def test_rights_on_state_tables_that_are_there_are_asked_one_by_one(owner, worker, role):
    owner.catalog().close()
    owner.execute(f"GRANT SELECT, UPDATE ON ALL TABLES IN SCHEMA public TO {role}")
    with pytest.raises(RightsError, match="INSERT, DELETE on extraction_ledger") as told:
        require_rights(worker.settings())
    assert f"GRANT INSERT, DELETE ON public.extraction_ledger TO {role};" in run_grants(owner, str(told.value))
    require_rights(worker.settings())


def test_a_schema_that_may_not_be_used_is_named(owner, worker, role):
    owner.execute("CREATE SCHEMA media")
    with pytest.raises(RightsError, match="no right to use schema media") as told:
        require_rights(worker.settings(source_schema="media"))
    assert f"GRANT USAGE ON SCHEMA media TO {role};" in str(told.value)


def test_an_index_that_the_user_may_not_make_is_told_with_its_statement(owner, worker, role):
    owner.execute(f"GRANT SELECT, UPDATE ON insta_content TO {role}")
    owner.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
    catalog = worker.catalog()
    made = make_pending_index(catalog.source, catalog.source_engine)
    assert made.state == "refused"
    assert made.sql.startswith("CREATE INDEX CONCURRENTLY extraction_pending_insta_content ON insta_content (id) WHERE")
    owner.execute(f"GRANT {role} TO CURRENT_USER")
    catalog.close()


SILENT = {
    "policy": (
        "ALTER TABLE insta_content ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY sees ON insta_content FOR SELECT USING (true)",
    ),
    "rule": ("CREATE RULE keep AS ON UPDATE TO insta_content DO INSTEAD NOTHING",),
    "trigger": (
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "CREATE TRIGGER keep BEFORE UPDATE ON insta_content FOR EACH ROW EXECUTE FUNCTION keep()",
    ),
    "trigger that puts it back": (
        (
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN NEW.is_extracted = OLD.is_extracted; NEW.is_embedded = OLD.is_embedded; RETURN NEW; END'"
        ),
        "CREATE TRIGGER keep BEFORE UPDATE ON insta_content FOR EACH ROW EXECUTE FUNCTION keep()",
    ),
    "view": (
        "ALTER TABLE insta_content RENAME TO stored",
        "CREATE VIEW insta_content AS SELECT * FROM stored",
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "CREATE TRIGGER keep INSTEAD OF UPDATE ON insta_content FOR EACH ROW EXECUTE FUNCTION keep()",
    ),
}


@pytest.mark.parametrize("how", SILENT)
def test_marks_that_the_database_keeps_back_in_silence_are_seen_before_any_work(how, owner, worker, role):
    for statement in SILENT[how]:
        owner.execute(statement)
    owner.execute(f"GRANT SELECT, UPDATE ON insta_content TO {role}")
    owner.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
    catalog = worker.catalog()
    with pytest.raises(MarksRefusedError, match=r"a row-level security policy, a rule, a trigger") as told:
        catalog.begin(ALL, TODAY)
    assert told.value.permanent
    assert "'is_extracted' of records 1 in 'insta_content'" in str(told.value)
    assert catalog.ledger.entries(ALL) == {}
    catalog.close()


def test_marks_that_are_kept_back_only_later_end_the_step_and_nothing_is_taken_for_done(owner, worker, role):
    owner.execute(f"GRANT SELECT, UPDATE ON insta_content TO {role}")
    owner.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
    catalog = worker.catalog()
    plan = catalog.begin(ALL, TODAY)
    owner.execute("CREATE RULE keep AS ON UPDATE TO insta_content WHERE NEW.id = 2 DO INSTEAD NOTHING")
    with pytest.raises(MarksRefusedError, match="'is_embedded' of records 2 in"):
        catalog.mark_done(plan, {1: 3, 2: 3}, TODAY)
    assert owner.rows("SELECT id FROM insta_content WHERE is_embedded") == []
    assert {entry.state for entry in catalog.ledger.entries(ALL).values()} == {"todo"}
    catalog.close()


def test_marks_that_can_not_be_cleared_are_told(owner):
    catalog = owner.catalog()
    catalog.mark_done(catalog.begin(ALL, TODAY), {1: 3, 2: 3}, TODAY)
    owner.execute("UPDATE insta_content SET is_extracted = true")
    owner.execute("CREATE RULE keep AS ON UPDATE TO insta_content DO INSTEAD NOTHING")
    with pytest.raises(MarksRefusedError, match="of records 1 in"):
        catalog.make_pending([1])
    with pytest.raises(MarksRefusedError, match="of records"):
        catalog.reprocess_after(0)
    catalog.close()


def test_a_rehearsal_leaves_the_row_as_it_was(database):
    database.create(ids=(1,))
    catalog = database.catalog()
    catalog.source.rehearse(1)
    assert database.rows("SELECT is_extracted, is_embedded FROM insta_content") in ([(0, 0)], [(False, False)])
    catalog.close()


def test_a_standby_that_takes_no_writes_is_told_as_a_missing_right(owner, role, make_database, settings):
    owner.execute(f"GRANT ALL ON insta_content TO {role}")
    owner.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
    owner.execute(f"ALTER ROLE {role} SET default_transaction_read_only = on")
    url = sa.make_url(owner.url).set(username=role).render_as_string(hide_password=False)
    with pytest.raises(RightsError, match=r"Cannot create the state tables at .* read-only transaction"):
        Catalog(make_database(url, settings).settings())
