"""Signs of life of runs, by the database's clock."""

import time

from extraction_dagster.stages.catalog.signs import forget_sign, give_sign, signs_of_life, silences


def age(database, run_id, seconds):
    moment = f"CAST(value AS BIGINT) - {seconds}"
    database.execute(
        f"UPDATE extraction_meta SET value = CAST({moment} AS TEXT) WHERE key = :key", key=f"alive:{run_id}"
    )


def test_silence_is_counted_from_the_last_sign(database):
    database.create()
    catalog = database.catalog()
    give_sign(catalog.state_engine, "one")
    give_sign(catalog.state_engine, "two")
    age(database, "two", 400)
    silent = silences(catalog.state_engine)
    assert 0 <= silent["one"] < 60
    assert 400 <= silent["two"] < 460
    give_sign(catalog.state_engine, "two")
    assert silences(catalog.state_engine)["two"] < 60
    forget_sign(catalog.state_engine, "two")
    assert set(silences(catalog.state_engine)) == {"one"}
    catalog.close()


def test_signs_are_given_while_a_block_lasts_and_end_with_it(database):
    database.create()
    catalog = database.catalog()
    with signs_of_life(catalog.state_engine, "run", dead_after_seconds=1.0):
        age(database, "run", 500)
        until = time.monotonic() + 30
        while silences(catalog.state_engine)["run"] > 100 and time.monotonic() < until:
            time.sleep(0.05)
        assert silences(catalog.state_engine)["run"] < 100
    assert silences(catalog.state_engine) == {}
    catalog.close()


def test_what_killed_runs_left_long_ago_is_removed_by_a_later_one(database):
    database.create()
    catalog = database.catalog()
    give_sign(catalog.state_engine, "killed")
    age(database, "killed", 8 * 86_400)
    with signs_of_life(catalog.state_engine, "later", dead_after_seconds=300):
        assert set(silences(catalog.state_engine)) == {"later"}
    catalog.close()
