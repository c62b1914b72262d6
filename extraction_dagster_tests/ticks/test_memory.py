"""What ticks remember survives the process: a daemon loads its code anew each minute."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.database import STATE_SCHEMA
from extraction_dagster.stages.catalog.state_tables import METADATA
from extraction_dagster.ticks.memory import Memory, recall, remember
from extraction_dagster.ticks.places import History, Patience

MEMORY = Memory(
    patience=Patience(
        {"tail": datetime(2025, 1, 31, 12, 0, 1, 500, UTC)},
        {IdRange(-5, -1): History(3, datetime(2025, 1, 31, 12, 0, 1, 500, UTC))},
    ),
    ticks=7,
    sweep_after_id=-3,
    sweep_found_rows=True,
    window_after_id=4,
    ahead_after_id=5,
    address_after_id=6,
)

IN_NO_SCHEMA = {"schema_translate_map": {STATE_SCHEMA: None}}


@pytest.fixture
def engine(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/state.db", poolclass=sa.NullPool, execution_options=IN_NO_SCHEMA)
    METADATA.create_all(engine)
    return engine


def test_a_new_process_remembers_what_the_last_tick_left(engine):
    assert recall(engine) == Memory()
    remember(engine, Memory(ticks=1))
    remember(engine, MEMORY)
    assert recall(engine) == MEMORY


def test_two_daemons_that_keep_something_at_once_do_not_disturb_each_other(database):
    engine = database.engine.execution_options(**IN_NO_SCHEMA)
    METADATA.create_all(engine)

    def keep(number):
        for ticks in range(50):
            remember(engine, Memory(ticks=100 * number + ticks))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(keep, range(4))) == [None] * 4
    assert recall(engine).ticks in {49, 149, 249, 349}


def test_what_an_earlier_release_left_is_still_read():
    text = '{"since": {"ahead": "2025-01-31T12:00:00+00:00"}, "ticks": 7, "after": -3, "again": true}'
    patience = Patience({"ahead": datetime(2025, 1, 31, 12, tzinfo=UTC)})
    assert Memory.from_json(text) == Memory(patience, ticks=7, sweep_after_id=-3, sweep_found_rows=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"since": 1, "ticks": 1, "after": null, "again": false}',
        '{"since": {"tail": "soon"}, "ticks": 1, "after": null, "again": false}',
        '{"since": {}, "ticks": null, "after": null, "again": false}',
        '{"since": {}, "ticks": 1, "after": null, "again": false, "window_after": "x"}',
        '{"since": {}, "ticks": 1, "after": null, "again": false, "failing": {"one": [1, "2025-01-31T12:00:00"]}}',
        '{"since": {}, "ticks": 1, "after": null, "again": false, "failing": {"1-3": [1]}}',
    ],
)
def test_what_can_not_be_read_is_forgotten(text):
    assert Memory.from_json(text) == Memory()
