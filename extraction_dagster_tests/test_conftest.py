"""The fixtures and the guard against rotten skips."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

CONFTEST = Path(__file__).with_name("conftest.py")
PYPROJECT = CONFTEST.parents[1] / "pyproject.toml"
CASES = """
import pytest

@pytest.mark.slow
def test_marked():
    pytest.skip("no time")

def test_unmarked():
    pytest.skip("not here")

@pytest.mark.slow
@pytest.mark.xfail(reason="known")
def test_known():
    assert False
"""


@pytest.fixture
def run_pytest(commands):
    """`run_pytest(folder, text, "slow")`: a session of its own over one file, with this project's conftest."""

    def run_pytest(folder, text, required):
        for path in CONFTEST.parent.glob("*.py"):
            if not path.name.startswith("test_"):
                shutil.copy(path, folder)
        (folder / "test_it.py").write_text(text)
        (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: takes long\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
        env = {**os.environ, "EXTRACTION_TEST_REQUIRE": required, "PYTEST_ADDOPTS": ""}
        return commands.run(command, cwd=folder, env=env)

    return run_pytest


def test_without_the_variable_a_skip_is_a_skip(run_pytest, tmp_path):
    done = run_pytest(tmp_path, CASES, "")
    assert (done.returncode, "2 skipped, 1 xfailed" in done.stdout) == (0, True), done.stdout


def test_a_required_marker_turns_its_own_skip_into_a_failure(run_pytest, tmp_path):
    done = run_pytest(tmp_path, CASES, "slow")
    assert (done.returncode, "1 failed, 1 skipped, 1 xfailed" in done.stdout) == (1, True), done.stdout
    assert "skipped, but EXTRACTION_TEST_REQUIRE names slow: Skipped: no time" in done.stdout


def test_where_a_marker_is_required_no_module_skips_as_a_whole(run_pytest, tmp_path):
    done = run_pytest(tmp_path, "import pytest\npytest.skip('all', allow_module_level=True)\n", "slow")
    assert done.returncode == 2, done.stdout
    assert "test_it.py skips as a whole, so its markers can't be seen" in done.stdout


def test_a_required_marker_that_does_not_exist_is_a_usage_error(run_pytest, tmp_path):
    done = run_pytest(tmp_path, CASES, "slow,brwoser")
    assert (done.returncode, "names brwoser, which is no marker of this project" in done.stderr) == (4, True)


def test_a_test_that_hangs_is_ended_and_shows_where_it_stands(tmp_path):
    (tmp_path / "test_it.py").write_text("import threading\ndef test_hang():\n    threading.Event().wait()\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(PYPROJECT), "test_it.py"]
    done = subprocess.run(
        [*command, "-o", "faulthandler_timeout=1"],  # of the project's settings, the time alone is another
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, "in test_hang" in done.stderr) == (1, True), done.stdout + done.stderr


@pytest.mark.parametrize("variable", ["EXTRACTION_HOME", "EXTRACTION_QDRANT_URL", "DAGSTER_HOME"])
def test_no_test_sees_a_developers_environment(variable, tmp_path):
    assert variable not in os.environ
    assert Path.cwd() == tmp_path


def test_settings_live_in_the_tests_own_folder(settings, tmp_path):
    assert (settings().home, settings(batch_size=2).batch_size) == (tmp_path, 2)


@pytest.mark.parametrize("_turn", [1, 2])
def test_each_test_has_an_empty_postgresql_of_its_own(postgres_url, _turn):
    engine = sa.create_engine(postgres_url)
    with engine.begin() as connection:
        assert connection.scalar(sa.text("SELECT version()")).startswith("PostgreSQL 18")
        connection.execute(sa.text("CREATE TABLE only_here (id int)"))
    engine.dispose()


def test_the_demos_videos_are_there(demo_folder, demo_videos):
    assert {(demo_folder / video.path).is_file() for video in demo_videos} == {True}
