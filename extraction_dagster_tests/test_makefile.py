"""The Makefile's own logic, with a Python that only writes down what it was asked to do."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE_PYTHON = """#!/bin/bash
echo "$*" >> "{log}"
case "$*" in
  *version_info*) {version} ;;
  "-m venv --clear "*) mkdir -p .venv/bin; cp "{fake}" .venv/bin/python ;;
  *"install"*) [ ! -e fail ] ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.cfg", "constraints.txt", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def make(checkout, tmp_path):
    fake, log = tmp_path / "python3", tmp_path / "log"

    def run(*arguments, version="echo 3.11", folder=checkout):
        log.write_text("")
        fake.write_text(FAKE_PYTHON.format(log=log, fake=fake, version=version))
        fake.chmod(0o755)
        command = ["make", *arguments, f"PYTHON={fake}", "PYTEST_ARGS=-q"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
        calls = [line for line in log.read_text().splitlines() if line.startswith("-m ")]
        return done, calls

    return run


def install_calls():
    pip = "-m pip --disable-pip-version-check install --quiet --progress-bar off"
    return [
        f"{pip} --no-deps -c constraints.txt torch",
        f"{pip} --require-hashes --no-deps -r requirements.txt",
        f"{pip} -c constraints.txt --no-build-isolation -e .[dev,transformers]",
    ]


def demo_calls(torch="pip"):
    pip = "-m pip --disable-pip-version-check install --quiet --progress-bar off"
    return [
        *([f"{pip} --no-deps -c constraints.txt torch"] if torch == "pip" else []),
        f"{pip} --require-hashes --no-deps -r .venv/requirements.txt",
        f"{pip} -c constraints.txt --no-build-isolation -e .",
    ]


@pytest.fixture
def demo(make, checkout):
    """`make demo`, with an `extraction` that does nothing; what it called."""

    def run():
        (checkout / ".venv/bin").mkdir(parents=True, exist_ok=True)
        (checkout / ".venv/bin/extraction").write_text("#!/bin/bash\n")
        (checkout / ".venv/bin/extraction").chmod(0o755)
        return make("demo")

    return run


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A folder that comes first in PATH, without any uv behind it."""
    folder = tmp_path / "path"
    folder.mkdir()
    others = [part for part in os.environ["PATH"].split(":") if not (Path(part) / "uv").exists()]
    monkeypatch.setenv("PATH", ":".join([str(folder), *others]))
    return folder


@pytest.mark.usefixtures("path")
def test_the_demo_installs_what_it_needs_and_says_before_how_much_that_is(demo, checkout):
    done, calls = demo()
    assert done.returncode == 0, done.stderr
    assert calls == ["-m venv --clear .venv", *demo_calls()]
    said = done.stdout.splitlines()
    assert said[0] == "Creating .venv (first time: about two minutes)"
    assert re.match(
        r"About [\d.]+ GB to download, [\d.]+ GB on disk, with torch's CPU build; on Linux, [\d.]+ GB", said[2]
    )
    assert "There is no uv" in said[3]
    needed = (checkout / ".venv/requirements.txt").read_text()
    assert [name in needed for name in ("\ndagster==", "\ntorch==", "\nsetuptools==")] == [True] * 3
    assert [name in needed for name in ("playwright", "ruff", "mypy", "pytest", "transformers", "moto")] == [False] * 6
    assert demo()[1] == []


@pytest.mark.parametrize(("code", "torch"), [(0, "uv"), (2, "pip")])
def test_where_there_is_uv_it_takes_the_build_of_torch_that_fits_and_pip_where_it_can_not(demo, path, code, torch):
    (path / "uv").write_text(f'#!/bin/bash\necho "$*" >> "{path}/calls"\necho unknown option >&2\nexit {code}\n')
    (path / "uv").chmod(0o755)
    done, calls = demo()
    assert (done.returncode, calls) == (0, ["-m venv --clear .venv", *demo_calls(torch)]), done.stderr
    options = "--python .venv/bin/python --torch-backend=auto --no-deps -c constraints.txt torch"
    assert (path / "calls").read_text() == f"pip install --quiet {options}\n"
    assert ("uv could not (see above): pip goes on." in done.stderr) == (torch == "pip")


@pytest.mark.usefixtures("path")
def test_after_the_demo_the_tests_install_the_rest_into_the_same_environment_and_not_the_other_way_round(demo, make):
    demo()
    assert make("test")[1] == [*install_calls(), "-m pytest -q"]
    assert demo()[1] == []


@pytest.mark.usefixtures("path")
def test_a_checkout_that_moved_after_the_demo_gets_a_new_environment(demo, make, checkout, tmp_path):
    demo()
    moved = checkout.rename(tmp_path / "moved")
    assert make("test", folder=moved)[1] == ["-m venv --clear .venv", *install_calls(), "-m pytest -q"]


def test_help_is_the_default_and_lists_every_target(make):
    done, calls = make()
    assert (done.returncode, calls) == (0, [])
    targets = [line.split()[1] for line in done.stdout.splitlines()]
    assert targets == ["help", "demo", "test", "soak", "ui", "lint", "types", "check", "docs", "screenshots", "clean"]


def test_from_nothing_it_creates_installs_and_runs(make, checkout):
    done, calls = make("test")
    assert done.returncode == 0, done.stderr
    assert calls == ["-m venv --clear .venv", *install_calls(), "-m pytest -q"]
    assert "Creating .venv (first time: about two minutes)" in done.stdout
    assert (checkout / ".venv/.installed").read_text() == f"{checkout}\n"


def test_a_second_call_installs_nothing(make):
    make("test")
    done, calls = make("test")
    assert (calls, done.stdout) == (["-m pytest -q"], "")


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.cfg", "constraints.txt", "requirements.txt"])
def test_a_changed_requirement_installs_again_into_the_same_environment(make, checkout, name):
    make("test")
    stamp = (checkout / ".venv/.installed").stat().st_mtime
    path = checkout / name
    path.write_text(path.read_text() + "\n")
    os.utime(path, (stamp + 5, stamp + 5))
    assert make("test")[1] == [*install_calls(), "-m pytest -q"]


def test_a_failed_installation_is_taken_up_again(make, checkout):
    (checkout / "fail").touch()
    done, calls = make("test")
    assert (done.returncode, calls) == (2, ["-m venv --clear .venv", install_calls()[0]])
    assert not (checkout / ".venv/.installed").exists()
    (checkout / "fail").unlink()
    assert make("test")[1] == [*install_calls(), "-m pytest -q"]


def test_a_failed_update_is_taken_up_again_even_if_the_change_is_undone(make, checkout):
    make("test")
    before = (checkout / "constraints.txt").stat().st_mtime
    os.utime(checkout / "constraints.txt", (before + 3600, before + 3600))
    (checkout / "fail").touch()
    assert make("test")[0].returncode == 2
    os.utime(checkout / "constraints.txt", (before, before))
    (checkout / "fail").unlink()
    assert make("test")[1] == [*install_calls(), "-m pytest -q"]


def test_a_moved_checkout_gets_a_new_environment(make, checkout, tmp_path):
    make("test")
    moved = checkout.rename(tmp_path / "moved")
    assert make("test", folder=moved)[1] == ["-m venv --clear .venv", *install_calls(), "-m pytest -q"]
    assert make("test", folder=moved)[1] == ["-m pytest -q"]


def test_an_old_python_is_refused_with_the_way_out(make, checkout):
    done, calls = make("demo", version="echo 3.9; exit 1")
    assert (done.returncode, calls) == (2, [])
    assert "This project needs Python 3.11 or newer, and " in done.stderr
    assert " is 3.9.\nName another one: make demo PYTHON=python3.12\n" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_missing_python_is_refused_too(make):
    done, _ = make("demo", version="exit 127")
    assert " is not there.\n" in done.stderr


FAKE_COMMAND = """#!/bin/bash
echo "$(basename "$0") $*" >> commands
case "$*" in
  status) [ -e table ] ;;
  demo) touch table ;;
esac
"""


@pytest.mark.parametrize(("has_table", "first"), [(False, ["extraction demo"]), (True, [])])
def test_the_ui_opens_on_the_demos_data_where_there_is_no_table(make, checkout, has_table, first):
    make("test")
    for name in ("extraction", "dagster"):
        (checkout / ".venv/bin" / name).write_text(FAKE_COMMAND)
        (checkout / ".venv/bin" / name).chmod(0o755)
    if has_table:
        (checkout / "table").touch()
    done, _ = make("ui", "PORT=3456")
    assert (done.returncode, "Dagster's UI: http://127.0.0.1:3456" in done.stdout) == (0, True), done.stderr
    dev = "dagster dev -w workspace.yaml --host 127.0.0.1 --port 3456"
    assert (checkout / "commands").read_text().splitlines() == ["extraction status", *first, "extraction init", dev]


def test_clean_keeps_the_data(make, checkout):
    make("test")
    (checkout / ".extraction").mkdir()
    (checkout / "package/__pycache__").mkdir(parents=True)
    assert make("clean")[0].returncode == 0
    assert not (checkout / ".venv").exists()
    assert not (checkout / "package/__pycache__").exists()
    assert (checkout / ".extraction").is_dir()
