"""A table of tiny real videos."""

import shutil

import pytest


@pytest.fixture(scope="session")
def clips(tmp_path_factory, small_clips):
    """A folder with 1.mp4 and 2.mp4; read it only."""
    folder = tmp_path_factory.mktemp("clips")
    for number, name in enumerate(("b", "c"), 1):
        shutil.copy(small_clips / f"{name}.mp4", folder / f"{number}.mp4")
    return folder


@pytest.fixture
def make_settings(sqlite_database, clips):
    """Settings of a table whose rows 1 and 2 are good videos and row 3 is a file that is missing."""
    sqlite_database.create(ids=(1, 2, 3))

    def make(**overrides):
        return sqlite_database.settings(**{"allowed_roots": (str(clips),), "decode_workers": 1, **overrides})

    sqlite_database.execute("UPDATE insta_content SET path = :folder || '/' || path", folder=str(clips))
    return make
