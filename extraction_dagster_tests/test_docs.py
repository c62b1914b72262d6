"""The documents that can go stale: held equal to what they describe."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from extraction_dagster.settings import RETIRED, Settings

ROOT = Path(__file__).parents[1]
settings_page = runpy.run_path(str(ROOT / "docs/write_settings.py"))["settings_page"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"].values()
DEPENDENCIES = [*PROJECT["dependencies"], *(dependency for extra in EXTRAS for dependency in extra)]
NAMES = sorted({re.split(r"[<>=\[ ]", dependency)[0] for dependency in DEPENDENCIES})


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_settings_page_is_what_the_settings_say():
    page = (ROOT / "docs/settings.md").read_text()
    assert page == settings_page(), "run 'make docs'"


def test_the_settings_page_has_a_line_for_every_setting():
    page, _, gone = settings_page().partition("## Settings that are gone")
    listed = re.findall(r"^\| `EXTRACTION_(\w+)` \| (.+?) \| \S", page, re.MULTILINE)
    assert [name.lower() for name, _ in listed] == list(Settings.model_fields)
    assert ("BATCH_SIZE", "`1000`") in listed
    assert ("QDRANT_URL", "unset") in listed
    assert ("DECODE_WORKERS", "see right") in listed
    rows = re.findall(r"^\| `EXTRACTION_([A-Z_]+)(=\w+)?` \| \S", gone, re.MULTILINE)
    assert [name.lower() + value for name, value in rows] == list(RETIRED)


@pytest.mark.parametrize("name", NAMES)
def test_every_dependency_has_its_line(name):
    lines = (ROOT / "docs/dependencies.md").read_text().splitlines()
    found = [line for line in lines if line.startswith(f"| {name} |")]
    assert len(found) == 1, f"docs/dependencies.md needs one line '| {name} | why | what else was weighed |'"
    assert all(len(cell.strip()) > 5 for cell in found[0].strip("|").split("|")[1:]), found[0]


def test_no_line_speaks_of_a_dependency_that_is_gone():
    lines = (ROOT / "docs/dependencies.md").read_text().splitlines()
    tables = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert sorted(set(tables) - {"package", "---"}) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_dependency_is_pinned_to_what_the_tests_ran_with(name):
    pins = [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert canonical(name) in {canonical(pin) for pin in pins}


def test_every_relative_link_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    dead = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:|#|data:)([^)#\s]+)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert dead == []


def test_every_picture_is_taken_by_the_script_and_shown_on_a_page():
    taken = re.findall(r"^    Picture\(\s*\"(\w+)\"", (ROOT / "docs/take_screenshots.py").read_text(), re.MULTILINE)
    shown = re.findall(r"\]\(screenshots/(\w+)\.png\)", (ROOT / "docs/dagster.md").read_text())
    assert sorted(taken) == sorted(shown) == sorted(path.stem for path in (ROOT / "docs/screenshots").iterdir())


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_every_file_that_a_page_names_is_there(page):
    named = set(re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+(?:\.py|/))`", (ROOT / page).read_text()))
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/*") if path.suffix == ".py"]
    missing = {
        name for name in named if not any(f"/{file}".endswith(f"/{name}") or f"/{name}" in f"/{file}" for file in files)
    }
    assert sorted(missing - {"deploy/"}) == []


def promises():
    """Of docs/security.md: each promise, and the tests that hold it as `(file, name)`."""
    table = (ROOT / "docs/security.md").read_text().partition("| promise | held by |")[2].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return [(promise, re.findall(r"`(\S+?)::(\w+)`", held)) for promise, held in rows]


def test_every_promise_of_the_security_page_names_a_test_that_exists():
    found = promises()
    assert len(found) > 20
    missing = [
        f"{promise}: {file}::{name}"
        for promise, tests in found
        for file, name in tests or [("no test", "")]
        if not re.search(rf"^def {name}\(", _text(ROOT / "extraction_dagster_tests" / file), re.MULTILINE)
    ]
    assert missing == []


def _text(path):
    return path.read_text() if path.exists() else ""
