"""The operator's predicate: what it may say, and that nothing else gets through."""

import pytest
import sqlalchemy as sa

from extraction_dagster.errors.catalog import PredicateError
from extraction_dagster.stages.catalog.source_columns import build_predicate

VIDEOS = sa.Table(
    "videos",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("platform", sa.Text),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("is_downloaded", sa.Boolean),
    sa.Column("is_removed", sa.Boolean),
)
ROWS = [
    {"id": 1, "platform": "a", "size_bytes": 10, "is_downloaded": True, "is_removed": False},
    {"id": 2, "platform": "b", "size_bytes": 99, "is_downloaded": True, "is_removed": True},
    {"id": 3, "platform": None, "size_bytes": None, "is_downloaded": None, "is_removed": None},
    {"id": 4, "platform": "it's", "size_bytes": -5, "is_downloaded": False, "is_removed": None},
]


@pytest.fixture(scope="module")
def connection():
    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection:
        VIDEOS.create(connection)
        connection.execute(sa.insert(VIDEOS), ROWS)
        yield connection
    engine.dispose()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("is_downloaded", [1, 2]),
        ("is_downloaded AND NOT is_removed", [1]),
        ("NOT is_downloaded", [3, 4]),
        ("NOT is_removed", [1, 3, 4]),
        ("platform = 'a' OR platform = 'it''s'", [1, 4]),
        ("platform IN ('a', 'b')", [1, 2]),
        ("platform IS NULL", [3]),
        ("platform IS NOT NULL AND (size_bytes < 50 AND size_bytes >= -5)", [1, 4]),
        ("size_bytes <> 10", [2, 4]),
        ("size_bytes > 9.5", [1, 2]),
        ("is_downloaded = TRUE", [1, 2]),
        ("size_bytes BETWEEN -5 AND 10", [1, 4]),
        ("NOT size_bytes BETWEEN -5 AND 10", [2]),
        ("platform LIKE 'i_''%'", [4]),
        ("platform NOT LIKE 'i%'", [1, 2]),
        ("NOT platform LIKE 'i%'", [1, 2]),
        ("platform ILIKE 'A' OR platform NOT ILIKE '%'", [1]),
        ("platform LIKE '%!''%' ESCAPE '!'", [4]),
    ],
)
def test_a_predicate_selects_the_rows_that_it_says(connection, text, ids):
    query = sa.select(VIDEOS.c.id).where(build_predicate(text, VIDEOS)).order_by(VIDEOS.c.id)
    assert list(connection.execute(query).scalars()) == ids


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("is_downloadd", "the table has no column is_downloadd"),
        ("other.id = 1", "the table has no column other.id"),
        ("platform", "column platform is not boolean"),
        ("1 = 1; DROP TABLE videos", "no boolean expression"),
        ("id = (SELECT max(id) FROM videos)", "is not a column, number, text"),
        ("id IN (SELECT id FROM videos)", "is not allowed"),
        ("pg_sleep(10) = 1", "is not a column, number, text"),
        ("platform LIKE 5", "LIKE takes a text, not 5"),
        ("size_bytes LIKE '1%'", "LIKE is for texts, and size_bytes is of type BIGINT"),
        ("size_bytes BETWEEN SYMMETRIC 9 AND 1", "is not allowed"),
        ("platform LIKE 'a' ESCAPE 'no'", "ESCAPE takes one character"),
        ("platform LIKE platform", "is not a column, number, text"),
        ("platform SIMILAR TO 'a%'", "is not allowed"),
        ("is_downloaded AND", "no boolean expression"),
        ("", "no boolean expression"),
        ("id = 1 -- comment' \n; DELETE FROM videos", "no boolean expression"),
    ],
)
def test_anything_else_is_refused_and_the_columns_are_named(text, why):
    with pytest.raises(PredicateError, match=why) as caught:
        build_predicate(text, VIDEOS)
    assert "id, is_downloaded, is_removed, platform, size_bytes" in str(caught.value)


def test_literals_become_bound_parameters():
    compiled = build_predicate("platform = 'x'' OR 1=1 --'", VIDEOS).compile()
    assert list(compiled.params.values()) == ["x' OR 1=1 --"]
